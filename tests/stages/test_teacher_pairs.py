"""Pairs that the teacher makes of fresh noise: what they are, that they are made once, and who learns from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.data import LatentStore, ShapesSource
from pagoda.diffusion import Condition, DPMSolver2M, sample
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import model_hash
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.objective import GeneratorObjective
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.teacher_pairs import make_teacher_pairs, pair_noise, sampling_grid
from pagoda.stages.train import train
from pagoda.training import OptimizerConfig, Runtime, StepRandom

PAIRS = {"distill__teacher_pairs__count": 24, "distill__teacher_pairs__num_nodes": 4}


def config_of(mode: str, **changes: object) -> RunConfig:
    return tiny_config(**{"distill__mode": mode, **PAIRS, **changes})


def context_of(run: RunFolder, folder: Path, config: RunConfig) -> StageContext:
    """A copy of a run, opened for another configuration of its distillation."""
    shutil.copytree(run.path, folder)
    return open_context(RunFolder.open(folder), config, Runtime("cpu"), quiet=True)


def objective_of(context: StageContext, share: float) -> GeneratorObjective:
    return GeneratorObjective(
        load_generator(context.run, 8),
        None,
        None,
        LatentInputs(open_latents(context)),
        load=context.loader(8),
        config=context.config.distill.loss,
        steps=6,
        mirror=context.config.mirror,
        optimizers=(OptimizerConfig(), OptimizerConfig()),
        ema=0.9,
        preview=context.preview_inputs(),
        teacher_pairs=make_teacher_pairs(context),
        pair_share=share,
    )


def test_a_pair_is_noise_and_where_the_teachers_ode_carries_it(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    noise, images, condition = make_teacher_pairs(context).get(torch.tensor([5, 0, 23]))
    assert noise.shape == images.shape == (3, 3, 8, 8)
    assert torch.equal(noise[0], pair_noise(0, torch.tensor([5]), (3, 8, 8))[0])
    assert condition.label is not None
    denoiser, _ = load_teacher(context.run.teacher)
    expected = sample(
        denoiser, noise, sigmas=sampling_grid(context.config), condition=condition, solver=DPMSolver2M()
    ).clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)  # stored in half precision


MIXED = {"distill__teacher_pairs__latents": "mixed"}


def test_a_mixture_lies_on_the_arc_between_two_latents_of_its_class(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both", **MIXED))
    pairs, store = make_teacher_pairs(context), LatentStore.open(context.run.latents)
    rows = torch.tensor([5, 0, 23, 11])
    mixed, images, condition = pairs.get(rows)
    assert torch.equal(pairs.get(rows[2:3])[0][0], mixed[2])  # whatever else is asked for
    own = context.data.labels(store.images)
    assert own is not None
    assert condition.label is not None
    angles = []
    for z, label in zip(mixed, condition.label.tolist(), strict=True):
        latents = store.get(store.images[own == label], torch.zeros(int((own == label).sum()), dtype=torch.int64))
        solved = torch.linalg.lstsq(latents.flatten(1).T.double(), z.flatten().double()).solution
        used = solved.abs() > 1e-3
        assert int(used.sum()) == 2
        assert float(solved.square().sum()) == pytest.approx(1, abs=1e-2)  # cos^2 + sin^2
        assert bool((solved[used] > 0).all())
        torch.testing.assert_close((latents * solved.float().reshape(-1, 1, 1, 1)).sum(0), z, atol=1e-3, rtol=0)
        angles.append(float(solved.max()))
    assert len(set(angles)) == 4
    denoiser, _ = load_teacher(context.run.teacher)
    grid = sampling_grid(context.config)
    expected = sample(denoiser, mixed, sigmas=grid, condition=condition, solver=DPMSolver2M()).clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)


def test_mixtures_and_fresh_noise_are_not_taken_for_each_other(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    make_teacher_pairs(context)
    with pytest.raises(ArtifactError, match="mixed"):
        make_teacher_pairs(open_context(context.run, config_of("both", **MIXED), Runtime("cpu"), quiet=True))
    settings = [stage_settings(config_of("both", **changes), "distill")["distill"] for changes in ({}, MIXED)]
    assert "latents" not in settings[0]["teacher_pairs"]  # as in runs of earlier versions
    assert settings[1]["teacher_pairs"]["latents"] == "mixed"
    with pytest.raises(ConfigError, match="two guidance weights have no mixture"):
        config_of("both", **MIXED, guidance__scale_max=3.0)


def test_labels_of_pairs_are_as_often_as_in_the_data(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both", distill__teacher_pairs__count=20))
    labels = make_teacher_pairs(context).condition(torch.arange(20)).label
    assert labels is not None
    assert torch.bincount(labels, minlength=10).tolist() == [2] * 10


def test_pairs_are_made_once_and_a_lost_shard_comes_back_bit_by_bit(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    make_teacher_pairs(context)
    store = LatentStore.open(context.run.teacher_pairs)
    shard = store.shard_path(0)
    before, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    make_teacher_pairs(context)
    assert shard.stat().st_mtime_ns == stamp
    shard.unlink()
    make_teacher_pairs(context)
    assert shard.read_bytes() == before


def test_pairs_of_another_configuration_are_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    make_teacher_pairs(context)
    other = config_of("both", distill__teacher_pairs__solver="euler")
    with pytest.raises(ArtifactError, match="solver"):
        make_teacher_pairs(open_context(context.run, other, Runtime("cpu"), quiet=True))


def test_each_target_belongs_to_its_input_and_the_discriminator_sees_real_images(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    objective = objective_of(context, share=0.5)
    pairs = objective.teacher_pairs
    assert pairs is not None
    indices = torch.arange(32)
    batch = objective.batch(indices, StepRandom(0, 0, 32, slice(0, 32), "distill"))
    noise, taught, condition = pairs.get(torch.arange(len(pairs)))
    made = 0
    for row in range(32):
        found = (noise == batch.inputs[0][row]).flatten(1).all(1).nonzero().flatten()
        if len(found):
            made += 1
            assert torch.equal(batch.targets[row], taught[found[0]])
            assert batch.target_condition.label[row] == condition.label[found[0]]
        else:
            assert torch.equal(batch.targets[row], batch.images[row])
            assert batch.target_condition.label[row] == batch.condition.label[row]
    assert 4 < made < 28
    plain, mirrored = (context.load(8, indices, torch.full((32,), flip))[0] for flip in (False, True))
    assert all(torch.equal(x, a) or torch.equal(x, b) for x, a, b in zip(batch.images, plain, mirrored, strict=True))


@pytest.mark.parametrize(("share", "taught"), [(0.0, 0), (1.0, 32)])
def test_a_share_of_none_or_all_takes_one_kind_only(
    finished_run: RunFolder, tmp_path: Path, share: float, taught: int
) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    batch = objective_of(context, share).batch(torch.arange(32), StepRandom(0, 0, 32, slice(0, 32), "distill"))
    differs = (batch.targets != batch.images).flatten(1).any(1)
    assert int(differs.sum()) == taught


def test_a_run_with_pairs_resumes_bitwise(finished_run: RunFolder, tmp_path: Path) -> None:
    mode = "both"
    whole = train(config_of(mode), str(tmp_path / "whole"), quiet=True, until="distill")
    parts = tmp_path / "parts"
    train(config_of(mode), str(parts), quiet=True, until="encode")
    context = open_context(RunFolder.open(parts), config_of(mode), Runtime("cpu"), quiet=True)
    make_teacher_pairs(context)  # as if stopped after the pairs
    again = train(config_of(mode), str(parts), quiet=True, until="distill")
    assert model_hash(load_generator(again, 8)) == model_hash(load_generator(whole, 8))
    assert model_hash(load_generator(whole, 8)) != model_hash(load_generator(finished_run, 8))


def test_without_pairs_the_stage_is_recorded_as_ever() -> None:
    assert "teacher_pairs" not in stage_settings(tiny_config(distill__mode="rec"), "distill")["distill"]
    assert stage_settings(config_of("both"), "distill")["distill"]["mode"] == "both"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__mode": "bth"}, "Did you mean `?both"),
        ({"distill__teacher_pairs__share": 0.0}, "mode=rec"),
        ({"distill__teacher_pairs__share": 1.0}, "mode=dstl"),
        ({"distill__teacher_pairs__count": 0}, "at least 1"),
        ({"distill__teacher_pairs__num_nodes": 1}, "at least 2"),
        ({"distill__teacher_pairs__solver": "huen"}, "heun"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_a_distillation_of_the_teacher_alone_goes_its_own_way_and_on_to_the_octave(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    """mode=dstl through the whole door: learned from pairs alone, and grown on the latents of real images."""
    run = train(config_of("dstl"), str(tmp_path / "run"), quiet=True)
    assert model_hash(load_generator(run, 8)) != model_hash(load_generator(finished_run, 8))
    assert run.is_done("grow-16")
    # Which images have latents is nothing to it.
    other = train(config_of("dstl", encode__share=0.5), str(tmp_path / "other"), quiet=True, until="distill")
    assert model_hash(load_generator(other, 8)) == model_hash(load_generator(run, 8))


def test_conditions_of_a_set_without_labels_stay_empty(tmp_path: Path) -> None:
    source, folder = ShapesSource(count=40), tmp_path / "photos"  # the same images as elsewhere, without their labels
    folder.mkdir()
    for index in range(len(source)):
        source.image(index).save(folder / f"{index:02d}.png")
    run = train(config_of("both", data=str(folder)), str(tmp_path / "run"), quiet=True, until="distill")
    pairs = make_teacher_pairs(open_context(run, run.config(), Runtime("cpu"), quiet=True))
    assert pairs.get(torch.tensor([1]))[2] == Condition()


def test_what_pairs_cost_is_written_down_and_adds_up_over_interruptions(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    make_teacher_pairs(context)
    first = context.run.require("teacher-pairs", "")["results"]["seconds"]
    assert first > 0
    make_teacher_pairs(context)
    assert context.run.require("teacher-pairs", "")["results"]["seconds"] == first, "nothing was made"
    LatentStore.open(context.run.teacher_pairs).shard_path(0).unlink()
    make_teacher_pairs(context)
    assert context.run.require("teacher-pairs", "")["results"]["seconds"] > first
    page = write_report(context.run, context.config).read_text(encoding="utf-8")
    assert "teacher-pairs" in page


def test_a_record_that_a_kill_left_open_is_closed(finished_run: RunFolder, tmp_path: Path) -> None:
    context = context_of(finished_run, tmp_path / "run", config_of("both"))
    make_teacher_pairs(context)
    record = context.run.require("teacher-pairs", "")
    context.run.write_record("teacher-pairs", {**record, "done": False})
    make_teacher_pairs(context)
    assert context.run.is_done("teacher-pairs")
