"""Laws of the extrapolated Fréchet distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.errors import DataError
from pagoda.evaluation import FeatureMoments, extrapolate_frechet, frechet_bias, frechet_distance

DIM = 8
EXACT = FeatureMoments(2, torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))


def normal(count: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64) + shift


def test_extrapolation_takes_most_of_the_bias_away() -> None:
    values = [extrapolate_frechet(EXACT, normal(2000, seed), smallest=200) for seed in range(20)]
    at_all = sum(frechet_distance(EXACT, FeatureMoments.from_features(normal(2000, seed))) for seed in range(20)) / 20
    mean = sum(found.value for found in values) / 20
    assert at_all == pytest.approx(frechet_bias(DIM, 2000), rel=0.15)
    assert abs(mean) < 0.25 * at_all


def test_extrapolation_finds_the_true_distance_of_shifted_gaussians() -> None:
    values = [extrapolate_frechet(EXACT, normal(2000, seed, 1.0), smallest=200).value for seed in range(20)]
    assert sum(values) / 20 == pytest.approx(DIM * 1.0, rel=0.02)


def test_the_slope_is_the_predicted_bias() -> None:
    slopes = [extrapolate_frechet(EXACT, normal(4000, seed), smallest=200).slope for seed in range(20)]
    assert sum(slopes) / 20 == pytest.approx(frechet_bias(DIM, 1), rel=0.25)


def test_distances_on_a_line_give_back_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.evaluation.extrapolation.frechet_distance", lambda _, m: 0.3 + 7 / m.count)
    found = extrapolate_frechet(EXACT, normal(500), smallest=50)
    assert found.value == pytest.approx(0.3, rel=1e-9)
    assert found.slope == pytest.approx(7, rel=1e-9)
    assert (found.counts[0], found.counts[-1], len(found.counts)) == (50, 500, 15)


def test_the_same_call_gives_the_same_digits() -> None:
    assert extrapolate_frechet(EXACT, normal(300)) == extrapolate_frechet(EXACT, normal(300))
    assert extrapolate_frechet(EXACT, normal(300)) != extrapolate_frechet(EXACT, normal(300), seed=1)


def test_too_few_samples_are_refused_with_the_number_that_is_enough() -> None:
    with pytest.raises(DataError, match="more than 18 for these 8 features"):
        extrapolate_frechet(EXACT, normal(18))
