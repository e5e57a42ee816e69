"""Detail that is scaled at the end of an octave: as strong as the images', nothing else changed, and within its bounds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.data import LatentStore
from pagoda.errors import ConfigError
from pagoda.networks import OneStepGenerator
from pagoda.networks.growth import enlarge_image
from pagoda.stages.context import StageContext, open_context
from pagoda.stages.detail import LARGEST_GAIN, match_detail
from pagoda.stages.guidance import stored_condition
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train
from pagoda.training import Runtime


@pytest.fixture
def context(finished_run: RunFolder) -> StageContext:
    return open_context(finished_run, tiny_config(), Runtime("cpu"), quiet=True)


def strengths(context: StageContext, generator: OneStepGenerator) -> tuple[float, float]:
    """Root mean squares of the detail between 8 and 16 px: of all images, and of what the generator makes of their latents."""
    store = LatentStore.open(context.run.latents)
    rows = torch.arange(len(store))
    flips = torch.zeros_like(rows)
    images, lower = (context.load(size, rows, flips.bool())[0] for size in (16, 8))
    told, z = stored_condition(store, context.condition, rows, flips), store.get(rows, flips)
    with torch.no_grad():
        made = generator(z, told, resolution=16) - enlarge_image(generator(z, told, resolution=8))
    return tuple(float(detail.square().mean().sqrt()) for detail in (images - enlarge_image(lower), made))  # type: ignore[return-value]


@pytest.mark.parametrize(("share", "gain"), [(0.7, 1 / 0.7), (0.95, 1 / 0.95), (1.4, 1.0), (0.1, LARGEST_GAIN)])
def test_detail_becomes_as_strong_as_the_images_within_its_bounds(
    context: StageContext, share: float, gain: float
) -> None:
    store, generator = LatentStore.open(context.run.latents), load_generator(context.run)
    true, made = strengths(context, generator)
    head = generator.octaves[0].conv_out
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            parameter.mul_(share * true / made)
    others = {name: p.clone() for name, p in generator.named_parameters() if "octaves.0.conv_out" not in name}
    found = match_detail(context, generator, store, [0])
    assert found == {16: pytest.approx(gain, rel=1e-3)}
    assert strengths(context, generator)[1] == pytest.approx(share * gain * true, rel=1e-3)
    assert all(torch.equal(p, others[name]) for name, p in generator.named_parameters() if name in others)
    if share < 1 and gain < LARGEST_GAIN:
        assert match_detail(context, generator, store, [0]) == {16: pytest.approx(1.0, rel=1e-3)}  # it is done


def test_a_level_without_detail_stays_as_it_is(context: StageContext) -> None:
    generator = load_generator(context.run)
    with torch.no_grad():
        generator.octaves[0].conv_out.weight.zero_()
        generator.octaves[0].conv_out.bias.zero_()
    assert match_detail(context, generator, LatentStore.open(context.run.latents), [0]) == {16: 1.0}


def test_the_stage_scales_its_own_head_and_writes_down_by_how_much(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    shutil.rmtree(run.generator(16))
    (run.path / "stages" / "grow-16.json").unlink()
    train(tiny_config(grow__match_detail=True), str(run.path), quiet=True)
    record = run.record("grow-16")
    assert record is not None
    gain = record["results"]["detail_gain"]["16"]
    assert 1 < gain <= LARGEST_GAIN
    plain, scaled = (dict(load_generator(r).state_dict()) for r in (finished_run, run))
    for name, value in plain.items():
        expected = gain * value if "octaves.0.conv_out" in name else value
        torch.testing.assert_close(scaled[name], expected, rtol=1e-6, atol=0)


def test_it_is_off_unless_asked_for_and_needs_a_head_that_adds() -> None:
    assert "match_detail" not in stage_settings(tiny_config(), "grow")["grow"]  # as in runs of earlier versions
    assert stage_settings(tiny_config(grow__match_detail=True), "grow")["grow"]["match_detail"] is True
    with pytest.raises(ConfigError, match="the octave of 16 px has the head zero"):
        tiny_config(grow__match_detail=True, grow__head_init="zero")
