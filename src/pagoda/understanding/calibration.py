"""Probabilities that mean what they say: one temperature, and how far confidence is from accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import DataError, ShapeError

_GRID = 200


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 that makes softmax(logits / T) most likely for the labels.

    The likelihood is convex in 1 / T. A scan over 12 decades finds the best point, and golden-section search refines it.

    Args:
        logits: (N, K), finite.
        labels: (N,) int64.

    Raises:
        ShapeError: another number of labels.
        DataError: no row, logits that are not finite, or labels all of one class, which say nothing about confidence.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    if labels.shape != (len(logits),):
        raise ShapeError(f"{len(logits)} rows of logits need as many labels, got {tuple(labels.shape)}.")
    if len(logits) == 0 or not bool(logits.isfinite().all()):
        raise DataError("calibration needs at least one image, and finite scores for every class.")
    if len(set(labels.tolist())) < 2:
        raise DataError("all images are of one class; calibrate on images of at least two.")
    scores = logits.double()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(scores / math.exp(log_t), labels))

    centre = math.log(float(scores.std()) + 1e-12)
    grid = torch.linspace(centre - 14, centre + 14, _GRID).tolist()
    best = min(range(_GRID), key=lambda index: loss(grid[index]))
    low, high = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean |confidence - accuracy| over bins of equal numbers of images.

    Raises:
        ShapeError: another number of labels.
        DataError: no image.
    """
    if labels.shape != (len(probabilities),):
        raise ShapeError(f"{len(probabilities)} rows need as many labels, got {tuple(labels.shape)}.")
    if len(labels) == 0:
        raise DataError("there is no image to measure calibration on.")
    confidence, guess = probabilities.double().max(1)
    right = (guess == labels).double()
    order = confidence.argsort()
    gaps = [
        len(part) * abs(float(confidence[part].mean() - right[part].mean()))
        for part in order.tensor_split(min(bins, len(labels)))
    ]
    return sum(gaps) / len(labels)
