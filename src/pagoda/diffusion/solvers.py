"""Solvers of the probability-flow ODE, written once against `Denoiser`, in both directions.

In the canonical state the ODE is dx/dsigma = (x - D(x; sigma)) / sigma. A run follows a grid of noise levels: falling levels make
images out of noise, rising levels carry images to their latents. Euler on this ODE *is* DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.diffusion.denoiser import Denoiser, per_sample
from pagoda.diffusion.fixed_point import FixedPoint
from pagoda.diffusion.listening import RunStart, listeners_of
from pagoda.errors import ConfigError, did_you_mean


def karras_sigmas(num_nodes: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, both included, (num_nodes,) float64, denser near the data.

    Raises:
        ConfigError: fewer than two nodes, or not 0 < sigma_min < sigma_max.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    if num_nodes < 2 or not 0 < sigma_min < sigma_max:
        raise ConfigError(
            f"a grid needs two nodes or more and 0 < sigma_min < sigma_max, got {num_nodes}, {sigma_min}, {sigma_max}."
        )
    ramp = torch.linspace(0, 1, num_nodes, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # exact ends: grids of the two directions must meet
    return sigmas


def suitable_sigmas(denoiser: Denoiser, num_nodes: int = 18) -> Tensor:
    """A falling grid for sampling, (num_nodes + 1,) float64: Karras nodes from 80 to 0.002, as far as the denoiser takes them, then 0."""
    low, high = denoiser.sigma_range
    grid = karras_sigmas(num_nodes, sigma_min=max(0.002, low), sigma_max=min(80.0, high))
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


def log_sigmas(num_nodes: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Noise levels equidistant in log sigma (equal steps of log-SNR), falling, (num_nodes,) float64."""
    if num_nodes < 2 or not 0 < sigma_min < sigma_max:
        raise ConfigError(
            f"a grid needs two nodes or more and 0 < sigma_min < sigma_max, got {num_nodes}, {sigma_min}, {sigma_max}."
        )
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    sigmas = torch.linspace(float(ends[0]), float(ends[1]), num_nodes, dtype=torch.float64).exp()
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


@dataclass(frozen=True)
class Step:
    """What a solver announces after each step of a run.

    `denoised` is the x_0 estimate that the step started from; `mean` is the deterministic result of the step and `std` the standard
    deviation of the noise that was added to it (0 for the ODE solvers here); `calls` counts network calls so far in the run.
    """

    index: int
    num_steps: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor
    mean: Tensor
    std: float
    calls: int


class Solver(Protocol):
    """One step of an ODE solver. `memory` is a run's own scratch space, empty at its first step."""

    @property
    def order(self) -> int:
        """Order of convergence: the error falls as the step to this power."""

    @property
    def calls_per_step(self) -> int:
        """Calls of the denoiser in a step that does not end at 0."""

    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Carry `x` from `sigma` to `sigma_next` (scalars, float64); returns (x_next, denoised at the start)."""


@dataclass(frozen=True)
class Euler:
    """First order, one call a step: DDIM (eta = 0). Source: Song et al. 2021, arXiv:2010.02502, eq. 13."""

    order: int = field(init=False, default=1)
    calls_per_step: int = field(init=False, default=1)

    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        denoised = denoise(x, sigma)
        ratio = float(sigma_next / sigma)
        return ratio * x + (1 - ratio) * denoised, denoised


@dataclass(frozen=True)
class Heun:
    """Second order, two calls a step, one for a step that ends at 0. Source: Karras et al. 2022, algorithm 1."""

    order: int = field(init=False, default=2)
    calls_per_step: int = field(init=False, default=2)

    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        denoised = denoise(x, sigma)
        slope = (x - denoised) / float(sigma)
        h = float(sigma_next - sigma)
        predicted = x + h * slope
        if float(sigma_next) == 0:
            return predicted, denoised
        slope_next = (predicted - denoise(predicted, sigma_next)) / float(sigma_next)
        return x + h * (slope + slope_next) / 2, denoised


@dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++(2M): second order in log-SNR, one call a step, remembers the last estimate.

    The first step, and a step that ends at sigma = 0, are first order. Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    order: int = field(init=False, default=2)
    calls_per_step: int = field(init=False, default=1)

    def step(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        denoised = denoise(x, sigma)
        ratio = float(sigma_next / sigma)
        blend = denoised
        if float(sigma_next) > 0:
            h = -(sigma_next / sigma).log()
            if memory:
                r = float(memory["h"] / h)
                blend = denoised + (denoised - memory["denoised"]) / (2 * r)
            memory.update(h=h, denoised=denoised)
        return ratio * x + (1 - ratio) * blend, denoised


SOLVERS: dict[str, Callable[[], Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "dpm2m": DPMSolver2M,
    "fixed_point": lambda: FixedPoint(Heun()),
}


def build_solver(name: str) -> Solver:
    """A solver by name: "euler", "heun", "dpm2m", or "fixed_point", which inverts what Heun's method samples.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver `{name}`. {did_you_mean(name, SOLVERS)}")
    return SOLVERS[name]()


