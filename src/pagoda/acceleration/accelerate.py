"""`accelerate`: put plans on a pipeline, a denoiser or a network, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.acceleration.accounting import Ledger
from pagoda.acceleration.clock import Clock, PipelineSource, SolverSource, replaced
from pagoda.acceleration.control import ControlRun
from pagoda.acceleration.network_run import NetworkRun
from pagoda.acceleration.plan import Layout, Plan, check_combination
from pagoda.acceleration.reading import Preconditioning
from pagoda.acceleration.saving import load_plans
from pagoda.acceleration.split import Compile
from pagoda.diffusion import Denoiser, listening
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork
from pagoda.networks.anatomy import ANATOMIES

_ACTIVE: weakref.WeakSet[Any] = weakref.WeakSet()
KINDS = tuple(ANATOMIES)


class Run:
    """What `accelerate` gives: the plan in action, and what it saved."""

    def __init__(self, clock: Clock, networks: Sequence[NetworkRun]) -> None:
        self._clock = clock
        self._networks = tuple(networks)

    @property
    def layout(self) -> Layout:
        """The layout of the run that is under way, or of the last one.

        Raises:
            ConfigError: nothing has run yet.
        """
        layout = self._networks[0].layout
        if layout is None:
            raise ConfigError("nothing has run yet; `plan.lay_out(num_steps)` shows a layout beforehand.")
        return layout

    @property
    def ledgers(self) -> list[Ledger]:
        """Costs of the last run, one for each network."""
        return [network.ledger for network in self._networks]

    @property
    def changes(self) -> list[float]:
        """With `watch=True`: mean squared change of the encoder's features from each step to the next, for `keys_by_change`."""
        return self._networks[0].changes

    def summary(self) -> str:
        """Of the last run: steps by kind, multiply-adds and seconds with what was saved of them, and the bytes held."""
        if self._networks[0].layout is None:
            return "nothing has run yet"
        return "\n\n".join(str(ledger) for ledger in self.ledgers)

    def steps(self, steps: int | Iterable[Any]) -> Iterator[Any]:
        """Announce the steps of a loop of your own: `for t in run.steps(timesteps): ...`.

        Args:
            steps: A number of steps, or what the network is given as time in each of them.

        Yields:
            Indices, or the times.

        Raises:
            ConfigError: from the plan, where it does not suit the number of steps.
        """
        items: Any = range(steps) if isinstance(steps, int) else steps
        if not isinstance(items, Tensor):
            items = list(items)
        self._clock.begin(len(items), calls_per_step=1, solver="a loop of your own", first_order=True)
        if not isinstance(steps, int):
            self._clock.time_of = lambda index: torch.as_tensor(items[index])
        try:
            for index, item in enumerate(items):
                self._clock.move(index)
                yield item
        finally:
            self._clock.end()

    def observe(self, prediction: Tensor) -> None:
        """Tell RAS the guided prediction (B, C, H, W) of a step in a loop of your own."""
        self._clock.observe(prediction)

    def change(self, state: Tensor, scale: float = 1.0, start_scale: float = 1.0) -> Tensor:
        """In a loop of your own: the state that the step's update shall start from (Faster Diffusion adds initial noise to it).

        Args:
            state: Before the update; that of the first step is remembered.
            scale: Size of a state of unit data at this step, 1 where states are kept at unit variance.
            start_scale: The same at the first step.
        """
        self._clock.scale_of = lambda index: start_scale if index == 0 and self._clock.index > 0 else scale
        return self._clock.change(state)


