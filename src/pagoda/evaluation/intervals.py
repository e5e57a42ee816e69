"""How far a score may be off by the chance of which images were generated: 95 % intervals by resampling.

Scores that look across images (covariances, neighbours) are resampled by random halves without repeats. A repeated image is its own
nearest neighbour and shrinks a covariance, so that the usual bootstrap is biased for them; and the spread of a mean over random
halves is just that of the whole mean: std^2 / (N / 2) (1 - 1/2) = std^2 / N.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError

Z_95 = 1.959964
"""Standard deviations on either side that hold 95 % of a Gaussian."""


def half_sample_error(
    statistic: Callable[[Tensor], float], count: int, *, resamples: int = 100, seed: int = 0
) -> float:
    """Standard error of a statistic of `count` samples.

    Args:
        statistic: Indices (count // 2,) -> value.
        resamples: Random halves; the error itself is known to about 1 / sqrt(2 resamples).
        seed: Decides the halves.

    Raises:
        ConfigError: fewer than two resamples.
        DataError: fewer than four samples.

    Source: Shao and Wu 1989, A general theory for jackknife variance estimation (delete-d, here with d = N / 2 at random).
    """
    if resamples < 2:
        raise ConfigError(f"an interval needs at least 2 resamples, got {resamples}; 100 are usual.")
    if count < 4:
        raise DataError(f"{count} samples are too few for an interval; at least 4 are needed.")
    generator = torch.Generator().manual_seed(seed)
    values = [statistic(torch.randperm(count, generator=generator)[: count // 2]) for _ in range(resamples)]
    # For odd counts the halves are a little small: s^2 (1/h - 1/N) instead of s^2 / N.
    half = count // 2
    return float(torch.tensor(values, dtype=torch.float64).std()) * math.sqrt(half / (count - half))


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of (N,) values: what a bootstrap over them tends to."""
    return float(values.double().std(correction=0)) / math.sqrt(len(values))


def interval(value: float, error: float) -> tuple[float, float]:
    """Both ends of the 95 % interval of a value with a standard error."""
    return value - Z_95 * error, value + Z_95 * error
