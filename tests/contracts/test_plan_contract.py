"""What every plan keeps to, on every kind of network that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from tests.tiny_diffusers import NATIVE, NativeCase
from tests.tiny_pipelines import (
    class_dit,
    pixart_alpha,
    sample_3,
    sample_dit,
    sample_pixart,
    sample_text,
    stable_diffusion,
    stable_diffusion_3,
)
from torch import Tensor

import pagoda
from pagoda.acceleration import RAS, DeepCache, FasterDiffusion, Plan, lay_out, plan_from_dict, plan_to_dict
from pagoda.diffusion import (
    Condition,
    DPMSolver2M,
    EDMDenoiser,
    Euler,
    GuidedDenoiser,
    Heun,
    Solver,
    karras_sigmas,
    sample,
)
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork

STEPS = 6


@dataclass(frozen=True)
class PlanCase:
    """A plan, and its neutral setting."""

    plan: Plan
    neutral: Plan
    networks: tuple[str, ...]
    """Names of `tests.tiny_diffusers` that it takes."""


UNET_NAMES = ("text", "video", "motion")
TOKEN_NAMES = ("dit", "pixart", "sd3")
PLANS = {
    "deepcache": PlanCase(DeepCache(interval=3, branch=1), DeepCache(interval=1), UNET_NAMES),
    "faster": PlanCase(FasterDiffusion(keys=3), FasterDiffusion(keys=1), (*UNET_NAMES, *TOKEN_NAMES)),
    "faster-one-by-one": PlanCase(
        FasterDiffusion(keys=3, parallel=False), FasterDiffusion(keys=1, parallel=False), ("unet", "dit")
    ),
    "faster-output": PlanCase(
        FasterDiffusion(keys=3, propagate="output"), FasterDiffusion(keys=1, propagate="output"), ("text", "dit")
    ),
    "ras": PlanCase(RAS(start_step=2, reset_steps=(4,)), RAS(sample_ratio=1.0), TOKEN_NAMES),
}
Sampler = Callable[..., Tensor]
PIPELINES: dict[str, tuple[Callable[[], Any], Sampler, tuple[str, ...]]] = {
    "stable-diffusion": (
        stable_diffusion,
        sample_text,
        ("deepcache", "faster"),
    ),
    "stable-diffusion-heun": (
        lambda: stable_diffusion(HeunDiscreteScheduler()),
        sample_text,
        ("deepcache", "faster-one-by-one"),
    ),
    "stable-diffusion-3": (stable_diffusion_3, sample_3, ("faster", "ras")),
    "pixart": (pixart_alpha, sample_pixart, ("ras",)),
    "dit": (class_dit, sample_dit, ("faster-output", "ras")),
}


@pytest.fixture(params=list(PLANS))
def plan_case(request: pytest.FixtureRequest) -> PlanCase:
    return PLANS[request.param]


@pytest.fixture(params=[(plan, name) for plan, case in PLANS.items() for name in case.networks], ids="-".join)
def on_network(request: pytest.FixtureRequest) -> tuple[PlanCase, NativeCase]:
    plan, name = request.param
    return PLANS[plan], NATIVE[name]()


@pytest.fixture(params=[(name, plan) for name, (_, _, plans) in PIPELINES.items() for plan in plans], ids="-".join)
def in_pipeline(request: pytest.FixtureRequest) -> tuple[Any, Sampler, PlanCase]:
    name, plan = request.param
    make, sampler, _ = PIPELINES[name]
    return make(), sampler, PLANS[plan]


def loop(
    case: NativeCase, run: Any = None, *, steps: int = STEPS, rows: slice = slice(None), split: bool = False
) -> Tensor:
    """Gradient-like steps by a network; `split`: each sample in a call of its own."""
    x, arguments = case.sample[rows], {name: pick(value, case, rows) for name, value in case.arguments.items()}
    given = torch.as_tensor(arguments["timestep"])
    times = torch.linspace(990, 10, steps).long()
    for time in times if run is None else run.steps(times):
        now = time if given.ndim == 0 else time.expand(given.shape).to(given.dtype)
        changes = {case.sample_name: x, "timestep": now}
        outputs = []
        for part in range(len(x)) if split else [None]:
            single = arguments | changes
            if part is not None:
                single = {name: pick(value, case, slice(part, part + 1)) for name, value in single.items()}
            outputs.append(case.model(**single, return_dict=False)[0])
        prediction = torch.cat(outputs)[:, : x.shape[1]]
        if run is not None:
            run.observe(prediction)
            x = run.change(x)
        x = x - 0.2 * prediction
    return x


def pick(value: Any, case: NativeCase, rows: slice) -> Any:
    """Rows of a batch argument; video text has one row a frame."""
    if isinstance(value, dict):
        return {name: pick(item, case, rows) for name, item in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    frames = len(value) // len(case.sample) if len(value) > len(case.sample) else 1
    start, stop, _ = rows.indices(len(value) // frames)
    return value[start * frames : stop * frames]


def test_a_layout_is_pure_and_starts_with_a_full_step(plan_case: PlanCase) -> None:
    for steps in (STEPS, 20, 50):
        layout = plan_case.plan.lay_out(steps)
        assert layout == plan_case.plan.lay_out(steps)
        assert len(layout) == steps
        assert [step.index for step in layout.steps] == list(range(steps))
        assert layout[0].kind == "full"
        assert sum(layout.counts().values()) == steps
        assert not layout.neutral
        assert plan_case.neutral.lay_out(steps).neutral
        assert len(str(layout).splitlines()) == steps + 2


def test_every_batched_step_has_one_step_that_computes_it(plan_case: PlanCase) -> None:
    layout = plan_case.plan.lay_out(50)
    computed = [later for step in layout.steps for later in step.decodes[1:]]
    assert computed == [step.index for step in layout.steps if step.kind == "batched"]


def test_settings_come_back_from_json(plan_case: PlanCase) -> None:
    assert plan_from_dict(plan_to_dict(plan_case.plan)) == plan_case.plan


@torch.no_grad()
def test_the_neutral_setting_is_the_plain_run_bit_for_bit(on_network: tuple[PlanCase, NativeCase]) -> None:
    plans, case = on_network
    plain = loop(case)
    with pagoda.accelerate(case.model, plans.neutral) as run:
        assert torch.equal(loop(case, run), plain)
    assert run.ledgers[0].bytes_held == 0


@torch.no_grad()
def test_at_the_same_input_reuse_gives_the_full_output(on_network: tuple[PlanCase, NativeCase]) -> None:
    plans, case = on_network
    expected = case.call()
    with pagoda.accelerate(case.model, plans.plan) as run:
        times = [case.arguments["timestep"]] * STEPS
        for number, _ in enumerate(run.steps(times)):
            found = case.call()
            run.observe(expected[:, : case.sample.shape[1]])
            # Several decoders in one batch move the last bits.
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5, msg=f"step {number}")
    assert not run.layout.neutral


@torch.no_grad()
def test_streams_in_calls_of_their_own_are_what_they_are_in_one_batch(
    on_network: tuple[PlanCase, NativeCase],
) -> None:
    plans, case = on_network
    if isinstance(plans.plan, RAS):
        return  # tokens are chosen for all samples of a call
    with pagoda.accelerate(case.model, plans.plan) as run:
        together = loop(case, run)
        apart = loop(case, run, split=True)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_pipeline_is_cheaper_within_and_untouched_after(in_pipeline: tuple[Any, Sampler, PlanCase]) -> None:
    pipeline, sampler, plans = in_pipeline
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    plain = sampler(pipeline, steps=STEPS)
    before = (set(network.__dict__), set(pipeline.scheduler.__dict__))
    with pagoda.accelerate(pipeline, plans.plan) as run:
        fast = sampler(pipeline, steps=STEPS)
        assert torch.equal(sampler(pipeline, steps=STEPS), fast)  # a run starts afresh
    facts = run.ledgers[0].facts()
    assert sum(facts["steps"].values()) == STEPS
    assert 0.05 < facts["multiply_adds_saved"] < 0.95
    assert facts["forced"] == 0
    assert facts["bytes_held"] > 0
    assert not torch.equal(fast, plain)
    assert torch.equal(sampler(pipeline, steps=STEPS), plain)
    assert (set(network.__dict__), set(pipeline.scheduler.__dict__)) == before
    assert "saved" in run.summary()


@torch.no_grad()
def test_runs_of_other_sizes_and_batches_leave_no_trace(on_network: tuple[PlanCase, NativeCase]) -> None:
    plans, case = on_network
    with pagoda.accelerate(case.model, plans.plan) as run:
        together = loop(case, run)
        single = torch.cat([loop(case, run, rows=slice(k, k + 1)) for k in range(len(case.sample))])
        assert torch.equal(loop(case, run), together)
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "plan"), [("stable-diffusion", "deepcache"), ("stable-diffusion", "faster"), ("stable-diffusion-3", "ras")]
)
def test_an_exception_in_the_middle_of_a_run_undoes_everything(name: str, plan: str) -> None:
    make, sampler, _ = PIPELINES[name]
    pipeline = make()
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    plain, before, calls = sampler(pipeline, steps=STEPS), set(network.__dict__), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("planted")

    handle = network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), pagoda.accelerate(pipeline, PLANS[plan].plan):
        sampler(pipeline, steps=STEPS)
    handle.remove()
    assert set(network.__dict__) == before
    assert "step" not in pipeline.scheduler.__dict__
    assert torch.equal(sampler(pipeline, steps=STEPS), plain)
    # The same within one context: the run that was left in the middle is forgotten.
    with pagoda.accelerate(pipeline, PLANS[plan].plan):
        fresh = sampler(pipeline, steps=STEPS)
        calls.clear()
        handle = network.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            sampler(pipeline, steps=STEPS)
        handle.remove()
        assert torch.equal(sampler(pipeline, steps=STEPS), fresh)


@torch.no_grad()
def test_entering_twice_is_refused(plan_case: PlanCase) -> None:
    case = NATIVE[plan_case.networks[0]]()
    with (
        pagoda.accelerate(case.model, plan_case.plan),
        pytest.raises(ConfigError, match="is accelerated already"),
        pagoda.accelerate(case.model, plan_case.plan),
    ):
        pass
    with pagoda.accelerate(case.model, plan_case.plan):
        pass


@pytest.mark.parametrize(
    ("plan", "name"), [("deepcache", "dit"), ("deepcache", "sd3"), ("ras", "text"), ("ras", "unet")]
)
def test_networks_that_it_does_not_take_are_named(plan: str, name: str) -> None:
    model = NATIVE[name]().model
    with pytest.raises(ConfigError, match=type(model).__name__), pagoda.accelerate(model, PLANS[plan].plan):
        pass
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_a_call_outside_of_a_run_is_refused(plan_case: PlanCase) -> None:
    case = NATIVE[plan_case.networks[0]]()
    with (
        pagoda.accelerate(case.model, plan_case.plan),
        pytest.raises(ConfigError, match="nobody has said in which step"),
    ):
        case.call()


def test_gradients_are_refused_unless_asked_for(plan_case: PlanCase) -> None:
    case = NATIVE[plan_case.networks[0]]()
    case.model.requires_grad_(True)
    with pagoda.accelerate(case.model, plan_case.plan) as run, pytest.raises(ConfigError, match="differentiable=True"):
        for _ in run.steps(STEPS):
            case.call()


def test_the_same_plan_twice_is_refused(plan_case: PlanCase) -> None:
    with pytest.raises(ConfigError, match=f"{plan_case.plan.name} was given twice"):
        lay_out([plan_case.plan, plan_case.plan], STEPS)


def our_denoiser(name: str) -> tuple[GuidedDenoiser, Condition, Tensor]:
    case = NATIVE[name]()
    network = DiffusersNetwork(case.model)
    inner = EDMDenoiser(network, noise_scale=25.0)
    channels = int(case.model.config.in_channels)
    z = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return GuidedDenoiser(inner, 2.0), Condition.of_labels([1, 3]), z


OURS = [
    ("unet", "deepcache", Heun()),
    ("unet", "deepcache", Euler()),
    ("unet", "deepcache", DPMSolver2M()),
    ("unet", "faster", Euler()),
    ("unet", "faster", DPMSolver2M()),
    ("unet", "faster-one-by-one", Heun()),
    ("dit", "ras", Euler()),
    ("dit", "faster", Euler()),
    ("dit", "faster-output", Heun()),
]


@torch.no_grad()
@pytest.mark.parametrize(("network", "plan", "solver"), OURS)
def test_our_own_samplers_run_under_it(network: str, plan: str, solver: Solver) -> None:
    denoiser, condition, z = our_denoiser(network)
    sigmas = torch.cat([karras_sigmas(STEPS), torch.zeros(1, dtype=torch.float64)])
    plain = sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver)
    plans = PLANS[plan]
    with pagoda.accelerate(denoiser, plans.neutral):
        assert torch.equal(sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver), plain)
    with pagoda.accelerate(denoiser.inner, plans.plan) as run:  # a denoiser inside of the one that is sampled from
        fast = sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver)
        assert torch.equal(sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver), fast)
    assert len(run.layout) == STEPS
    assert run.ledgers[0].facts()["forced"] == 0
    assert not torch.equal(fast, plain)
    assert torch.equal(sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver), plain)
    assert not [name for module in denoiser.modules() for name in module.__dict__ if "listener" in name]


@torch.no_grad()
@pytest.mark.parametrize(("network", "plan"), [("unet", "deepcache"), ("unet", "faster"), ("dit", "faster-output")])
def test_guidance_that_starts_in_the_middle_is_computed_in_full(network: str, plan: str) -> None:
    """With another batch nothing that was kept fits; such a step is full, and the summary says so."""
    denoiser, condition, z = our_denoiser(network)
    denoiser = GuidedDenoiser(denoiser.inner, 2.0, interval=(0.0, 0.8))
    sigmas = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02])
    with pagoda.accelerate(denoiser, PLANS[plan].plan) as run:
        fast = sample(denoiser, z, sigmas=sigmas, condition=condition, solver=Euler())
    assert bool(fast.isfinite().all())
    assert run.ledgers[0].facts()["forced"] >= 1
    assert "because shapes had changed" in run.summary()


@torch.no_grad()
@pytest.mark.parametrize(("plan", "name"), [("deepcache", "unet"), ("faster", "dit"), ("ras", "sd3")])
def test_compiled_networks_run_under_it(plan: str, name: str) -> None:
    case = NATIVE[name]()
    with pagoda.accelerate(case.model, PLANS[plan].plan) as run:
        expected = loop(case, run, steps=5)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="eager")
    wrapped = NativeCase(compiled, case.arguments)
    with pagoda.accelerate(compiled, PLANS[plan].plan) as run:
        found = loop(wrapped, run, steps=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert "not counted (compiled network)" in run.summary()
    assert "_orig_mod" in compiled.__dict__["_modules"]


def test_denoisers_and_networks_that_are_compiled_elsewhere_are_refused() -> None:
    denoiser, _, _ = our_denoiser("unet")
    with (
        pytest.raises(ConfigError, match="compile the network inside"),
        pagoda.accelerate(torch.compile(denoiser, backend="eager"), DeepCache()),
    ):
        pass
    case = NATIVE["unet"]()
    case.model.compile(backend="eager")
    with pytest.raises(ConfigError, match="was compiled in place"), pagoda.accelerate(case.model, DeepCache()):
        pass


def test_gradients_flow_through_what_was_kept() -> None:
    """The last step reuses what the first one kept, so the first input has a gradient."""
    case = NATIVE["text"]()
    first = case.sample.clone().requires_grad_(True)
    with pagoda.accelerate(case.model, DeepCache(interval=2), differentiable=True) as run:
        outputs = [
            case.model(**{**case.arguments, "sample": first if index == 0 else case.sample}, return_dict=False)[0]
            for index in run.steps(3)
        ]
    (gradient,) = torch.autograd.grad(outputs[1].square().sum(), first)
    assert gradient.abs().sum() > 0
