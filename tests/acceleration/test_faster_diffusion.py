"""Faster Diffusion: groups, decoders in one batch, injection, composition with DeepCache."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from tests.tiny_diffusers import NATIVE
from tests.tiny_pipelines import sample_text, stable_diffusion, stable_diffusion_control
from torch import Tensor

import pagoda
from pagoda.acceleration import RAS, DeepCache, FasterDiffusion, keys_by_change, lay_out
from pagoda.diffusion import EDMDenoiser, Euler, Step, karras_sigmas, sample, solve
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork

PLAIN = FasterDiffusion(inject_scale=0.0)


def test_the_papers_keys_and_groups() -> None:
    layout = PLAIN.lay_out(50)
    assert layout.full == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert [max(1, len(layout[key].decodes)) for key in layout.full] == [1, 1, 1, 2, 5, 5, 10, 10, 15]
    assert PLAIN.lay_out(20).full == [0, 1, 2, 3, 5, 10, 15]
    assert PLAIN.lay_out(100).full == [0, 2, 4, 6, 10, 20, 30, 50, 70]


def test_named_keys() -> None:
    assert FasterDiffusion(keys="progressive").lay_out(30).full == [0, 2, 5, 9, 14, 20, 27]
    stage_1 = FasterDiffusion(keys="if_stage_1").lay_out(100).full
    assert stage_1 == [k for k in range(100) if k > 85 or k < 10 or k % 5 == 0]
    assert FasterDiffusion(keys=4).lay_out(10).full == [0, 4, 8]
    assert FasterDiffusion(keys=[0, 1, 7]).lay_out(10).full == [0, 1, 7]


@pytest.mark.parametrize("keys", ["paper", 3, [0, 4, 5]])
@pytest.mark.parametrize("cap", [None, 1, 2, 4])
def test_groups_cut_the_run_into_pieces_that_start_with_their_key(keys: object, cap: int | None) -> None:
    plan = FasterDiffusion(keys=keys, max_parallel=cap)
    layout = plan.lay_out(20)
    found: list[int] = []
    for step in layout.steps:
        if step.kind != "batched":
            group = step.decodes or (step.index,)
            assert group[0] == step.index
            assert cap is None or len(group) <= cap
            found += group
    assert found == list(range(20))
    assert layout.full == plan.key_steps(20)


@torch.no_grad()
@pytest.mark.parametrize("cap", [1, 2, None])
@pytest.mark.parametrize("inject", [0.0, 0.05])
def test_decoders_in_one_batch_give_what_they_give_one_by_one(cap: int | None, inject: float) -> None:
    pipeline = stable_diffusion()
    with pagoda.accelerate(pipeline, FasterDiffusion(keys=4, parallel=False, inject_scale=inject)):
        one_by_one = sample_text(pipeline, batch=2)
    with pagoda.accelerate(pipeline, FasterDiffusion(keys=4, max_parallel=cap, inject_scale=inject)):
        together = sample_text(pipeline, batch=2)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_predictions_between_keys_do_not_depend_on_the_image() -> None:
    case = NATIVE["text"]()
    other = {**case.arguments, "sample": case.sample + 1}
    with pagoda.accelerate(case.model, FasterDiffusion(keys=2, parallel=False)) as run:
        for index in run.steps(2):
            first = case.call() if index == 0 else case.model(**other, return_dict=False)[0]
    assert torch.equal(first, case.call())
    assert not torch.equal(first, case.model(**other, return_dict=False)[0])


@torch.no_grad()
def test_injection_adds_initial_noise_to_late_states_at_their_scale() -> None:
    """On a pipeline whose network gives nothing but its input's zero, the update is linear and can be done by hand."""
    for scheduler, size in ((DDIMScheduler(clip_sample=False), None), (EulerDiscreteScheduler(), "sigma")):
        states: list[Tensor] = []
        pipeline = stable_diffusion(scheduler)
        original = scheduler.step

        def recording(output: Tensor, t: Tensor, state: Tensor, *args: object, **kwargs: object) -> object:
            states.append(state)  # noqa: B023
            return original(output, t, state, *args, **kwargs)  # noqa: B023

        scheduler.step = recording
        with pagoda.accelerate(pipeline, FasterDiffusion(keys=2, inject_scale=0.1, inject_from=0.5)):
            sample_text(pipeline, steps=4)
        injected = list(states)
        states.clear()
        with pagoda.accelerate(pipeline, FasterDiffusion(keys=2, inject_scale=0.0)):
            sample_text(pipeline, steps=4)
        assert torch.equal(injected[0], states[0])
        assert torch.equal(injected[1], states[1])
        scale = 1.0
        if size == "sigma":
            sigmas = scheduler.sigmas.double()
            scale = float(((1 + sigmas[2] ** 2) / (1 + sigmas[0] ** 2)).sqrt())
        torch.testing.assert_close(injected[2] - states[2], 0.1 * scale * states[0], atol=1e-4, rtol=1e-4)
        del scheduler.step


