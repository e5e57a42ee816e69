"""Intervals: what they claim is the spread over fresh samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError
from pagoda.evaluation import FeatureMoments, frechet_distance, half_sample_error, interval, mean_error


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_error_of_a_mean_is_its_standard_deviation_over_root_n() -> None:
    values = normal(401, 0)[:, 0]
    expected = float(values.std()) / 401**0.5
    claimed = half_sample_error(lambda rows: float(values[rows].mean()), 401, resamples=2000)
    assert claimed == pytest.approx(expected, rel=0.05)
    assert mean_error(values) == pytest.approx(expected, rel=0.01)


def test_the_error_of_a_frechet_distance_is_its_spread_over_fresh_samples() -> None:
    reference = FeatureMoments.from_features(normal(4000, 999) + 0.5)

    def distance(features: Tensor) -> float:
        return frechet_distance(reference, FeatureMoments.from_features(features))

    samples = [normal(300, seed) for seed in range(60)]
    spread = float(torch.tensor([distance(x) for x in samples]).std())
    claimed = [half_sample_error(lambda rows, x=x: distance(x[rows]), 300, resamples=40) for x in samples[:15]]
    assert sum(claimed) / 15 == pytest.approx(spread, rel=0.3)  # 60 draws know a spread to 9 %, 15 errors to 4 %


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        values = normal(100, seed)[:, 0]
        low, high = interval(float(values.mean()), mean_error(values))
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_error() -> None:
    def statistic(rows: Tensor) -> float:
        return float(rows.double().mean())

    assert half_sample_error(statistic, 50, seed=1) == half_sample_error(statistic, 50, seed=1)
    assert half_sample_error(statistic, 50, seed=1) != half_sample_error(statistic, 50, seed=2)


def test_too_little_for_an_interval_is_refused() -> None:
    with pytest.raises(DataError, match="3 samples"):
        half_sample_error(lambda rows: 0.0, 3)
    with pytest.raises(ConfigError, match="at least 2 resamples"):
        half_sample_error(lambda rows: 0.0, 30, resamples=1)