@contextlib.contextmanager
def accelerate(
    target: Any,
    *plans: Plan | str | Path,
    compile: Compile | None = None,
    differentiable: bool = False,
    watch: bool = False,
) -> Iterator[Run]:
    """Sample cheaper within a context; afterwards everything is as before, bit for bit.

        with pagoda.accelerate(pipe, DeepCache(interval=3)) as run:
            image = pipe("a pagoda at dawn").images[0]
        print(run.summary())

    Args:
        target: A diffusers pipeline, a `Denoiser` (whatever wraps it, too), or a network with an anatomy. Runs of a pipeline are followed
            by its scheduler, those of a denoiser by `pagoda.diffusion.solve` and `sample`; for a loop of your own see `Run.steps`.
        plans: One or several; or a file, or a model's folder, with what `pagoda accelerate tune` has chosen.
        compile: For compiled networks: `torch.compile`, or a partial of it. A network that is the result of
            `torch.compile(network)` is recognised, and its parts are compiled with its settings.
        differentiable: Keep the graphs of kept features, for gradients through a sampler. Not with RAS.
        watch: Measure how much the encoder's features change from step to step (`Run.changes`); it costs memory and time.

    Yields:
        The run, with `summary()`, `layout` and `ledgers`. Each run that starts within the context starts afresh.

    Raises:
        ConfigError: a target without a network that has an anatomy, plans that do not suit it or contradict each other, a target
            that is accelerated already.
    """
    chosen: list[Plan] = []
    for plan in plans:
        chosen += load_plans(plan) if isinstance(plan, str | Path) else [plan]
    check_combination(chosen)
    if differentiable and any(plan.name == "RAS" for plan in chosen):
        raise ConfigError("RAS writes keys and values in place and cannot be differentiated through.")
    clock = Clock()
    with contextlib.ExitStack() as stack:
        source = PipelineSource(clock, target) if is_pipeline(target) else None
        networks = []
        for owner, model in networks_of(target):
            if owner in _ACTIVE or model in _ACTIVE:
                raise ConfigError(
                    f"`{type(model).__name__}` is accelerated already; leave the first `with` block before entering another."
                )
            network = NetworkRun(
                model,
                chosen,
                clock,
                locate=None if source is None else source.locate,
                preconditioning=Preconditioning.of(model, within=target) if isinstance(target, Denoiser) else None,
                compile=_compiler(owner, model, compile),
                differentiable=differentiable,
                watch=watch,
            )
            networks.append(network)
            _ACTIVE.add(model)
            stack.callback(_ACTIVE.discard, model)
            stack.enter_context(replaced(owner, "forward", network))
        clock.followers.extend(networks)
        if source is not None:
            for control in controls_of(target):
                stack.enter_context(replaced(control, "forward", ControlRun(control, networks[0], clock)))
            stack.enter_context(source.attached())
        elif isinstance(target, Denoiser):
            stack.enter_context(listening(target, SolverSource(clock)))
        stack.callback(clock.end)
        yield Run(clock, networks)


def is_pipeline(target: Any) -> bool:
    """Whether something is a diffusers pipeline: it has components and a scheduler."""
    return not isinstance(target, nn.Module) and hasattr(target, "components") and hasattr(target, "scheduler")


def networks_of(target: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The networks with an anatomy in a target, each with the module that is called in its place (itself, or its compiled form).

    Raises:
        ConfigError: there is none; the message names what was found, and what has an anatomy.
    """
    if is_pipeline(target):
        candidates = [part for part in target.components.values() if isinstance(part, nn.Module)]
    elif isinstance(target, nn.Module):
        inner = target.model if isinstance(target, DiffusersNetwork) else target
        has = isinstance(getattr(inner, "_orig_mod", inner), KINDS)
        if getattr(target, "_orig_mod", None) is not None and not has:
            raise ConfigError(
                "compile the network inside the denoiser, not the denoiser: plans stand in for the network's forward."
            )
        candidates = [inner] if has else list(target.modules())
    else:
        candidates = []
    found = [(part, getattr(part, "_orig_mod", part)) for part in candidates]
    found = [(owner, model) for owner, model in found if isinstance(model, KINDS)]
    if not found:
        names = ", ".join(f"`{kind.__name__}`" for kind in KINDS)
        seen = sorted({f"`{type(part).__name__}`" for part in candidates}) if is_pipeline(target) else []
        holds = (
            f"{{}} holds {', '.join(seen)}, and none of them has an anatomy"
            if seen
            else "{} has no network with an anatomy"
        )
        raise ConfigError(f"{holds.format(f'`{type(target).__name__}`')}; these have: {names}.")
    return found


def controls_of(pipeline: Any) -> list[nn.Module]:
    """ControlNets of a pipeline."""
    control = pipeline.components.get("controlnet")
    return [control] if isinstance(control, nn.Module) else []


def _compiler(owner: nn.Module, model: nn.Module, given: Compile | None) -> Compile | None:
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            f"`{type(model).__name__}` was compiled in place; use `torch.compile(network)`, whose parts can be compiled one by one."
        )
    if given is not None:
        return given
    if owner is model:
        return None
    context: Compile = owner.dynamo_ctx  # type: ignore[assignment]
    return context
