"""Inversion that undoes sampling: each step is solved for the state from which the sampler's own step would have come.

An explicit solver run backwards is not the inverse of the same solver run forwards: on a coarse grid the two differ by the error of
both. Here the state x' at the next, higher level is the solution of S(x') = x, where S is the sampler's step back down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pagoda.diffusion.denoiser import per_sample
from pagoda.errors import ConfigError

if TYPE_CHECKING:
    from pagoda.diffusion.solvers import Solver


@dataclass(frozen=True)
class FixedPoint:
    """A one-step solver whose rising steps are solved exactly, up to what the iterations leave; falling steps are its own.

    Each iteration is y <- y + w (x - S(y)), mixed with the one before it as Anderson does with one vector, for each sample by
    itself. For a denoiser whose Jacobian lies between 0 and 1, that of S lies between r = sigma / sigma' and 1, and
    w = 2 / (1 + r) makes every iteration a contraction by (1 - r) / (1 + r) or better. The number of iterations is fixed, so that a
    latent does not depend on its batch.

    Args:
        inner: Euler or Heun: a solver that remembers earlier steps has no step of its own to be undone.
        iterations: Of each rising step; each costs as many calls as a step of `inner`.

    Raises:
        ConfigError: another solver, or no iteration.

    Source: fixed-point inversion as in Pan et al. 2023, arXiv:2309.04907; the mixing is that of Anderson 1965, Iterative procedures
    for nonlinear integral equations, with one vector. The relaxation is ours.
    """

    inner: Solver
    iterations: int = 6

    def __post_init__(self) -> None:
        from pagoda.diffusion.solvers import Euler, Heun

        if not isinstance(self.inner, Euler | Heun):
            raise ConfigError(f"a fixed-point solver undoes steps of Euler or Heun, got {type(self.inner).__name__}.")
        if self.iterations < 1:
            raise ConfigError(f"a fixed-point solver needs one iteration or more, got {self.iterations}.")

    @property
    def order(self) -> int:
        """That of the inner solver."""
        return self.inner.order

    @property
    def calls_per_step(self) -> int:
        """Of a falling step; a rising one makes (1 + iterations) times as many."""
        return self.inner.calls_per_step

    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        y, denoised = self.inner.step(denoise, x, sigma, sigma_next, {})
        if float(sigma_next) <= float(sigma):
            return y, denoised
        relaxation = 2 / (1 + float(sigma / sigma_next))
        before: tuple[Tensor, Tensor] | None = None
        for _ in range(self.iterations):
            residual = relaxation * (x - self.inner.step(denoise, y, sigma_next, sigma, {})[0])
            following = y + residual
            if before is not None:
                change = residual - before[1]
                # Where the last iteration changed nothing there is nothing to mix.
                length = change.flatten(1).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
                share = (residual * change).flatten(1).sum(1) / length
                following = following - per_sample(share, x) * (y - before[0] + change)
            before, y = (y, residual), following
        return y, denoised
