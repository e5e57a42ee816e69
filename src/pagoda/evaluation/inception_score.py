"""The Inception Score of a classifier's logits. It is called that only where the classifier is FID's Inception."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pagoda.errors import DataError
from pagoda.evaluation.frechet import check_features


class InceptionScore(NamedTuple):
    """exp of the mean divergence of p(y | x) from p(y): 1 where every image looks alike, at most the number of classes."""

    mean: float
    std: float
    """Over the splits."""


def inception_score(logits: Tensor, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """exp(mean_x KL(p(y | x) || p(y))), mean and standard deviation over parts of the images, in float64.

    Few images bias it downwards: a part of N images cannot show more than N classes.

    Args:
        logits: (N, classes).
        splits: Parts; N / splits images each.
        seed: Shuffles the images first, since samples often come class after class; None keeps their order.

    Raises:
        DataError: fewer images than parts, or logits that are not finite.

    Source: Salimans et al. 2016, arXiv:1606.03498, section 4.
    """
    check_features(logits)
    if splits < 1 or len(logits) < splits:
        raise DataError(f"{len(logits)} images cannot be scored in {splits} parts; use fewer parts or more images.")
    logits = logits.double()
    if seed is not None:
        logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))]
    log_p = logits.log_softmax(1)
    scores = []
    for index in range(splits):
        part = log_p[index * len(logits) // splits : (index + 1) * len(logits) // splits]
        log_marginal = part.logsumexp(0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
