"""Targets of an octave that keep the image below: what they are, with and without a cache, and which runs can have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config
from tests.stages.test_latent_runs import latent_config, save_codec
from torch.nn import functional as F

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.networks import OneStepGenerator, PixelCodec, model_hash
from pagoda.stages.config import RunConfig
from pagoda.stages.consistency import LowerImages
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.grow import add_octave, build_objective, cache_inputs, octave_settings
from pagoda.stages.latent_inputs import open_latents
from pagoda.stages.objective import GeneratorBatch, GeneratorObjective
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom

CONSISTENT = {"grow__targets": "consistent", "grow__loss__adversarial": 0.0}
RANDOM = StepRandom(0, 0, 8, slice(0, 8), "grow-16")


def context_of(run: RunFolder, folder: Path, config: RunConfig) -> StageContext:
    """A copy of a run that has not grown yet."""
    if not folder.exists():
        shutil.copytree(run.path, folder)
        shutil.rmtree(folder / "generator-16")
        (folder / "stages" / "grow-16.json").unlink()
        (folder / "critics" / "grow-16.json").unlink()
    return open_context(RunFolder.open(folder), config, Runtime("cpu"), quiet=True)


def objective_of(context: StageContext) -> GeneratorObjective:
    generator = add_octave(context, load_generator(context.run, 8), 16)
    inputs = cache_inputs(context, generator, open_latents(context), "grow-16")
    return build_objective(context, generator, inputs, 16, load_teacher(context.run.teacher)[0])


def stepped(objective: GeneratorObjective) -> GeneratorBatch:
    """A batch behind the generator's losses."""
    batch = objective.batch(torch.arange(8), RANDOM)
    assert objective.losses("generator", batch, RANDOM, Runtime("cpu")) is not None
    return batch


def lower_of(run: RunFolder) -> LowerImages:
    generator: OneStepGenerator = load_generator(run, 16)
    return LowerImages(generator, 16, lambda rows, flips: torch.zeros(0), lambda x: x)


def test_reduced_by_averaging_a_target_is_the_image_below_and_its_detail_is_the_datas(finished_run: RunFolder) -> None:
    draws = torch.Generator().manual_seed(0)
    images, lower = (torch.rand(4, 3, side, side, generator=draws) * 2 - 1 for side in (16, 8))
    reduced = F.avg_pool2d(images, 2)
    hidden = torch.zeros(4, 1, 8, 8)
    targets = lower_of(finished_run).keep({16: images}, reduced, (hidden, lower, hidden), Condition())[16]
    torch.testing.assert_close(F.avg_pool2d(targets, 2), lower)
    detail = [x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest") for x in (images, targets)]
    torch.testing.assert_close(detail[1], detail[0])


def test_where_the_image_below_is_exact_the_targets_are_the_images(finished_run: RunFolder) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reduced = F.avg_pool2d(images, 2)
    targets = lower_of(finished_run).keep({16: images}, reduced, (reduced, reduced, reduced), Condition())[16]
    assert torch.equal(targets, images)


def test_two_levels_that_are_trained_together_keep_the_image_below_both(finished_run: RunFolder) -> None:
    images, lower = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 8, 8) * 2 - 1
    every = {32: images, 16: F.avg_pool2d(images, 2)}
    targets = lower_of(finished_run).keep(every, F.avg_pool2d(images, 4), (lower, lower, lower), Condition())
    torch.testing.assert_close(F.avg_pool2d(targets[32], 4), lower)
    torch.testing.assert_close(F.avg_pool2d(targets[32], 2), targets[16])


