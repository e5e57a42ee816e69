"""Where a run is: which step, which of its calls, of how many. Told by the scheduler of a diffusers pipeline, by our solvers, or by hand.

Nothing is counted by calls of the network, which guidance and second-order solvers make several of in one step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pagoda.diffusion import RunStart
from pagoda.errors import ConfigError


class Follower(Protocol):
    """Who acts on the clock."""

    def begin(self, clock: Clock) -> None:
        """A run begins; its number of steps is known."""

    def observe(self, clock: Clock, prediction: Tensor) -> None:
        """The (guided) prediction of a step is there, (B, C, H, W), in whatever parametrisation."""

    def change(self, clock: Clock, state: Tensor) -> Tensor:
        """Returns the state that the step's update shall start from, `state` itself if nothing is to be changed."""

    def end(self) -> None:
        """The run is over."""


@dataclass
class Clock:
    """The place in a run."""

    followers: list[Follower] = field(default_factory=list)
    num_steps: int = 0
    index: int = 0
    stage: int = 0
    """Call within the step: 0, and 1 in the second half of a Heun step."""
    calls_per_step: int = 1
    solver: str = ""
    """Name of the solver or scheduler, for messages."""
    first_order: bool = True
    """Whether a step depends on the prediction at its start alone."""
    running: bool = False
    tick: int = 0
    """Changes whenever step or stage does."""
    start_state: Tensor | None = None
    """The state that the run started from."""
    scale_of: Callable[[int], float] | None = None
    """Size of a state of unit data and noise of the step's level: 1 where states are kept at unit variance."""
    time_of: Callable[[int], Tensor] | None = None
    """The time input of the network at a step to come, one number; None where it is not known beforehand."""
    sigma_of: Callable[[int], float] | None = None
    """The noise level that a step starts from, where a solver of ours with one call a step says it."""

    def begin(self, num_steps: int, *, calls_per_step: int, solver: str, first_order: bool) -> None:
        """Start a run; one that was left in the middle is forgotten."""
        self.end()
        self.num_steps, self.index, self.stage, self.tick = num_steps, 0, 0, self.tick + 1
        self.calls_per_step, self.solver, self.first_order = calls_per_step, solver, first_order
        self.running = True
        for follower in self.followers:
            follower.begin(self)

    def move(self, index: int, stage: int = 0) -> None:
        """Go to a step and to a call within it."""
        self.index, self.stage, self.tick = index, stage, self.tick + 1

    def observe(self, prediction: Tensor) -> None:
        """Let everybody see the prediction of a step."""
        for follower in self.followers:
            follower.observe(self, prediction)

    def change(self, state: Tensor) -> Tensor:
        """The state as everybody wants it for the step's update."""
        if self.start_state is None:
            self.start_state = state
        for follower in self.followers:
            state = follower.change(self, state)
        return state

    def end(self) -> None:
        """The run is over; features that were kept for it are let go."""
        if self.running:
            self.running, self.start_state = False, None
            self.time_of, self.scale_of, self.sigma_of = None, None, None
            for follower in self.followers:
                follower.end()


