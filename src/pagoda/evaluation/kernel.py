"""The kernel distance: an unbiased estimate of the squared maximum mean discrepancy with a polynomial kernel.

Unlike the Fréchet distance its expectation does not depend on the number of samples. It may come out below 0 when the truth is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation.frechet import check_features

_ROWS = 2048  # of the kernel matrix at a time


class KernelDistance(NamedTuple):
    """An estimate and how sure it is."""

    value: float
    standard_error: float
    """Over generated samples, by leaving out one at a time; in `kernel_distance_subsets` the spread over subsets."""


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """k(x, y) = (x . y / d + 1)^3 of all pairs, (N_a, N_b) float64."""
    return (a.double() @ b.double().T / a.shape[1] + 1).pow(3)


def kernel_distance(real: Tensor, fake: Tensor) -> KernelDistance:
    """Unbiased MMD^2 of all samples, in float64.

    sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1)) - 2 sum k(x_i, y_j) / (m n).

    Args:
        real, fake: Features (m, d) and (n, d); at least 2 and 3 of them.

    Raises:
        ShapeError: different widths.
        DataError: too few samples, or features that are not finite.

    Source: Binkowski et al. 2018, arXiv:1801.01401, eq. 4.
    """
    _check(real, fake, 3)
    m, n = len(real), len(fake)
    within_real = float(_row_sums(real, real).sum() - _diagonal(real).sum()) / (m * (m - 1))
    within = _row_sums(fake, fake) - _diagonal(fake)  # (n,)
    across = _row_sums(fake, real)  # (n,)
    total_within, total_across = within.sum(), across.sum()
    value = within_real + float(total_within) / (n * (n - 1)) - 2 * float(total_across) / (m * n)
    without = (
        within_real + (total_within - 2 * within) / ((n - 1) * (n - 2)) - 2 * (total_across - across) / (m * (n - 1))
    )
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return KernelDistance(value, float(error))


def kernel_distance_subsets(
    real: Tensor, fake: Tensor, *, num_subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Mean and spread of the estimate over random subsets of both sides: the way in which KID is published.

    Args:
        num_subsets: How many.
        size: Samples of each side in a subset, drawn without repeats.
        seed: Decides the subsets.

    Raises:
        DataError: `size` is larger than a side.
    """
    _check(real, fake, 3)
    if not 2 <= size <= min(len(real), len(fake)):
        raise DataError(
            f"subsets of {size} samples cannot be drawn from {len(real)} real and {len(fake)} generated ones; "
            f"use a size of 2 to {min(len(real), len(fake))}."
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        x = real[torch.randperm(len(real), generator=generator)[:size]]
        y = fake[torch.randperm(len(fake), generator=generator)[:size]]
        same = sum(float(polynomial_kernel(s, s).sum() - _diagonal(s).sum()) for s in (x, y)) / (size * (size - 1))
        values.append(same - 2 * float(polynomial_kernel(x, y).mean()))
    spread = torch.tensor(values, dtype=torch.float64)
    return KernelDistance(float(spread.mean()), float(spread.std(correction=0)))


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    check_features(real)
    check_features(fake)
    if real.shape[1] != fake.shape[1]:
        raise ShapeError(
            f"features of {real.shape[1]} and {fake.shape[1]} values have no distance; use one extractor for both."
        )
    if min(len(real), len(fake)) < least:
        raise DataError(f"a kernel distance needs {least} samples a side, got {len(real)} and {len(fake)}.")


def _row_sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([polynomial_kernel(rows, b).sum(1) for rows in a.split(_ROWS)])


def _diagonal(a: Tensor) -> Tensor:
    return (a.double().square().sum(1) / a.shape[1] + 1).pow(3)