@pytest.mark.parametrize("cache_gib", [2.0, 0.0], ids=["cached", "computed"])
def test_a_step_asks_for_detail_on_what_the_frozen_levels_made(
    finished_run: RunFolder, tmp_path: Path, cache_gib: float
) -> None:
    context = context_of(finished_run, tmp_path / "run", tiny_config(**CONSISTENT, grow__cache_gib=cache_gib))
    objective = objective_of(context)
    batch = stepped(objective)
    plain = objective.batch(torch.arange(8), RANDOM)
    with torch.no_grad():
        latents = open_latents(context).get(torch.arange(8), (RANDOM.uniform("flip") < 0.5).long())
        lower = load_generator(context.run, 8)(latents, batch.target_condition)
    expected = PixelCodec(3).bounded(
        plain.targets + F.interpolate(lower - plain.reduced, scale_factor=2.0, mode="nearest")
    )
    torch.testing.assert_close(batch.targets, expected, atol=2e-3, rtol=0)  # the cache is in half precision
    assert float((batch.targets - plain.targets).abs().max()) > 0.01
    assert torch.equal(batch.images, plain.images)  # what a discriminator takes for real stays real


def test_the_images_themselves_are_no_setting_at_all(finished_run: RunFolder, tmp_path: Path) -> None:
    config = tiny_config(grow__targets="images")
    objective = objective_of(context_of(finished_run, tmp_path / "run", config))
    assert objective.lower is None
    batch = stepped(objective)
    assert torch.equal(batch.targets, batch.images)
    assert "targets" not in octave_settings(config, 16)["grow"]
    assert octave_settings(tiny_config(**CONSISTENT), 16)["grow"]["targets"] == "consistent"


def test_a_run_grows_by_consistent_targets_and_continues_bitwise(finished_run: RunFolder, tmp_path: Path) -> None:
    hashes = []
    for name, steps in (("whole", None), ("parts", 2)):
        config = tiny_config(**CONSISTENT)
        context = context_of(finished_run, tmp_path / name, config)
        if steps is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(GeneratorObjective, "batch", _stopping(GeneratorObjective.batch, steps))
                with pytest.raises(KeyboardInterrupt):
                    train(config, str(context.run.path), quiet=True)
        run = train(config, str(context.run.path), quiet=True)
        hashes.append(model_hash(load_generator(run, 16)))
    assert hashes[0] == hashes[1]
    assert hashes[0] != model_hash(load_generator(finished_run, 16))


def _stopping(batch, steps: int):  # type: ignore[no-untyped-def]
    def stopping(self: GeneratorObjective, indices: torch.Tensor, random: StepRandom) -> GeneratorBatch:
        if random.step == steps:
            raise KeyboardInterrupt
        made: GeneratorBatch = batch(self, indices, random)
        return made

    return stopping


def test_runs_on_latents_take_the_latents_of_smaller_images(tmp_path: Path) -> None:
    """Averaged latents are not the latents of the smaller image, so the targets must be moved by the difference to these."""
    config = latent_config(save_codec(tmp_path / "codec"), **CONSISTENT)
    run = train(config, str(tmp_path / "run"), until="distill", quiet=True)
    context = open_context(run, config, Runtime("cpu"), quiet=True)
    generator = add_octave(context, load_generator(run, 4), 8)
    inputs = cache_inputs(context, generator, open_latents(context), "grow-8")
    objective = build_objective(context, generator, inputs, 8, load_teacher(run.teacher)[0])
    plain, batch = objective.batch(torch.arange(8), RANDOM), stepped(objective)
    flips = RANDOM.uniform("flip") < 0.5
    reduced = context.data.images(torch.arange(8), 4, flips)
    assert torch.equal(plain.reduced, reduced)
    moved = F.interpolate(plain.inputs[1].float() - reduced, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(batch.targets, plain.targets + moved)
    assert not torch.allclose(F.avg_pool2d(plain.targets, 2), reduced, atol=1e-2)


@pytest.mark.parametrize("boundary", ["decoder.1", "8"])
def test_targets_cannot_keep_an_image_that_is_trained_itself(boundary: str) -> None:
    with pytest.raises(ConfigError, match=r"Set grow\.targets=images"):
        tiny_config(**CONSISTENT, grow__train_from=boundary)
