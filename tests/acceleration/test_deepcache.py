"""DeepCache: its schedules, its cut, its agreement with the released package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_diffusers import UNETS
from tests.tiny_pipelines import (
    sample_text,
    stable_diffusion,
    stable_diffusion_control,
    stable_diffusion_image_to_image,
    text_inputs,
)

from pagoda.acceleration import DeepCache, accelerate, center_power, center_power_official
from pagoda.errors import ConfigError
from pagoda.networks import anatomy

GOLDEN = load_file(Path(__file__).parent / "golden" / "deepcache.safetensors")


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_outputs_are_those_of_the_released_package(name: str) -> None:
    branch, interval = (int(part.lstrip("branchitevl")) for part in name.split("-"))
    pipeline, inputs = stable_diffusion().to(torch.float64), text_inputs(dtype=torch.float64)
    plain = sample_text(pipeline, **inputs)
    with accelerate(pipeline, DeepCache(interval=interval, branch=branch)):
        found = sample_text(pipeline, **inputs)
    torch.testing.assert_close(found, GOLDEN[name], atol=1e-5, rtol=1e-5)
    assert float((GOLDEN[name] - plain).norm()) > 100 * float((found - GOLDEN[name]).norm())


def test_the_papers_center_power_schedule() -> None:
    assert center_power(50, 10, 15, 1.4) == [0, 5, 10, 13, 15, 19, 24, 29, 35, 42]


def test_what_the_official_code_computes_for_it() -> None:
    assert center_power_official(50, 10, 15, 1.4) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert center_power_official(50, 10, 10, 1.5) == [0, 4, 7, 10, 14, 19, 24, 30, 36, 43]


def test_schedules_by_name_and_by_hand() -> None:
    assert DeepCache(interval=3).lay_out(8).full == [0, 3, 6]
    official = DeepCache(interval=5, schedule="center_power_official", center=15)
    assert official.lay_out(50).full == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert DeepCache(interval=5, schedule="center_power").lay_out(50).full == center_power(50, 10, 15, 1.4)
    assert DeepCache(schedule=[0, 1, 5]).lay_out(8).full == [0, 1, 5]
    assert DeepCache(interval=1).lay_out(8).neutral


def test_power_one_is_uniform() -> None:
    assert center_power(40, 8, 13, 1.0) == list(range(0, 40, 5))


def test_a_window_leaves_the_steps_outside_full() -> None:
    layout = DeepCache(interval=4, start=0.4, end=0.8).lay_out(10)
    assert layout.full == [0, 1, 2, 3, 4, 8, 9]


def test_a_layout_prints_every_step_and_stream() -> None:
    text = str(DeepCache(interval=2, branch=1).lay_out(4))
    assert text.splitlines()[0] == "DeepCache(interval=2, branch=1), 4 steps"
    assert text.splitlines()[1].split() == ["step", "conditional", "unconditional", "computed"]
    assert text.splitlines()[3].split() == [
        "1",
        "reused",
        "reused",
        "skips",
        "0",
        "to",
        "1,",
        "decoder",
        "from",
        "branch",
        "1",
    ]


@pytest.mark.parametrize("name", list(UNETS))
def test_at_the_same_input_reuse_is_the_full_output_bit_for_bit(name: str) -> None:
    """Step 1 reuses what step 0 kept; with the same image, time and condition nothing may differ, at any branch."""
    case = UNETS[name]()
    expected = case.call()
    count = sum(part.startswith("decoder.") for part in anatomy(case.model).names())
    for branch in range(count):
        with accelerate(case.model, DeepCache(interval=2, branch=branch)) as run:
            found = [case.call() for _ in run.steps(4)]
        assert all(torch.equal(output, expected) for output in found), branch
        assert run.layout.counts() == {"full": 2, "reused": 2}


def test_only_the_layers_outside_of_the_branch_run() -> None:
    case = UNETS["text"]()
    parts, ran = anatomy(case.model), []
    for name in parts.names():
        for module in parts.part(name):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    count = sum(name.startswith("decoder.") for name in parts.names())
    for branch in range(count):
        with accelerate(case.model, DeepCache(interval=2, branch=branch)) as run:
            for index in run.steps(3):
                ran.clear()
                case.call()
                if index == 1:
                    encoder = {f"encoder.{k}" for k in range(branch)}
                    decoder = {f"decoder.{k}" for k in range(count - 1 - branch, count)}
                    assert set(ran) == {"stem", "head", *encoder, *decoder}


def test_one_feature_map_is_held_for_each_stream() -> None:
    pipeline = stable_diffusion()
    with accelerate(pipeline, DeepCache(interval=3)) as run:
        sample_text(pipeline)
    assert run.ledgers[0].bytes_held == 2 * 8 * 16 * 16 * 4  # both of guidance, 8 channels before skip 0


def test_image_to_image_starts_full_wherever_it_starts() -> None:
    pipeline = stable_diffusion_image_to_image(stable_diffusion())
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with accelerate(pipeline, DeepCache(interval=4)) as run:
        sample_text(pipeline, image=image, strength=0.7)
    assert len(run.layout) == 7
    assert [call.kind for call in run.ledgers[0].calls] == ["full", *["reused"] * 3, "full", *["reused"] * 2]


def test_control_residuals_reach_steps_that_reuse() -> None:
    pipeline = stable_diffusion_control(stable_diffusion())
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with accelerate(pipeline, DeepCache(interval=2)) as run:
        with_control = sample_text(pipeline, image=image, steps=4)
    assert (run.ledgers[0].control_runs, run.ledgers[0].control_reused) == (4, 0)
    with accelerate(pipeline, DeepCache(interval=2, control="full")) as run:
        kept = sample_text(pipeline, image=image, steps=4)
    assert (run.ledgers[0].control_runs, run.ledgers[0].control_reused) == (2, 2)
    with accelerate(pipeline, DeepCache(interval=2)):
        without = sample_text(pipeline, image=image, steps=4, controlnet_conditioning_scale=0.0)
    assert not torch.equal(with_control, without)
    assert not torch.equal(with_control, kept)
    # Residuals that are one step old are nearer to fresh ones than none at all.
    assert (kept - with_control).norm() < (without - with_control).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"branch": -1}, "branch must be >= 0, got -1"),
        ({"schedule": "uniforms"}, "unknown schedule 'uniforms'"),
        ({"schedule": [1, 2]}, "must rise strictly from 0"),
        ({"schedule": [0, 3, 3]}, "must rise strictly from 0"),
        ({"power": 0.9}, "power must be >= 1"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"control": "never"}, "control must be 'every' or 'full'"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepCache(**settings)


def test_too_few_steps_and_branches_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves one full step of 3"):
        DeepCache(interval=5).lay_out(3)
    with pytest.raises(ConfigError, match="the schedule has step 9"):
        DeepCache(schedule=[0, 9]).lay_out(9)
    with pytest.raises(ConfigError, match="center must lie within"):
        DeepCache(interval=2, schedule="center_power", center=30).lay_out(20)
    case = UNETS["text"]()
    with (
        pytest.raises(ConfigError, match="branch=9 is out of range: `UNet2DConditionModel` has branches 0 to 8"),
        accelerate(case.model, DeepCache(branch=9)),
    ):
        pass
