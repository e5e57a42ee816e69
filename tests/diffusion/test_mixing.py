"""Spherical mixtures: their ends, their length, and what they are for noise."""

from __future__ import annotations

import math

import pytest
import torch

from pagoda.diffusion import spherical_mixture
from pagoda.errors import ConfigError, ShapeError


def test_the_ends_are_returned_bit_for_bit() -> None:
    start, end = torch.randn(2, 5, 3, 8, 8)
    assert torch.equal(spherical_mixture(start, end, 0), start)
    assert torch.equal(spherical_mixture(start, end, 1), end)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_latents_of_one_length_keep_it_and_the_angle_is_shared_out(fraction: float) -> None:
    start, end = torch.randn(2, 6, 40, dtype=torch.float64)
    start, end = (10 * v / v.norm(dim=1, keepdim=True) for v in (start, end))
    mixed = spherical_mixture(start, end, fraction)
    torch.testing.assert_close(mixed.norm(dim=1), torch.full((6,), 10.0, dtype=torch.float64))
    whole = ((start * end).sum(1) / 100).acos()
    torch.testing.assert_close(((start * mixed).sum(1) / 100).acos(), fraction * whole)


def test_half_way_between_orthogonal_latents_is_their_scaled_sum() -> None:
    start, end = torch.zeros(2, 1, 4, dtype=torch.float64)
    start[0, 0], end[0, 1] = 2.0, 2.0
    torch.testing.assert_close(spherical_mixture(start, end, 0.5), (start + end) / math.sqrt(2))


def test_noise_mixed_with_noise_is_noise_where_a_linear_mixture_shrinks() -> None:
    start, end = torch.randn(2, 400, 3, 16, 16)
    assert float(spherical_mixture(start, end, 0.5).std()) == pytest.approx(1, abs=0.01)
    assert float((0.5 * start + 0.5 * end).std()) == pytest.approx(math.sqrt(0.5), abs=0.01)


def test_parallel_latents_are_mixed_linearly_and_zeros_stay_finite() -> None:
    start = torch.randn(3, 8)
    torch.testing.assert_close(spherical_mixture(start, 3 * start, 0.25), 1.5 * start)
    assert torch.equal(spherical_mixture(torch.zeros(2, 8), torch.zeros(2, 8), 0.5), torch.zeros(2, 8))


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        spherical_mixture(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ConfigError, match=r"\[0, 1\], got 1.5"):
        spherical_mixture(torch.zeros(2, 3), torch.zeros(2, 3), 1.5)
