"""The Fréchet distance between two sets of features, and the moments that it is made of.

A distance is only comparable with another one in the same features at the same counts: for d-dimensional features of N samples
against an exact reference it exceeds the true one by about (d + d (d + 1) / 4) / N in units of the features' variance. Report the
distance of real images to real images at the same counts (the floor) beside every score.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError, ShapeError

_PIECE = 4096
"""Rows that are held in float64 at a time."""


@dataclass(eq=False)
class FeatureMoments:
    """Count, mean and scatter of a stream of features, in float64; streams that were split can be merged.

    The scatter sum (x - mean)(x - mean)^T is kept centred, because raw second moments cancel when the mean is large.

    Source: Chan, Golub and LeVeque 1979, updating formulae for sample variances, eq. 2.1 (here for vectors).
    """

    count: int
    """Number of samples seen."""
    mean: Tensor
    """(d,) float64."""
    scatter: Tensor
    """(d, d) float64; the covariance is scatter / (count - 1)."""

    @classmethod
    def empty(cls, dim: int) -> FeatureMoments:
        """Moments of nothing yet, for features of `dim` values."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureMoments:
        """Moments of (N, d) features.

        Raises:
            ShapeError: not a matrix.
            DataError: a feature is not finite.
        """
        check_features(features)
        moments = cls.empty(features.shape[1])
        if len(features) == 0:
            return moments
        for piece in features.detach().cpu().split(_PIECE):  # in pieces, so that the float64 copy stays small
            mean = piece.double().mean(0)
            centred = piece.double() - mean
            more = cls(len(piece), mean, centred.T @ centred)
            moments = moments.merge(more) if moments.count else more
        return moments

    @property
    def dim(self) -> int:
        """Number of values of one feature vector."""
        return len(self.mean)

    def update(self, features: Tensor) -> None:
        """Take in (N, d) more features; raises as `from_features` does."""
        more = self.merge(FeatureMoments.from_features(features))
        self.count, self.mean, self.scatter = more.count, more.mean, more.scatter

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """The moments of both streams together.

        Raises:
            ShapeError: the features have different widths.
        """
        if self.dim != other.dim:
            raise ShapeError(f"features of {self.dim} and {other.dim} values cannot be put together.")
        count = self.count + other.count
        if count == 0:
            return FeatureMoments.empty(self.dim)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return FeatureMoments(count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> Tensor:
        """Unbiased covariance (d, d) float64.

        Raises:
            DataError: fewer than two samples.
        """
        if self.count < 2:
            raise DataError(
                f"{self.count} sample(s) have no covariance; at least 2 are needed, and many more than the {self.dim} "
                "values of a feature for a distance that means something."
            )
        return self.scatter / (self.count - 1)

    def fingerprint(self) -> str:
        """16 hexadecimal characters that tell this reference from any other."""
        digest = hashlib.sha256(str(self.count).encode())
        digest.update(self.mean.numpy().tobytes())
        digest.update(self.scatter.numpy().tobytes())
        return digest.hexdigest()[:16]


def check_features(features: Tensor) -> None:
    """Refuse what is not a matrix of finite features.

    Raises:
        ShapeError: not (N, d).
        DataError: a feature is not finite.
    """
    if features.ndim != 2:
        raise ShapeError(f"features must be a matrix (N, d), got shape {tuple(features.shape)}.")
    bad = (~torch.isfinite(features)).any(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise DataError(
            f"{int(bad.sum())} of {len(features)} feature rows hold NaN or infinity, the first is row {first}. "
            "Look at the images of those rows: a generator that has diverged makes such images."
        )


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments, in float64; 0 for equal moments.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}). The trace of the root is the sum of the singular values of
    L_a^T L_b with S = L L^T, which stays real and loses no digits to squaring, also when there are fewer samples than dimensions.

    Args:
        a, b: Moments of features of the same extractor. Use equal counts in everything that is to be compared (see the
            module's text on the bias).

    Raises:
        DataError: one of them has fewer than two samples.
        ShapeError: the features have different widths.

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    if a.dim != b.dim:
        raise ShapeError(f"features of {a.dim} and {b.dim} values have no distance; use one extractor for both.")
    S_a, S_b = a.covariance(), b.covariance()
    trace_of_root = torch.linalg.svdvals(_factor(S_a).T @ _factor(S_b)).sum()
    distance = (a.mean - b.mean).square().sum() + S_a.trace() + S_b.trace() - 2 * trace_of_root
    return max(0.0, float(distance))  # equal moments may give -1e-15


def _factor(S: Tensor) -> Tensor:
    """L with L L^T = S: Cholesky's, or near singular S from its eigenvalues, where rounding counts as 0.

    Any two factors differ by a rotation, which leaves the singular values of L_a^T L_b as they are.
    """
    factor, failed = torch.linalg.cholesky_ex(S)
    if not failed and factor.diagonal().min() > 1e-6 * factor.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(S)
    rounding = len(S) * torch.finfo(S.dtype).eps * values.max()
    return vectors * torch.where(values > rounding, values, 0.0).sqrt()


def frechet_bias(dim: int, count: int) -> float:
    """How much `count` samples of the reference's own distribution are off on average, in units of the features' variance.

    For standard normal features against their exact moments, to first order in 1 / count: (d + d (d + 1) / 4) / N.
    """
    return (dim + dim * (dim + 1) / 4) / count


def class_balanced(labels: Tensor, *, num_classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of `per_class` random samples of each class, without repeats, class after class.

    Args:
        labels: (N,) integers in 0..num_classes-1.

    Returns:
        (num_classes * per_class,) int64.

    Raises:
        DataError: a label is out of range, or a class has fewer samples than asked.
        ConfigError: `per_class` is below 1.
    """
    if per_class < 1:
        raise ConfigError(f"per_class must be at least 1, got {per_class}.")
    counts = count_labels(labels, num_classes)
    short = {label: n for label, n in enumerate(counts) if n < per_class}
    if short:
        raise DataError(
            f"{per_class} samples per class were asked, but these classes have fewer: {short}. "
            f"Ask for at most {min(counts)}, or leave out the small classes."
        )
    chosen = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten().cpu()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)


def count_labels(labels: Tensor, num_classes: int) -> list[int]:
    """Number of samples of each class.

    Raises:
        DataError: a label is not in 0..num_classes-1.
    """
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise DataError(
            f"labels must lie in 0..{num_classes - 1}, got {sorted(set(outside.tolist()))[:5]} among {len(labels)}."
        )
    return torch.bincount(labels.cpu().long(), minlength=num_classes).tolist()