@torch.no_grad()
def test_our_solvers_get_the_noise_at_the_scale_of_their_states() -> None:
    denoiser = EDMDenoiser(DiffusersNetwork(NATIVE["dit"]().model), noise_scale=25.0)
    z, sigmas = torch.randn(1, 4, 16, 16), karras_sigmas(5)
    states: dict[float, list[Tensor]] = {}
    for scale in (0.0, 0.1):
        seen = states.setdefault(scale, [])
        plan = FasterDiffusion(keys=[0, 3], inject_scale=scale, inject_from=0.75, propagate="output")
        with pagoda.accelerate(denoiser, plan):
            sample(
                denoiser, z, sigmas=sigmas, solver=Euler(), callback=lambda step, seen=seen: seen.append(step.denoised)
            )
    assert all(torch.equal(a, b) for a, b in zip(states[0.0][:3], states[0.1][:3], strict=True))
    assert not torch.equal(states[0.0][3], states[0.1][3])


@torch.no_grad()
def test_outputs_that_are_kept_mean_the_same_image_at_every_noise_level() -> None:
    denoiser = EDMDenoiser(DiffusersNetwork(NATIVE["unet"]().model), noise_scale=25.0)
    z = torch.randn(2, denoiser.network.model.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    steps: list[Step] = []
    with pagoda.accelerate(denoiser, FasterDiffusion(keys=[0, 3], propagate="output", inject_scale=0.0)):
        solve(denoiser, 20 * z, [20.0, 9.0, 4.0, 2.0, 1.0, 0.5, 0.2], solver=Euler(), callback=steps.append)
    for group in ((0, 1, 2), (3, 4, 5)):
        first, *others = (steps[index].denoised for index in group)
        for other in others:
            torch.testing.assert_close(other, first, atol=2e-5, rtol=0)
    assert not torch.allclose(steps[0].denoised, steps[3].denoised, atol=1e-2)


@torch.no_grad()
def test_encoder_and_control_net_run_at_key_steps_only() -> None:
    pipeline = stable_diffusion_control(stable_diffusion())
    ran: list[str] = []
    pipeline.unet.conv_in.register_forward_hook(lambda *_: ran.append("stem"))
    pipeline.unet.mid_block.register_forward_hook(lambda *_: ran.append("middle"))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pagoda.accelerate(pipeline, FasterDiffusion(keys=3)) as run:
        sample_text(pipeline, image=image, steps=7)
    assert ran == ["stem", "middle"] * 3
    assert (run.ledgers[0].control_runs, run.ledgers[0].control_reused) == (3, 4)


def test_keys_are_spread_by_measured_change() -> None:
    assert keys_by_change([1.0] * 9, 5) == [0, 2, 4, 6, 8]
    assert keys_by_change([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125], 4) == [0, 1, 2, 3]
    assert keys_by_change([0.0] * 5, 3)[0] == 0
    for count in range(1, 11):
        keys = keys_by_change([0.5**k for k in range(9)], count)
        assert len(keys) == len(set(keys)) == count
        assert keys == sorted(keys)
        FasterDiffusion(keys=keys).lay_out(10)
    with pytest.raises(ConfigError, match="must lie in 1 to 4"):
        keys_by_change([1.0] * 3, 5)


@torch.no_grad()
def test_change_is_measured_without_changing_the_run() -> None:
    pipeline = stable_diffusion()
    plain = sample_text(pipeline, steps=6)
    with pagoda.accelerate(pipeline, DeepCache(interval=1), watch=True) as run:
        assert torch.equal(sample_text(pipeline, steps=6), plain)
    assert len(run.changes) == 5
    assert all(change > 0 for change in run.changes)


@torch.no_grad()
def test_it_combines_with_deepcache() -> None:
    """Key steps compute the outer skips, the others none, and decoders enter at the branch."""
    plans = [FasterDiffusion(keys=2, parallel=False), DeepCache(interval=4, branch=1)]
    layout = lay_out(plans, 8)
    assert [(step.kind, step.skips, step.branch) for step in layout.steps[:5]] == [
        ("full", None, None),
        ("reused", 0, 1),
        ("reused", 2, 1),
        ("reused", 0, 1),
        ("full", None, None),
    ]
    assert layout.steps == lay_out(plans[::-1], 8).steps
    case = NATIVE["text"]()
    expected = case.call()
    with pagoda.accelerate(case.model, *plans) as run:
        outputs = [case.call() for _ in run.steps(8)]
    assert all(torch.equal(output, expected) for output in outputs)
    saved = {}
    pipeline = stable_diffusion()
    for name, chosen in (("both", plans), ("faster", plans[:1]), ("deepcache", plans[1:])):
        with pagoda.accelerate(pipeline, *chosen) as run:
            sample_text(pipeline, steps=8)
        saved[name] = run.ledgers[0].facts()["multiply_adds_saved"]
    assert saved["both"] > max(saved["faster"], saved["deepcache"])


def test_plans_that_contradict_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="DeepCache does not combine with decoders in one batch"):
        lay_out([FasterDiffusion(), DeepCache()], 20)
    with pytest.raises(ConfigError, match="propagate='output'"):
        lay_out([FasterDiffusion(propagate="output"), DeepCache()], 20)
    with pytest.raises(ConfigError, match="RAS does not combine with FasterDiffusion"):
        lay_out([RAS(), FasterDiffusion()], 20)
    with pytest.raises(ConfigError, match="no plan was given"):
        lay_out([], 20)
    with pytest.raises(ConfigError, match="is no plan"), pagoda.accelerate(NATIVE["text"]().model, 3):
        pass


