"""Calibration: what it chooses keeps what was promised, and travels as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny_pipelines import sample_text, stable_diffusion, text_inputs

import pagoda
from pagoda.acceleration import (
    RAS,
    DeepCache,
    FasterDiffusion,
    load_plans,
    pipeline_sampler,
    plan_from_dict,
    relative_l2,
    save_plans,
    tune,
)
from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError
from pagoda.stages.run_folder import RunFolder

FAMILIES = [
    [DeepCache(interval=n, branch=1) for n in (2, 3, 5)],
    [FasterDiffusion(keys=2, parallel=False, inject_scale=0.0)],
]


def sampler_of(pipeline: object) -> object:
    return lambda seed: sample_text(pipeline, steps=6, seed=seed)


def test_the_choice_keeps_the_deviation_and_saves_most() -> None:
    pipeline = stable_diffusion()
    sampler = sampler_of(pipeline)
    every = tune(pipeline, sampler, within=1e9, seeds=[0], families=FAMILIES)
    deviations = [candidate.deviation for candidate in every.tried]
    assert len(deviations) == 4
    assert all(deviation > 0 for deviation in deviations)
    within = sorted(deviations)[1] * 1.0001
    tuned = tune(pipeline, sampler, within=within, seeds=[0], families=FAMILIES)
    assert tuned.best.deviation <= within
    fitting = [candidate for candidate in tuned.tried if candidate.deviation <= within]
    assert tuned.best.multiply_adds_saved == max(candidate.multiply_adds_saved for candidate in fitting)
    plain = sampler(0)
    with pagoda.accelerate(pipeline, tuned.best.plan):
        assert relative_l2(sampler(0), plain) == pytest.approx(tuned.best.deviation)
    assert "<- chosen" in str(tuned)


def test_plans_that_a_solver_refuses_are_told_and_not_chosen() -> None:
    from diffusers import HeunDiscreteScheduler

    pipeline = stable_diffusion(HeunDiscreteScheduler())
    families = [[FasterDiffusion(keys=2)], [DeepCache(interval=2)]]
    tuned = tune(pipeline, sampler_of(pipeline), within=10.0, seeds=[0], families=families)
    assert tuned.best.plan == DeepCache(interval=2)
    assert "parallel=False" in tuned.tried[0].refused
    assert "refused" in str(tuned)


def test_what_cannot_be_kept_is_refused() -> None:
    pipeline = stable_diffusion()
    with pytest.raises(ConfigError, match="no plan stays within 1e-12; the nearest, DeepCache"):
        tune(pipeline, sampler_of(pipeline), within=1e-12, seeds=[0], families=FAMILIES[:1])
    with pytest.raises(ConfigError, match="must be > 0"):
        tune(pipeline, sampler_of(pipeline), within=0.0)
    with pytest.raises(ConfigError, match="no seeds"):
        tune(pipeline, sampler_of(pipeline), within=0.1, seeds=[])


def test_a_pipeline_is_sampled_by_its_own_call() -> None:
    pipeline = stable_diffusion()
    sampler = pipeline_sampler(pipeline, steps=3, height=16, width=16, **text_inputs())
    assert sampler(0).shape == (1, 4, 16, 16)
    assert torch.equal(sampler(0), sampler(0))
    assert not torch.equal(sampler(0), sampler(1))
    with pytest.raises(ConfigError, match="needs prompts"):
        pipeline_sampler(pipeline, steps=3)


def test_plans_travel_in_a_folder(tmp_path: Path) -> None:
    plans = [FasterDiffusion(keys=(0, 2, 3), parallel=False), DeepCache(interval=4, branch=2)]
    assert save_plans(tmp_path, plans, within=0.05) == tmp_path / "acceleration.json"
    assert load_plans(tmp_path) == plans
    assert json.loads((tmp_path / "acceleration.json").read_text())["within"] == 0.05
    ramped = RAS(ramp=(64, 4), reset_steps="mid")
    save_plans(tmp_path / "ras.json", [ramped])
    assert load_plans(tmp_path / "ras.json") == [ramped]
    pipeline = stable_diffusion()
    with pagoda.accelerate(pipeline, tmp_path) as run:
        sample_text(pipeline, steps=6)
    assert run.layout.plan.startswith("DeepCache(interval=4, branch=2) + FasterDiffusion")


def test_files_that_are_no_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="pagoda accelerate tune"):
        load_plans(tmp_path)
    (tmp_path / "acceleration.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        load_plans(tmp_path)
    (tmp_path / "acceleration.json").write_text('{"format": 7}')
    with pytest.raises(ArtifactError, match="of format 1"):
        load_plans(tmp_path)
    with pytest.raises(ConfigError, match=r"DeepCache has no setting `intervall`. Did you mean `interval`"):
        plan_from_dict({"plan": "DeepCache", "intervall": 3})
    with pytest.raises(ConfigError, match="Did you mean `DeepCache`"):
        plan_from_dict({"plan": "DeepCash"})
    with pytest.raises(ConfigError, match="is a function and cannot be saved"):
        save_plans(tmp_path, [RAS(metric=lambda p: p.abs().sum(1))])


def test_the_command_writes_what_accelerate_reads(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = [
        "accelerate",
        "tune",
        str(finished_run.path),
        "--within",
        "0.9",
        "--steps",
        "6",
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    assert "<- chosen" in capsys.readouterr().out
    values = json.loads(out.read_text())
    assert values["chosen"]["deviation"] <= 0.9
    assert values["steps"] == 6
    assert len(load_plans(out)) == 1
    assert main(["accelerate", "tune", str(tmp_path), "--within", "0.9"]) == 1
    assert "neither a diffusers pipeline" in capsys.readouterr().err


def test_targets_without_anatomy_are_named() -> None:
    from types import SimpleNamespace

    from tests.tiny_pipelines import autoencoder

    with pytest.raises(ConfigError, match=r"`Linear` has no network with an anatomy; these have: .*`UNet2DModel`"):
        tune(torch.nn.Linear(2, 2), lambda seed: torch.ones(1), within=0.1)
    pipeline = SimpleNamespace(components={"vae": autoencoder()}, scheduler=None)
    with (
        pytest.raises(ConfigError, match="holds `AutoencoderKL`, and none of them has an anatomy"),
        pagoda.accelerate(pipeline, DeepCache()),
    ):
        pass


def test_a_teacher_of_ours_samples_under_a_plan(finished_run: RunFolder) -> None:
    from pagoda.api import Teacher

    teacher = Teacher(finished_run)
    plain, fast = teacher.sample(1), teacher.sample(1, plans=[DeepCache(interval=3)])
    assert plain[0].size == fast[0].size
    assert teacher.sample(1, plans=[DeepCache(interval=1)])[0].tobytes() == plain[0].tobytes()
