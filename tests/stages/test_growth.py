"""Growth as a stage: several octaves in one go, other boundaries, heads, widths, blocks and losses of each octave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import anatomy
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.grow import (
    CachedInputs,
    add_octave,
    boundary_of,
    build_objective,
    cache_inputs,
    check_frozen,
    octave_settings,
    octaves_of,
)
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import stages_of, train
from pagoda.training import Runtime, StepRandom

Z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run_as(finished_run: RunFolder, tmp_path: Path) -> Callable[..., RunFolder]:
    """Grows a copy of a finished run anew, from 8 px, with other settings."""

    def run(**changes: object) -> RunFolder:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(finished_run.path, folder)
        (folder / "stages" / "grow-16.json").unlink()
        (folder / "critics" / "grow-16.json").unlink()
        shutil.rmtree(folder / "generator-16")
        return train(tiny_config(**changes), str(folder), quiet=True)

    return run


def context_of(run: RunFolder, **changes: object) -> StageContext:
    return open_context(run, tiny_config(**changes), Runtime("cpu"), quiet=True)


def test_octaves_in_one_go_are_one_stage_and_all_new_levels_are_trained(run_as: Callable[..., RunFolder]) -> None:
    changes = {"size": 32, "grow__at_once": 2, "grow__channels": [16, 8], "grow__blocks": [2, 1]}
    config = tiny_config(**changes)
    assert stages_of(config) == ["teach", "encode", "distill", "grow-32"]
    run = run_as(**changes)
    assert run.generator_sizes() == [8, 32]
    lower, upper = load_generator(run, 8), load_generator(run, 32)
    assert upper.sizes == [8, 16, 32]
    assert [len(level.blocks) for level in upper.octaves] == [2, 1]
    assert torch.equal(lower(Z), upper(Z, resolution=8))
    enlarge = torch.nn.functional.interpolate
    middle = upper(Z, resolution=16)
    assert not torch.equal(middle, enlarge(lower(Z), scale_factor=2, mode="bilinear"))
    assert not torch.equal(upper(Z), enlarge(middle, scale_factor=2, mode="bilinear"))
    assert train(config, str(run.path), quiet=True).generator_sizes() == [8, 32]  # again, and nothing happens


HEADS = [
    {"grow__heads": ["zero"], "grow__use_rgb": False},  # the image between is read by nothing above it
    {"grow__heads": ["skip_rgb"]},
    {"grow__targets": "consistent"},
    {"grow__loss__updates": "separate"},
]


@pytest.mark.parametrize("changes", HEADS, ids=["zero", "skip_rgb", "consistent", "separate"])
@pytest.mark.parametrize("cache_gib", [2.0, 0.0], ids=["cached", "computed"])
def test_the_head_between_learns_the_images_of_its_own_size(
    finished_run: RunFolder, tmp_path: Path, changes: dict[str, object], cache_gib: float
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    own = {"size": 32, "grow__at_once": 2, "grow__loss__adversarial_from": 0.0, "grow__cache_gib": cache_gib, **changes}
    context = context_of(RunFolder.open(tmp_path / "run"), **own)
    generator = add_octave(context, load_generator(context.run, 8), 32)
    inputs = cache_inputs(context, generator, open_latents(context), "grow-32")
    objective = build_objective(context, generator, inputs, 32, load_teacher(context.run.teacher)[0])
    random = StepRandom(0, 0, 8, slice(0, 8), "grow-32")
    batch = objective.batch(torch.arange(8), random)
    plain = batch.between[16].clone()
    flips = random.uniform("flip") < 0.5
    assert torch.equal(plain, context.load(16, torch.arange(8), flips)[0])
    found = objective.losses("generator", batch, random, Runtime("cpu"))
    assert found is not None
    found.total.backward()
    for level in generator.octaves:
        assert all(bool((p.grad != 0).any()) for p in level.conv_out.parameters())
    with torch.no_grad():
        made = inputs.generate_levels(generator, tuple(p.float() for p in batch.inputs), batch.target_condition)
        expected, _ = objective.reconstruction(
            made[16].float(), batch.between[16], objective._crop(random, "feature", 16), random
        )
    torch.testing.assert_close(found.named["reconstruction_16"], expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(batch.between[16], plain) == (changes.get("grow__targets") != "consistent")
    assert (
        build_objective(
            context_of(context.run), load_generator(context.run, 16), inputs, 16, load_teacher(context.run.teacher)[0]
        ).retained
        is None
    )  # one octave has no sizes between


def test_an_octave_that_had_not_told_its_heads_between_is_not_continued(run_as: Callable[..., RunFolder]) -> None:
    changes = {"size": 32, "grow__at_once": 2, "grow__channels": [16, 8]}
    run = run_as(**changes)
    path = run.path / "stages" / "grow-32.json"
    record = json.loads(path.read_text())
    del record["inputs"]["retained_heads"]
    path.write_text(json.dumps(record))
    assert train(tiny_config(**changes), str(run.path), quiet=True).is_done("grow-32")  # finished ones stay as they are
    path.write_text(json.dumps({**record, "done": False}))
    with pytest.raises(ArtifactError, match="retained_heads was None, is 'trained'"):
        train(tiny_config(**changes), str(run.path), quiet=True)


def test_an_odd_octave_is_left_for_a_stage_of_its_own() -> None:
    config = tiny_config(size=64, grow__at_once=2)
    assert config.growth == [32, 64]
    assert (config.below(32), config.below(64)) == (8, 32)
    assert (octaves_of(config, 32), octaves_of(config, 64)) == ([0, 1], [2])
    assert tiny_config(size=64).growth == [16, 32, 64]
    assert tiny_config(size=8).growth == []


def test_settings_of_one_octave_do_not_depend_on_those_above() -> None:
    small = tiny_config(size=16, grow__blocks=[3], grow__heads=["zero"])
    large = tiny_config(size=32, grow__blocks=[3, 1], grow__heads=["zero", "skip_rgb"], grow__channels=[16, 8])
    assert octave_settings(small, 16) == octave_settings(large, 16)
    assert octave_settings(large, 16) != octave_settings(large, 32)
    plain = tiny_config(size=16, grow__num_blocks=3, grow__head_init="zero")
    assert octave_settings(plain, 16) == octave_settings(small, 16)
    assert octave_settings(tiny_config(size=32, grow__attention=16), 32) == octave_settings(tiny_config(size=32), 32)
    assert octave_settings(tiny_config(size=32, grow__attention=16), 16) != octave_settings(tiny_config(size=32), 16)


def test_each_octave_has_its_own_loss(run_as: Callable[..., RunFolder]) -> None:
    losses = [{"adversarial": 0.0}, {"adversarial": 0.1, "adversarial_from": 0.0, "updates": "separate"}]
    run = run_as(size=32, grow__octave_losses=losses)
    text = run.metrics.read_text().splitlines()
    first, second = ("".join(line for line in text if f'"{stage}"' in line) for stage in ("grow-16", "grow-32"))
    assert "discriminator" not in first
    assert "adversarial/adversarial" in second


def test_a_boundary_inside_the_base_trains_what_lies_behind_it_and_nothing_else(
    run_as: Callable[..., RunFolder], finished_run: RunFolder
) -> None:
    names = anatomy(load_generator(finished_run, 8).base).names()
    boundary = [name for name in names if name.startswith("decoder.")][-1]
    run = run_as(grow__train_from=boundary)
    lower, upper = load_generator(run, 8), load_generator(run, 16)
    context = context_of(run, grow__train_from=boundary)
    fresh = add_octave(context, lower, 16)
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    before, after = lower.state_dict(), upper.state_dict()
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert moved <= set(before) - frozen
    assert not torch.equal(lower(Z), upper(Z, resolution=8))  # the retained head reads what was trained
    assert isinstance(cache_inputs(context, fresh, open_latents(context), "x"), LatentInputs)


def test_a_generator_whose_frozen_levels_moved_is_not_written(finished_run: RunFolder) -> None:
    lower, upper = load_generator(finished_run, 8), load_generator(finished_run, 16)
    upper.freeze_below("top")
    check_frozen("grow-16", upper, lower, upper)
    with torch.no_grad():
        next(upper.octaves.parameters()).add_(1)  # trained: may move
        check_frozen("grow-16", upper, lower, upper)
        upper.base.conv_in.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(
        ArtifactError, match=r"grow-16. has changed 1 of \d+ frozen tensors, such as base.conv_in.weight"
    ):
        check_frozen("grow-16", upper, lower, upper)


def test_a_boundary_at_a_lower_level_trains_that_level_on_and_is_cached_below_it(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    changes = {"size": 32, "grow__train_from": "16"}
    context = context_of(RunFolder.open(tmp_path / "run"), **changes)
    generator = add_octave(context, load_generator(context.run, 16), 32)
    assert boundary_of(context.config, 32) == 16
    assert all(p.requires_grad for p in generator.octaves.parameters())
    assert not any(p.requires_grad for p in generator.base.parameters())
    inputs, plain = cache_inputs(context, generator, open_latents(context), "x"), LatentInputs(open_latents(context))
    assert isinstance(inputs, CachedInputs)
    rows, flips = torch.tensor([3, 17]), torch.tensor([False, True])
    _, condition = context.load(32, rows, flips)
    generator.eval()
    draws = StepRandom(0, 0, 2, slice(0, 2), "x")
    made = [
        i.generate(generator, tuple(t.float() for t in i.encoded(rows, flips, draws)), condition)
        for i in (inputs, plain)
    ]
    torch.testing.assert_close(made[0], made[1], atol=2e-2, rtol=0)  # kept in half precision
    fakes, fake_condition = inputs.prior(StepRandom(0, 0, 2, slice(0, 2), "x"), condition)
    assert inputs.generate(generator, tuple(t.float() for t in fakes), fake_condition).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("mode", ["copy", "zero"])
def test_a_level_can_start_otherwise_and_with_attention(run_as: Callable[..., RunFolder], mode: str) -> None:
    run = run_as(grow__head_init=mode, grow__attention=16, grow__use_rgb=False)
    level = load_generator(run, 16).octaves[0]
    assert level.config.head_init == mode
    assert level.from_rgb is None
    assert [bool((attention.out.weight != 0).any()) for attention in level.attentions] == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grow__head_init": "copy", "grow__channels": [24]}, "of width 16, but is 24 wide: its tensors would be left"),
        ({"size": 32, "grow__heads": ["skip_rgb", "copy"], "grow__channels": [16]}, "which only adds"),
        ({"grow__heads": ["coppy"]}, "Did you mean `copy`"),
        ({"grow__train_from": "12"}, "no level has that side"),
        ({"grow__at_once": 0}, "at_once must be >= 1"),
        (
            {"size": 32, "grow__at_once": 2, "grow__loss": {"pixel": 0.0, "feature": 0.0, "adaptive": False}},
            "from 8 to 32 px in one go, where the heads of the sizes between learn by reconstruction alone",
        ),
        ({"grow__blocks": [0]}, "one positive number per octave"),
    ],
)
def test_growth_that_cannot_start_is_refused_with_the_configuration(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_a_boundary_that_the_network_does_not_have_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `decoder"):
        train(tiny_config(grow__train_from="decoder.99"), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(("base", "size"), [(32, 256), (64, 512)])
@pytest.mark.parametrize("name", ["official", "pagoda"])
def test_the_large_presets_are_whole(name: str, base: int, size: int) -> None:
    config = preset_config(name, "photos", base=base, size=size)
    assert isinstance(config, RunConfig)
    assert config.grow.octave(0)["channels"] == 192
    losses = {s: config.grow.loss_of(config.sizes.index(s) - 1) for s in config.growth}
    if name == "official":
        assert config.distill.loss.adversarial == 0.2
        assert (losses[128].updates, losses[256].updates) == ("joint", "separate")
        assert [loss.reconstruction_judge for loss in losses.values()] == [0.5 if s >= 512 else 0.0 for s in losses]
        assert config.grow.head_of(0) == ("copy" if base == 64 else "zero")


def test_a_loss_is_chosen_by_name_and_changed_by_later_settings() -> None:
    config = tiny_config(size=32, distill__loss__adversarial=0.07, distill__loss="pagoda", grow__loss="official")
    assert config.distill.loss.adversarial == 0.07
    assert config.distill.loss.judge is not None
    assert config.grow.loss_of(1).stack.mixing
    with pytest.raises(ConfigError, match="Did you mean `official`"):
        tiny_config(distill__loss="oficial")
