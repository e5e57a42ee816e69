"""The prior gap: measured by every run, beside its floor, without a trace in the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation import FeatureMoments, frechet_distance, kernel_distance
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import StageContext, open_context
from pagoda.stages.judging import RealImages, evenly, open_judge, some_of
from pagoda.stages.prior_gap import LEAST_CONTRAST, gap_lines, gap_path, load_gaps, measure_gap, washed_out
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train
from pagoda.stages.unseen_images import shift_sideways
from pagoda.training import HealthWarning, Runtime


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def context_of(run: RunFolder, **changes: object) -> StageContext:
    config: RunConfig = override(run.config(), {key.replace("__", "."): value for key, value in changes.items()})
    return open_context(run, config, Runtime("cpu"), quiet=True)


def test_a_measured_run_ends_with_the_weights_of_one_that_was_not(finished_run: RunFolder, tmp_path: Path) -> None:
    plain = train(tiny_config(evaluation__gap__count=0), str(tmp_path / "run"), quiet=True)
    assert not (plain.path / "prior-gap").exists()
    for stage in ("distill", "grow-16"):
        one, other = (r.record(stage) for r in (plain, finished_run))
        assert one is not None
        assert other is not None
        assert one["results"]["hash"] == other["results"]["hash"]
        assert one["settings"] == other["settings"]


def test_every_generator_of_a_run_is_measured_along_the_whole_walk(finished_run: RunFolder) -> None:
    gaps = load_gaps(finished_run)
    assert list(gaps) == [8, 16]
    for facts in gaps.values():
        walk = [(p["name"], p["fraction"]) for p in facts["points"]]
        assert walk == [
            ("training", 0.0), ("unseen", 0.0), ("mixture", 0.25), ("mixture", 0.5), ("mixture", 0.75), ("noise", 1.0),
        ]  # fmt: skip
        assert all(p["fd"] > 0 and p["floor_fd"] > 0 and p["contrast_ratio"] > 0 for p in facts["points"])
        assert facts["shown"] == "kd"  # 20 images are few for 224 features


def test_the_first_point_is_the_distance_of_reconstructions_and_its_floor_that_of_their_originals(
    finished_run: RunFolder,
) -> None:
    context = context_of(finished_run)
    real = RealImages.split(context.data, 16, count=256, seed=0)
    extractor = open_judge("random", finished_run, context.data, 16, context.runtime)
    generator, store = load_generator(finished_run), LatentStore.open(finished_run.latents)
    with torch.no_grad():
        labels = context.data.labels(real.stand_in)
        rebuilt = generator(store.get(real.stand_in), Condition.of_labels(labels)).clamp(-1, 1)
    reference, made, originals = (
        FeatureMoments.from_features(extractor(images))
        for images in (real.images(real.reference), rebuilt, real.images(real.stand_in))
    )
    point = load_gaps(finished_run)[16]["points"][0]
    assert point["fd"] == pytest.approx(frechet_distance(reference, made), rel=1e-4)
    assert point["floor_fd"] == pytest.approx(frechet_distance(reference, originals), rel=1e-4)
    assert labels is not None
    strata = context.data.labels(real.reference), labels
    features = [extractor(real.images(rows)) for rows in (real.reference, real.stand_in)]
    assert point["floor_kd"] == pytest.approx(kernel_distance(*features, strata=strata).value, rel=1e-4)


def test_it_is_measured_once_and_anew_for_other_settings_without_touching_a_stage(run: RunFolder) -> None:
    context = context_of(run)
    path = gap_path(run, 8)
    before = path.read_bytes(), (run.path / "prior-gap" / "unseen.safetensors").stat().st_mtime_ns
    measure_gap(context, 8)
    assert before == (path.read_bytes(), (run.path / "prior-gap" / "unseen.safetensors").stat().st_mtime_ns)
    fewer = tiny_config(evaluation__gap__fractions=[0.5], evaluation__gap__features="teacher")
    train(fewer, str(run.path), quiet=True)
    facts = load_gaps(run)[8]
    assert [p["fraction"] for p in facts["points"]] == [0, 0, 0.5, 1]
    assert facts["features"]["name"] == "teacher"


def test_a_measurement_repeats_and_leaves_the_global_generator_alone(run: RunFolder) -> None:
    before, state = load_gaps(run)[16], torch.get_rng_state()
    shutil.rmtree(run.path / "prior-gap")
    again = measure_gap(context_of(run), 16)
    assert again is not None
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(again.pop("points"), before.pop("points"), strict=True):
        assert one.pop("name") == other.pop("name")
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)  # a fresh process rounds sums of floats in its own way
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}


def test_unseen_images_are_other_ones_where_they_are_named(run: RunFolder) -> None:
    facts = measure_gap(context_of(run, evaluation__data="shapes:count=60,seed=9"), 8)
    assert facts is not None
    assert facts["unseen"] == {"kind": "images", "count": 20}  # as many as there are training images at a point
    seen = next(p for p in facts["points"] if p["name"] == "training")
    unseen = next(p for p in facts["points"] if p["name"] == "unseen")
    assert seen["floor_fd"] != unseen["floor_fd"]


def test_unseen_images_are_mirrored_ones_where_mirrors_were_not_trained_on(run: RunFolder) -> None:
    context = context_of(run)
    gap_path(run, 8).unlink()
    facts = measure_gap(dataclasses.replace(context, config=override(context.config, {"mirror": False})), 8)
    assert facts is not None
    assert facts["unseen"]["kind"] == "mirrored"


def test_a_shifted_image_is_the_image_moved_to_the_right() -> None:
    images = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert torch.equal(shift_sideways(images, 1), torch.tensor([[[[0.0, 0, 1, 2], [4, 4, 5, 6]]]]))


def test_a_run_without_its_latents_is_not_measured_and_goes_on(run: RunFolder) -> None:
    shutil.rmtree(run.path / "prior-gap")
    shutil.rmtree(run.latents)
    assert measure_gap(context_of(run), 8) is None
    assert load_gaps(run) == {}


def test_the_main_process_measures_and_waits_for_no_other(run: RunFolder) -> None:
    class OneOfTwo(Runtime):
        @property
        def world_size(self) -> int:
            return 2

        def barrier(self) -> None:
            raise AssertionError("the other process has gone on to the next stage")

    class TheOther(OneOfTwo):
        @property
        def rank(self) -> int:
            return 1

    context = context_of(run, evaluation__data="shapes:count=40,seed=9")
    assert measure_gap(dataclasses.replace(context, runtime=TheOther("cpu")), 8) is None
    facts = measure_gap(dataclasses.replace(context, runtime=OneOfTwo("cpu")), 8)
    assert facts is not None
    assert facts["unseen"]["kind"] == "images"


def test_a_measurement_that_fails_is_told_and_ends_nothing(run: RunFolder) -> None:
    shutil.rmtree(run.path / "prior-gap")
    with pytest.warns(HealthWarning, match=r"px failed \(ArtifactError: .*the run goes on"):
        train(tiny_config(evaluation__gap__features="classifier:nowhere"), str(run.path), quiet=True)
    assert load_gaps(run) == {}


def test_the_report_and_evaluate_show_it(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run.path / "report.html").read_text()
    assert 'id="gap"' in text
    assert "training images moved by a part of a pixel" in text
    options = ["--metrics", "kd", "--features", "random", "--resamples", "0"]
    assert main(["evaluate", str(run.path), *options]) == 0
    out = capsys.readouterr().out
    assert "prior gap: KD[random]" in out
    assert gap_lines(load_gaps(run)[16])[-1] in out
    told = washed_out(load_gaps(run)[16])  # a run of a few steps
    assert told is not None
    assert told in out
    assert "of the data&#x27;s contrast: they are washed out" in text


def test_samples_without_contrast_are_called_washed_out(run: RunFolder) -> None:
    facts = load_gaps(run)[16]
    for share in (LEAST_CONTRAST, 1.0):
        facts["points"][-1]["contrast_ratio"] = share
        assert washed_out(facts) is None
    facts["points"][-1]["contrast_ratio"] = 0.6
    assert "0.60 of the data's contrast" in str(washed_out(facts))
    assert "distill.matching.ramp" in str(washed_out(facts))


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    gap_path(run, 8).write_text("{")
    with pytest.raises(ArtifactError, match=r"8\.json cannot be read"):
        load_gaps(run)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("count", 3),
        ("count", -1),
        ("fractions", [0.5, 0.25]),
        ("fractions", [0.0]),
        ("fractions", [0.5, 0.5]),
        ("features", "radnom"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.gap\.{setting}"):
        tiny_config(**{f"evaluation__gap__{setting}": value})


def test_the_file_is_plain_json_with_everything_that_the_figures_depend_on(finished_run: RunFolder) -> None:
    facts = json.loads(gap_path(finished_run, 16).read_text())
    record = finished_run.record("grow-16")
    assert record is not None
    assert facts["generator"] == record["results"]["hash"]
    assert {"size", "settings", "unseen_data", "count", "reference", "unseen", "features", "shown", "points"} <= set(
        facts
    )


def test_some_stand_ins_have_the_classes_in_the_proportions_of_all() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [4])[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    order = evenly(labels)
    assert sorted(order.tolist()) == list(range(100))
    for count in (10, 33, 50, 100):
        held = torch.bincount(labels[order[:count]], minlength=5)
        assert bool((held - count * torch.tensor([0.6, 0.3, 0.09, 0.0, 0.01])).abs().le(1).all())


def test_some_rows_are_of_every_class_alike_and_all_of_them_as_they_are() -> None:
    labels, rows = torch.arange(60) % 3, torch.randperm(60, generator=torch.Generator().manual_seed(1))[:50]
    assert torch.bincount(labels[some_of(rows, labels, 12)]).tolist() == [4, 4, 4]
    for count in (None, 50, 99):
        assert torch.equal(some_of(rows, labels, count), rows)
    assert torch.equal(some_of(rows, None, 12), rows[:12])
