"""The fixed-point solver: its inversion undoes the sampler's own steps, on grids where an explicit inversion does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import (
    Denoiser,
    DPMSolver2M,
    Euler,
    FixedPoint,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Heun,
    Solver,
    build_solver,
    invert,
    karras_sigmas,
    sample,
)
from pagoda.errors import ConfigError

COARSE = karras_sigmas(12, sigma_min=0.03)


def mixture() -> GaussianMixtureDenoiser:
    means = 0.5 * torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.full((4,), 0.3, dtype=torch.float64))


def images(denoiser: Denoiser) -> Tensor:
    noise = torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return sample(denoiser, noise, sigmas=karras_sigmas(60, sigma_min=0.03))


def round_trip(denoiser: Denoiser, solver: Solver) -> float:
    """Root mean square error of images at sigma_min that went to their latents and back on the same coarse grid."""
    x = images(denoiser)
    z = invert(denoiser, x, sigmas=COARSE.flip(0), solver=solver)
    return float((sample(denoiser, z, sigmas=COARSE, solver=solver) - x).square().mean().sqrt())


@pytest.mark.parametrize("inner", [Euler(), Heun()])
def test_a_round_trip_of_gaussian_data_is_exact(inner: Solver) -> None:
    gaussian = GaussianDenoiser(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    assert round_trip(gaussian, FixedPoint(inner, 8)) < 1e-5


@pytest.mark.parametrize("inner", [Euler(), Heun()])
def test_a_round_trip_of_a_mixture_is_far_more_exact_than_that_of_the_explicit_solver(inner: Solver) -> None:
    explicit, solved = round_trip(mixture(), inner), round_trip(mixture(), FixedPoint(inner, 12))
    assert solved < explicit / 20
    assert solved < round_trip(mixture(), FixedPoint(inner, 2))


def test_falling_runs_are_those_of_the_inner_solver_bit_for_bit() -> None:
    noise = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    wanted = sample(mixture(), noise, sigmas=COARSE, solver=Heun())
    assert torch.equal(sample(mixture(), noise, sigmas=COARSE, solver=build_solver("fixed_point")), wanted)


def test_a_rising_step_makes_one_more_inner_step_than_there_are_iterations() -> None:
    calls = []

    class Counting(Denoiser):
        def denoise(self, x: Tensor, sigma: Tensor, condition: object) -> Tensor:
            calls.append(float(sigma[0]))
            return 0.5 * x

    invert(Counting(), torch.zeros(1, 1, 2, 2), sigmas=[0.1, 1.0, 10.0], solver=FixedPoint(Heun(), 3))
    assert len(calls) == 2 * 2 * (1 + 3)


def test_a_latent_does_not_depend_on_its_batch() -> None:
    x, denoiser = images(mixture()), mixture()
    together = invert(denoiser, x, sigmas=COARSE.flip(0), solver=build_solver("fixed_point"))
    alone = invert(denoiser, x[3:4], sigmas=COARSE.flip(0), solver=build_solver("fixed_point"))
    torch.testing.assert_close(alone, together[3:4], atol=1e-12, rtol=1e-10)


def test_an_image_that_needs_no_correction_stays_finite() -> None:
    class Nothing(Denoiser):
        def denoise(self, x: Tensor, sigma: Tensor, condition: object) -> Tensor:
            return torch.zeros_like(x)

    z = invert(Nothing(), torch.zeros(2, 1, 2, 2), sigmas=COARSE.flip(0), solver=build_solver("fixed_point"))
    assert torch.equal(z, torch.zeros(2, 1, 2, 2))


def test_only_steps_without_memory_can_be_undone() -> None:
    with pytest.raises(ConfigError, match="Euler or Heun, got DPMSolver2M"):
        FixedPoint(DPMSolver2M())
    with pytest.raises(ConfigError, match="one iteration"):
        FixedPoint(Heun(), 0)