def solve(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    condition: Condition = UNCONDITIONAL,
    solver: Solver | None = None,
    callback: Callable[[Step], None] | None = None,
    clip_denoised: bool = False,
) -> Tensor:
    """Follow the probability-flow ODE along a grid of noise levels; differentiable.

    Args:
        denoiser: The diffusion model.
        x: Canonical state at `sigmas[0]`, (B, C, H, W).
        sigmas: Levels to visit, monotone; start and end anywhere, the last may be 0. One level: nothing is done.
        condition: One row per sample, or nothing.
        solver: Heun when None.
        callback: Called after every step.
        clip_denoised: Clamp every x_0 estimate to [-1, 1]. The official PaGoDA inversion does; it makes the two
            directions slightly different maps.

    Returns:
        The state at `sigmas[-1]`, (B, C, H, W).

    Raises:
        ConfigError: the levels are not monotone, or negative, or 0 anywhere but at the end of a falling run.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    steps = levels.diff()
    if levels.ndim != 1 or len(levels) == 0 or not (bool((steps < 0).all()) or bool((steps > 0).all())):
        raise ConfigError(f"sigmas must rise or fall strictly, got {[round(s, 6) for s in levels.flatten().tolist()]}.")
    if bool((levels[:-1] <= 0).any()) or float(levels[-1]) < 0:
        raise ConfigError(
            f"sigma must be > 0 (only a falling run may end at 0), got a grid from {levels[0]:.4g} to {levels[-1]:.4g}."
        )
    chosen: Solver = Heun() if solver is None else solver
    listeners = listeners_of(denoiser)
    calls, index, stage = 0, 0, 0

    def denoise(state: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls, stage
        for listener in listeners:
            listener.begin_call(index, stage)
        calls, stage = calls + 1, stage + 1
        estimate = denoiser(state, float(sigma), condition)
        return estimate.clamp(-1, 1) if clip_denoised else estimate

    memory: dict[str, Tensor] = {}
    num_steps = len(levels) - 1
    try:
        for listener in listeners:
            listener.begin_run(RunStart(tuple(levels.tolist()), chosen.calls_per_step, chosen.order), x)
        for index in range(num_steps):
            stage = 0
            for listener in listeners:
                x = listener.begin_step(index, x)
            begun = x
            x, denoised = chosen.step(denoise, x, levels[index], levels[index + 1], memory)
            start, end = float(levels[index]), float(levels[index + 1])
            for listener in listeners:
                listener.end_step(index, begun, denoised, start)
            if callback is not None:
                callback(Step(index, num_steps, start, end, x, denoised, mean=x, std=0.0, calls=calls))
    finally:
        for listener in listeners:
            listener.end_run()
    return x


def sample(
    denoiser: Denoiser,
    z: Tensor,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    condition: Condition = UNCONDITIONAL,
    solver: Solver | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Images (B, C, H, W) of the data's range from unit-scale noise `z` (B, C, H, W).

    `sigmas` is a falling grid that starts where `z` lives; when None 18 Karras nodes and then 0, as in Karras et al. 2022, cut to
    the levels that the denoiser takes (`suitable_sigmas`).

    Raises:
        ConfigError: the grid rises.
    """
    if sigmas is None:
        sigmas = suitable_sigmas(denoiser)
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if bool((levels.diff() > 0).any()):
        raise ConfigError(f"sampling needs falling sigmas, got {levels[0]:.4g} to {levels[-1]:.4g}; use `invert`.")
    return solve(denoiser, z * float(levels[0]), levels, condition=condition, solver=solver, callback=callback)


def invert(
    denoiser: Denoiser,
    images: Tensor,
    *,
    sigmas: Tensor | Sequence[float],
    condition: Condition = UNCONDITIONAL,
    solver: Solver | None = None,
    noise: Tensor | None = None,
    clip_denoised: bool = False,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Unit-scale latents of images: the ODE from data to noise.

    Args:
        images: Clean images (B, C, H, W).
        sigmas: A rising grid; its first level is where the images are taken to lie.
        noise: Unit Gaussian (B, C, H, W), scaled by `sigmas[0]` and added first, so that the state lies on the marginal
            that the model knows. None takes the clean image for the state at `sigmas[0]` (as the official code does),
            which contracts the latents when `sigmas[0]` is not small.

    Returns:
        z / sigmas[-1], (B, C, H, W), of about unit variance.

    Raises:
        ConfigError: the grid falls.

    Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822 (there called DDIM inversion).
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if bool((levels.diff() < 0).any()):
        raise ConfigError(f"inversion needs rising sigmas, got {levels[0]:.4g} to {levels[-1]:.4g}; flip the grid.")
    x = images if noise is None else images + float(levels[0]) * noise
    z = solve(denoiser, x, levels, condition=condition, solver=solver, callback=callback, clip_denoised=clip_denoised)
    return z / float(levels[-1])


def expand_sigma(sigma: Tensor | float, like: Tensor) -> Tensor:
    """A noise level as (B, 1, 1, 1), to multiply images."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    return per_sample(sigma.expand(len(like)) if sigma.ndim == 0 else sigma, like)
