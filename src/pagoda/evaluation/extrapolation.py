"""The Fréchet distance that infinitely many generated images would have, extrapolated from several sample sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.errors import DataError
from pagoda.evaluation.frechet import FeatureMoments, frechet_distance


class Extrapolation(NamedTuple):
    """A straight line through distances over 1 / N."""

    value: float
    """The distance at 1 / N = 0. Below 0 by chance when the true one is small."""
    slope: float
    """What one sample's worth of 1 / N adds: the distance of N samples is about value + slope / N."""
    counts: tuple[int, ...]
    """Sample sizes that were measured."""
    distances: tuple[float, ...]
    """The distance at each of them."""


def extrapolate_frechet(
    reference: FeatureMoments, features: Tensor, *, points: int = 15, smallest: int | None = None, seed: int = 0
) -> Extrapolation:
    """FD_inf: the distance of sub-samples of several sizes N, fitted by a + b / N; a is the answer.

    The bias of the generated side vanishes in a, that of the reference stays. Only the generated images are sub-sampled.

    Args:
        features: (N, d) of generated images.
        points: Sample sizes, evenly spread from the smallest to N.
        smallest: The smallest of them; min(5000, max(N / 10, 2 (d + 1), 2)) when None, since below d samples the distance does
            not follow 1 / N.
        seed: Decides the order that sub-samples are taken from.

    Raises:
        DataError: N leaves no room for two sizes.

    Source: Chong and Forsyth 2020, arXiv:1911.07023 (there with quasi-random samples).
    """
    total, dim = features.shape
    if smallest is None:
        smallest = min(5000, max(total // 10, 2 * (dim + 1), 2))
    if points < 2 or smallest < 2 or smallest >= total:
        raise DataError(
            f"{total} generated images are too few to extrapolate from {smallest} upwards at {points} sizes; "
            f"generate more than {2 * (dim + 1)} for these {dim} features, or give a smaller `smallest`."
        )
    counts = sorted({round(float(n)) for n in torch.linspace(smallest, total, points, dtype=torch.float64)})
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for count in counts:
        rows = torch.randperm(total, generator=generator)[:count]
        distances.append(frechet_distance(reference, FeatureMoments.from_features(features[rows])))
    x = 1 / torch.tensor(counts, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return Extrapolation(float(y.mean() - slope * x.mean()), float(slope), tuple(counts), tuple(distances))