@torch.no_grad()
def test_solvers_with_two_calls_a_step_are_refused_in_parallel() -> None:
    pipeline = stable_diffusion(HeunDiscreteScheduler())
    with (
        pagoda.accelerate(pipeline, FasterDiffusion()),
        pytest.raises(ConfigError, match="HeunDiscreteScheduler makes 2; use parallel=False"),
    ):
        sample_text(pipeline)


@torch.no_grad()
def test_times_of_steps_to_come_have_to_be_known() -> None:
    case = NATIVE["text"]()
    with (
        pagoda.accelerate(case.model, FasterDiffusion(keys=2)) as run,
        pytest.raises(ConfigError, match="announce the run by its timesteps"),
    ):
        for _ in run.steps(4):
            case.call()


@torch.no_grad()
def test_a_sampler_that_goes_elsewhere_than_it_said_is_refused() -> None:
    case = NATIVE["text"]()
    with (
        pagoda.accelerate(case.model, FasterDiffusion(keys=2)) as run,
        pytest.raises(ConfigError, match="was computed beforehand for time 3, the network is called at 4"),
    ):
        for time in run.steps(torch.tensor([9, 3, 2])):
            case.call(timestep=time if time == 9 else time + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": "papers"}, "unknown keys 'papers'"),
        ({"keys": 0}, "keys must be >= 1"),
        ({"keys": [1, 2]}, "must rise strictly from 0"),
        ({"max_parallel": 0}, "max_parallel must be >= 1"),
        ({"inject_scale": -1.0}, "inject_scale >= 0"),
        ({"cut": 0}, "cut must be >= 1"),
        ({"propagate": "decoder"}, "propagate must be one of encoder, output"),
        ({"control": "never"}, "control must be one of full, every"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FasterDiffusion(**settings)


def test_keys_beyond_the_run_and_cuts_beyond_the_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="keys have step 9"):
        FasterDiffusion(keys=[0, 9]).lay_out(9)
    with (
        pytest.raises(ConfigError, match="cut=4 leaves no decoder"),
        pagoda.accelerate(NATIVE["dit"]().model, FasterDiffusion(cut=4)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="`cut` is for transformers"),
        pagoda.accelerate(NATIVE["text"]().model, FasterDiffusion(cut=4)),
    ):
        pass
