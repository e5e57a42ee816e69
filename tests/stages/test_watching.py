"""Evaluation on a schedule: it changes no bit of a run, its figures carry their steps, a failure ends nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config
from torch import nn

from pagoda.data import Downsampler, ShapesSource, prepare_images
from pagoda.diffusion import EDMDenoiser
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork, build_backbone
from pagoda.networks.backbones import BackboneConfig
from pagoda.stages.judging import RealImages
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.stages.watching import validation_losses
from pagoda.training import HealthWarning, ScheduledEvaluation


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = tiny_config(
        evaluation__every=4, evaluation__count=8, evaluation__features="random", evaluation__levels=[0.1, 2.0]
    )
    return train(config, str(tmp_path_factory.mktemp("watched") / "run"), quiet=True)


def lines(run: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_a_watched_run_ends_with_the_weights_of_an_unwatched_one(watched: RunFolder, finished_run: RunFolder) -> None:
    for stage in ("teach", "distill", "grow-16"):
        one, other = (r.record(stage) for r in (watched, finished_run))
        assert one is not None
        assert other is not None
        assert one["results"]["hash"] == other["results"]["hash"]


def test_figures_are_logged_at_their_steps_in_every_stage_that_trains(watched: RunFolder) -> None:
    found = [(e["stage"], e["step"]) for e in lines(watched) if "evaluation/FD[random]" in e]
    assert found == [("teach", 4), ("teach", 6), ("distill", 4), ("distill", 6), ("grow-16", 4)]
    taught = next(e for e in lines(watched) if e["stage"] == "teach" and "validation/sigma 0.1" in e)
    assert taught["validation/sigma 2"] > 0
    assert taught["evaluation/FD[random] real"] > 0


def test_curves_of_scores_reach_the_report(watched: RunFolder) -> None:
    text = (watched.path / "report.html").read_text()
    assert "FD[random]" in text
    assert "Validation loss by noise level" in text


def test_the_switch_is_off_by_default(finished_run: RunFolder) -> None:
    assert not any(name.startswith("evaluation/") for entry in lines(finished_run) for name in entry)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("evaluation__every", -1),
        ("evaluation__count", 2),
        ("evaluation__metrics", ["fdi"]),
        ("evaluation__levels", [0.0]),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\."):
        tiny_config(**{setting: value})


def test_a_fresh_network_has_the_validation_loss_of_one_that_knows_only_the_scale_of_the_data() -> None:
    data = prepare_images(ShapesSource(count=80), sizes=[8], downsampler=Downsampler(), cache_dir=None, progress=False)
    real = RealImages.split(data, 8, count=None, seed=0)
    network = DiffusersNetwork(
        build_backbone(BackboneConfig(channels=(16, 32), head_dim=16), image_size=8, num_classes=10)
    )
    spread = float(real.images(real.stand_in).square().mean().sqrt())
    losses = validation_losses(EDMDenoiser(network, sigma_data=spread), real, (0.05, 1.0, 20.0), conditional=True)
    # Its last layer is zero, so it answers c_skip x: the weighted error is 1 for data of the assumed second moment.
    assert losses == pytest.approx(dict.fromkeys(losses, 1.0), rel=0.05)
    assert validation_losses(EDMDenoiser(network, sigma_data=spread), real, (1.0,), conditional=True) == {
        "validation/sigma 1": losses["validation/sigma 1"]
    }


def test_networks_are_measured_as_they_were_when_it_began() -> None:
    go, seen = threading.Event(), []

    def measure(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        go.wait(10)
        seen.append(networks["a"].training)
        return {"weight": float(networks["a"].weight)}  # type: ignore[arg-type]

    layer = nn.Linear(1, 1, bias=False).train()
    nn.init.constant_(layer.weight, 1.0)
    evaluation = ScheduledEvaluation(5, measure)
    evaluation.start(5, {"a": layer})
    nn.init.constant_(layer.weight, 2.0)
    assert evaluation.collect(wait=False) == []
    go.set()
    assert evaluation.collect(wait=True) == [(5, {"weight": 1.0})]
    assert seen == [False]
    assert layer.training
    assert layer.weight.requires_grad


def test_it_is_due_every_so_many_steps_and_after_the_last() -> None:
    evaluation = ScheduledEvaluation(5, lambda networks: {})
    assert [step for step in range(1, 13) if evaluation.is_due(step, last=step == 12)] == [5, 10, 12]
    with pytest.raises(ConfigError, match="every 1 steps or more"):
        ScheduledEvaluation(0, lambda networks: {})


def test_a_failed_measurement_is_told_and_ends_nothing() -> None:
    def measure(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        raise ValueError("no room")

    evaluation = ScheduledEvaluation(1, measure)
    evaluation.start(3, {})
    with pytest.warns(HealthWarning, match=r"after step 3 failed \(ValueError: no room\); training goes on"):
        assert evaluation.collect(wait=True) == []


def test_measuring_leaves_the_global_generator_alone(watched: RunFolder, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    data = prepare_images(ShapesSource(count=20), sizes=[8], downsampler=Downsampler(), cache_dir=None, progress=False)
    RealImages.split(data, 8, count=4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
