"""How a run tells others where it is: who caches, records or perturbs need not count network calls.

`solve` announces the beginning of a run, each step before it starts, each call of the denoiser within a step (Heun makes two), the
end of a step and of the run. A sampler with a loop of its own announces in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

_NAME = "_run_listeners"


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step."""

    sigmas: tuple[float, ...]
    """Levels that will be visited, the first and the last included."""
    calls_per_step: int
    """Calls of the denoiser in an ordinary step: 1, or 2 for Heun."""
    order: int
    """Order of the solver: above 1 a step depends on more than the estimate at its start."""

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return len(self.sigmas) - 1


class RunListener(Protocol):
    """What is told where a run is. Attached to a denoiser, or to one inside it, by `listening`."""

    def begin_run(self, start: RunStart, x: Tensor) -> None:
        """A run starts from the canonical state `x`."""

    def begin_step(self, index: int, x: Tensor) -> Tensor:
        """A step starts; returns the state that it shall start from, `x` itself if nothing is to be changed."""

    def begin_call(self, index: int, stage: int) -> None:
        """The denoiser is called: for the first time in this step (stage 0) or again."""

    def end_step(self, index: int, x: Tensor, denoised: Tensor, sigma: float) -> None:
        """A step is done: it started from `x` at `sigma`, where x_0 was estimated as `denoised`."""

    def end_run(self) -> None:
        """The run is over, by its end or by an exception."""


@contextlib.contextmanager
def listening(module: nn.Module, listener: RunListener) -> Iterator[None]:
    """Within the context, runs of `module`, or of a denoiser that holds it, are announced to `listener`."""
    present: list[RunListener] = module.__dict__.setdefault(_NAME, [])
    present.append(listener)
    try:
        yield
    finally:
        present.remove(listener)
        if not present:
            del module.__dict__[_NAME]


def listeners_of(denoiser: Any) -> Sequence[RunListener]:
    """Everybody who listens to a denoiser or to a module inside it, each once."""
    if not isinstance(denoiser, nn.Module):
        return ()
    found = [listener for module in denoiser.modules() for listener in module.__dict__.get(_NAME, ())]
    return list({id(listener): listener for listener in found}.values())