class SolverSource:
    """Listens to `diffusion.solve` (see `diffusion.listening`)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def begin_run(self, start: RunStart, x: Tensor) -> None:
        """Lay the plan out."""
        clock, name = self._clock, f"a solver of order {start.order} with {start.calls_per_step} calls a step"
        clock.begin(start.num_steps, calls_per_step=start.calls_per_step, solver=name, first_order=start.order == 1)
        clock.start_state, clock.scale_of = x, lambda index: math.hypot(1.0, start.sigmas[index])
        if start.calls_per_step == 1:
            clock.sigma_of = lambda index: start.sigmas[index]

    def begin_step(self, index: int, x: Tensor) -> Tensor:
        """Noise is added before the step: its first call sees it."""
        self._clock.move(index)
        return self._clock.change(x)

    def begin_call(self, index: int, stage: int) -> None:
        """Heun calls twice."""
        self._clock.move(index, stage)

    def end_step(self, index: int, x: Tensor, denoised: Tensor, sigma: float) -> None:
        """The prediction is the direction of the step, (x - D) / sigma."""
        self._clock.observe((x - denoised) / sigma)

    def end_run(self) -> None:
        """Let go."""
        self._clock.end()


class PipelineSource:
    """Reads the place in a run from a diffusers scheduler, whose `set_timesteps` and `step` it wraps while it is attached.

    A run begins with the first call of the network after `set_timesteps`, at the scheduler's begin index (image to image starts
    late), or at the first timestep that equals the call's.
    """

    def __init__(self, clock: Clock, pipeline: Any) -> None:
        self._clock = clock
        self._pipeline = pipeline
        self._scheduler = pipeline.scheduler
        self._pending = True
        self._first = 0
        self._calls = 0
        self._num_calls = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Wrap the scheduler's two methods, and put them back as they were."""
        scheduler = self._scheduler
        wrapped = self._set_timesteps(scheduler.set_timesteps), self._step(scheduler.step)
        with replaced(scheduler, "set_timesteps", wrapped[0]), replaced(scheduler, "step", wrapped[1]):
            yield

    def _set_timesteps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._clock.end()
            self._pending = True
            return original(*args, **kwargs)

        return set_timesteps

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            clock = self._clock
            if not clock.running:
                return original(model_output, timestep, sample, *args, **kwargs)
            if clock.stage == 0:
                clock.observe(model_output)
                sample = clock.change(sample)
            result = original(model_output, timestep, sample, *args, **kwargs)
            self._calls += 1
            if self._calls == self._num_calls:
                clock.end()
                self._pending = True
            else:
                clock.move(*divmod(self._calls, clock.calls_per_step))
            return result

        return step

    def _scale(self, place: int) -> float:
        sigmas = getattr(self._scheduler, "sigmas", None)
        # Schedulers that work on x_0 + sigma n say so by the size of their initial noise; the others keep states at unit size.
        if sigmas is None or float(getattr(self._scheduler, "init_noise_sigma", 1.0)) <= 1.0:
            return 1.0
        return math.hypot(1.0, float(sigmas[place]))

    def locate(self, timestep: Any) -> None:
        """Called before the network runs: begins a run where one is due.

        Raises:
            ConfigError: the pipeline's scheduler was exchanged, has no timesteps, or does not have this one.
        """
        scheduler, clock = self._pipeline.scheduler, self._clock
        if scheduler is not self._scheduler:
            raise ConfigError("the pipeline's scheduler was exchanged within `accelerate`; exchange it before.")
        timesteps = scheduler.timesteps
        if self._pending:
            if timesteps is None or len(timesteps) == 0:
                raise ConfigError("the scheduler has no timesteps; call its `set_timesteps` first.")
            self._first = first_place(scheduler, timestep)
            order = int(getattr(scheduler, "order", 1))
            self._calls, self._num_calls, self._pending = 0, len(timesteps) - self._first, False
            name = type(scheduler).__name__
            clock.begin(
                math.ceil(self._num_calls / order),
                calls_per_step=order,
                solver=name,
                first_order=name in FIRST_ORDER,
            )
            first = self._first
            clock.scale_of = lambda index: self._scale(first + index * order)
            if order == 1:
                clock.time_of = lambda index: timesteps[first + index]
        elif not torch.is_tensor(timestep) or timestep.device.type == "cpu":
            expected = timesteps[self._first + self._calls]
            found = torch.as_tensor(timestep).flatten()[0]
            if float(found) != float(expected):
                raise ConfigError(
                    f"the network was called at timestep {float(found):g}, the scheduler is at {float(expected):g}: every call of "
                    "the network must be followed by a step of the pipeline's scheduler."
                )


FIRST_ORDER = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
}
"""diffusers' schedulers whose step depends on the prediction at its start alone."""


def first_place(scheduler: Any, timestep: Any) -> int:
    """Place in the schedule of the first call of a run.

    Raises:
        ConfigError: the schedule does not have the timestep.
    """
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    found = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
    places = (scheduler.timesteps == found).nonzero()
    if len(places) == 0:
        raise ConfigError(
            f"the network was called at timestep {float(found):g}, which the scheduler does not have; call `set_timesteps` first."
        )
    return int(places[0])


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object is replaced, and put back as it was: set on the object, or not at all."""
    present = owner.__dict__.get(name, _ABSENT)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if present is _ABSENT:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = present


_ABSENT = object()
