"""Metrics of nearest neighbours: precision and recall, density and coverage, and copies of training images.

A ball around a sample reaches to its k-th neighbour within its own set, itself not counted; its edge belongs to it. Distances are
float64 products, so that two of them count as equal when they differ by less than the rounding of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation.frechet import check_features

_ROWS = 1024  # of the distance matrix at a time
_ROUNDING = 1e-13  # of a squared distance, relative to the largest squared norm


@dataclass(frozen=True, eq=False)
class NeighbourScores:
    """Four scores and the verdicts on single images that they are the means of."""

    inside_real: Tensor
    """(N_fake,) bool: the generated image lies in the ball of a real one."""
    inside_fake: Tensor
    """(N_real,) bool: the real image lies in the ball of a generated one."""
    balls: Tensor
    """(N_fake,) float64: real balls around the generated image, divided by k."""
    covered: Tensor
    """(N_real,) bool: the ball of the real image holds a generated one."""

    @property
    def precision(self) -> float:
        """Share of generated images among the real ones."""
        return float(self.inside_real.double().mean())

    @property
    def recall(self) -> float:
        """Share of real images among the generated ones."""
        return float(self.inside_fake.double().mean())

    @property
    def density(self) -> float:
        """How densely real images lie around generated ones; about 1 for equal distributions, unlike precision not at most 1."""
        return float(self.balls.mean())

    @property
    def coverage(self) -> float:
        """Share of real images with a generated one in their ball."""
        return float(self.covered.double().mean())


def neighbour_scores(real: Tensor, fake: Tensor, *, k: int = 5) -> NeighbourScores:
    """Precision, recall, density and coverage.

    They compare only at equal counts and equal k: with more samples the balls shrink.

    Args:
        real, fake: Features (N_real, d) and (N_fake, d).
        k: Neighbours that a ball reaches to; the papers use 3 (precision, recall) and 5 (density, coverage).

    Raises:
        ShapeError: different widths.
        DataError: k or fewer samples on a side, or features that are not finite.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1-3; Naeem et al. 2020, arXiv:2002.09797, eq. 4-6.
    """
    real, fake, slack = _prepare(real, fake)
    for name, features in (("real", real), ("generated", fake)):
        if not 1 <= k < len(features):
            raise DataError(
                f"{len(features)} {name} images have no {k}-th neighbour; k must lie in 1..{len(features) - 1}."
            )
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.float64)
    inside_fake, covered = [], []
    for rows in torch.arange(len(real)).split(_ROWS):
        distances = _squared_distances(real[rows], fake)
        in_real_ball = distances <= real_radii[rows, None] + slack
        balls += in_real_ball.sum(0)
        covered.append(in_real_ball.any(1))
        inside_fake.append((distances <= fake_radii[None] + slack).any(1))
    return NeighbourScores(balls > 0, torch.cat(inside_fake), balls / k, torch.cat(covered))


@dataclass(frozen=True, eq=False)
class Memorisation:
    """How near generated images come to training images, beside how near new real images do."""

    share: float
    """Share of generated images that lie nearer to a training image than all but `quantile` of the held-out real ones."""
    floor: float
    """The same share of the held-out images themselves: `quantile`, up to their number."""
    distances: Tensor
    """(N_fake,) float64: distance to the nearest training image."""
    nearest: Tensor
    """(N_fake,) int64: which one that is."""
    threshold: float
    """Distance below which an image counts."""


def memorisation(
    fake: Tensor, training: Tensor, held_out: Tensor | None = None, *, quantile: float = 0.01
) -> Memorisation:
    """Look for copies: the nearest training image of each generated one, in features.

    Args:
        fake: (N, d) of generated images.
        training: (M, d) of the images that the generator was trained on.
        held_out: (H, d) of real images that it has never seen, from the same source; where there are none, each training image
            stands in for one, with the others around it.
        quantile: Share of the held-out images that counts as too near.

    Raises:
        DataError: fewer than 1 / quantile held-out images, or features that are not finite.
        ShapeError: different widths.
    """
    count = len(training) if held_out is None else len(held_out)
    if not 0 < quantile < 1 or count * quantile < 1:
        raise DataError(
            f"{count} held-out images say nothing about the nearest {quantile:g} of them; give "
            f"{round(1 / quantile) if quantile > 0 else 'more'} or more, or a larger quantile."
        )
    real_distances = _among_themselves(training) if held_out is None else nearest_neighbours(held_out, training)[0]
    distances, nearest = nearest_neighbours(fake, training)
    threshold = float(real_distances.sort().values[int(count * quantile) - 1])
    return Memorisation(
        share=float((distances <= threshold).double().mean()),
        floor=float((real_distances <= threshold).double().mean()),
        distances=distances,
        nearest=nearest,
        threshold=threshold,
    )


def _among_themselves(features: Tensor) -> Tensor:
    """Distance (N,) float64 of each sample to the nearest other one."""
    centred, _, slack = _prepare(features, features[:0])
    squared = _radii(centred, 1)
    squared[squared <= slack] = 0.0
    return squared.sqrt()


def nearest_neighbours(queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) float64 and index (N,) of the nearest of `targets` (M, d) for each of `queries` (N, d)."""
    queries, targets, slack = _prepare(queries, targets)
    if len(targets) == 0:
        raise DataError("there is no image to be near to.")
    found = [_squared_distances(rows, targets).min(1) for rows in queries.split(_ROWS)]
    distances = torch.cat([part.values for part in found])
    distances[distances <= slack] = 0.0  # equal images, up to rounding
    return distances.sqrt(), torch.cat([part.indices for part in found])


def _prepare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both in float64 about a common origin, which keeps digits, and the rounding of their squared distances."""
    check_features(a)
    check_features(b)
    if a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"features of {a.shape[1]} and {b.shape[1]} values have no distance; use one extractor for both."
        )
    a, b = a.cpu().double(), b.cpu().double()
    origin = torch.cat([a, b]).mean(0)
    a, b = a - origin, b - origin
    norms = torch.cat([a, b]).square().sum(1)
    return a, b, _ROUNDING * float(norms.max()) if len(norms) else 0.0


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * (a @ b.T)).clamp_(min=0)


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each sample to its k-th neighbour, itself not counted."""
    radii = []
    for rows in torch.arange(len(features)).split(_ROWS):
        distances = _squared_distances(features[rows], features)
        distances[torch.arange(len(rows)), rows] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)
