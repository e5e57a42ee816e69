"""The distance of a law to the nearest Gaussian, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from pagoda.data.moments import MomentSums


def distance(z: torch.Tensor) -> float:
    sums = MomentSums(1)
    for piece in z.reshape(-1, 1, 1, 1).split(100_000):
        sums.add(piece)
    return sums.result().gaussian_distance


def test_gaussian_values_of_any_mean_and_std_are_near_a_gaussian() -> None:
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert distance(normal) < 0.01
    assert distance(0.4 + 1.7 * normal) < 0.017


def test_a_uniform_law_is_as_far_as_its_closed_form() -> None:
    values = math.sqrt(3) * (2 * (torch.arange(200_000) + 0.5) / 200_000 - 1)  # std 1
    assert distance(values) == pytest.approx(math.sqrt(1 - 3 / math.pi), abs=2e-3)
    assert distance(2 * values) == pytest.approx(2 * math.sqrt(1 - 3 / math.pi), abs=2e-3)


def test_two_points_are_as_far_as_their_closed_form() -> None:
    values = torch.cat([torch.ones(5000), -torch.ones(5000)])
    assert distance(values) == pytest.approx(math.sqrt(1 - 2 / math.pi), abs=3e-3)  # int sign(q) q = sqrt(2 / pi)
