"""What a network may predict of a state, and how one prediction becomes another, on any schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.diffusion.schedules import Schedule
from pagoda.errors import ConfigError, ShapeError, did_you_mean

PREDICTIONS = ("x0", "eps", "v", "velocity", "score")


def convert(value: Tensor, x: Tensor, t: Tensor, source: str, target: str, schedule: Schedule) -> Tensor:
    """Turn one prediction at (x_t, t) into another.

    Args:
        value: The prediction, shaped like `x`.
        x: The state x_t of `schedule`.
        t: Times that broadcast against `x`.
        source: What `value` is: "x0", "eps", "v" (alpha eps - sigma x0), "velocity" (dx/dt) or "score".
        target: What is wanted.

    Raises:
        ConfigError: an unknown prediction name.

    Source: arXiv:2510.21890; with D = alpha sigma' - alpha' sigma.
    """
    for name in (source, target):
        if name not in PREDICTIONS:
            raise ConfigError(f"unknown prediction `{name}`. {did_you_mean(name, PREDICTIONS)}")
    if value.shape != x.shape:
        raise ShapeError(f"the prediction has shape {tuple(value.shape)}, the state {tuple(x.shape)}.")
    if source == target:
        return value
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    dalpha, dsigma = schedule.dalpha(t), schedule.dsigma(t)
    alpha, sigma, dalpha, dsigma = (c.to(x.dtype) for c in (alpha, sigma, dalpha, dsigma))
    x0: Tensor
    eps: Tensor
    if source == "x0":
        x0, eps = value, (x - alpha * value) / sigma
    elif source in ("eps", "score"):
        eps = value if source == "eps" else -sigma * value
        x0 = (x - sigma * eps) / alpha
    elif source == "v":
        total = alpha**2 + sigma**2  # 1 for VP; kept, so that v stays invertible on every schedule
        x0, eps = (alpha * x - sigma * value) / total, (sigma * x + alpha * value) / total
    else:
        D = alpha * dsigma - dalpha * sigma
        x0, eps = (dsigma * x - sigma * value) / D, (alpha * value - dalpha * x) / D
    if target == "x0":
        return x0
    if target == "eps":
        return eps
    if target == "score":
        return -eps / sigma
    if target == "v":
        return alpha * eps - sigma * x0
    return dalpha * x0 + dsigma * eps


def loss_weight(source: str, target: str, t: Tensor, schedule: Schedule) -> Tensor:
    """w such that |error in `source`|^2 * w = |error in `target`|^2: a loss is a prediction *and* a weight.

    Raises:
        ConfigError: an unknown prediction name.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    D = alpha * schedule.dsigma(t) - schedule.dalpha(t) * sigma
    # Factor by which an error in x_0 is multiplied when it is expressed in each prediction.
    factors = {
        "x0": torch.ones_like(alpha),
        "eps": alpha / sigma,
        "velocity": D / sigma,
        "score": alpha / sigma**2,
        "v": (alpha**2 + sigma**2) / sigma,
    }
    for name in (source, target):
        if name not in factors:
            raise ConfigError(f"unknown prediction `{name}`. {did_you_mean(name, PREDICTIONS)}")
    return (factors[target] / factors[source]) ** 2
