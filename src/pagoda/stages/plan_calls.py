"""How often the solvers of a run call the network, by asking them."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser, GaussianDenoiser, build_solver, invert, sample
from pagoda.stages.config import RunConfig
from pagoda.stages.encode import inversion_grid
from pagoda.stages.teacher_pairs import sampling_grid


class CountingDenoiser(Denoiser):
    """Knows how often a solver called it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GaussianDenoiser(0.0, 0.5)
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        return self.inner.denoise(x, sigma, condition)


def encode_calls(config: RunConfig) -> int:
    """Network calls of the inversion of one image."""
    counter = CountingDenoiser()
    grid = inversion_grid(config.encode, config.sigma_max)
    invert(counter, torch.zeros(1, 1, 1, 1), sigmas=grid, solver=build_solver(config.encode.solver))
    return counter.calls * (2 if config.guidance.active else 1)  # with the condition and without


def pair_calls(config: RunConfig) -> int:
    """Network calls of one teacher's pair."""
    counter = CountingDenoiser()
    solver = build_solver(config.distill.teacher_pairs.solver)
    sample(counter, torch.zeros(1, 1, 1, 1), sigmas=sampling_grid(config), solver=solver)
    return counter.calls * (2 if config.guidance.active else 1)


def preview_calls() -> int:
    """Network calls of one image of the teacher's grids."""
    counter = CountingDenoiser()
    sample(counter, torch.zeros(1, 1, 1, 1))
    return counter.calls
