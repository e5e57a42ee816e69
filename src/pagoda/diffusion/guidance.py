"""Guidance as a denoiser made of denoisers, so that it nests. Weight 1 means none (the diffusers convention)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pagoda.diffusion.conditions import Condition
from pagoda.diffusion.denoiser import Denoiser, per_sample
from pagoda.errors import ConfigError


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance and autoguidance: D_w = D_other + w (D - D_other).

    With no `other`, it is the same model without its condition (classifier-free guidance); with a weaker model as `other` that sees
    the same condition it is autoguidance. Where w = 1 the result is the plain model's own, bit for bit, and `other` is not called.

    Args:
        inner: The model to be guided.
        weight: w, or None to take it per sample from `condition.guidance` (which `inner` then does not see).
        other: The weaker model of autoguidance; None for classifier-free guidance.
        interval: Guide only for sigma in (low, high].

    Source: Ho and Salimans 2022, arXiv:2207.12598 (their weight is w - 1); Karras et al. 2024, arXiv:2406.02507
    (autoguidance); Kynkaanniemi et al. 2024, arXiv:2404.07724 (interval).
    """

    def __init__(
        self,
        inner: Denoiser,
        weight: float | None,
        *,
        other: Denoiser | None = None,
        interval: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        if weight is not None and not math.isfinite(weight):
            raise ConfigError(f"the guidance weight must be finite, got {weight}.")
        if not interval[0] < interval[1]:
            raise ConfigError(f"the guidance interval must be (low, high] with low < high, got {interval}.")
        self.inner = inner
        self.other = other
        self.weight = weight
        self.interval = interval

    @property
    def sigma_range(self) -> tuple[float, float]:
        low, high = self.inner.sigma_range
        if self.other is None:
            return low, high
        return max(low, self.other.sigma_range[0]), min(high, self.other.sigma_range[1])

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        weight, condition = self._weights(x, sigma, condition)
        if bool((weight == 1).all()):
            return self.inner(x, sigma, condition)
        if self.other is not None:
            guided, plain = self.inner(x, sigma, condition), self.other(x, sigma, condition)
        elif condition.batch_size is None:
            raise ConfigError("classifier-free guidance needs a condition to leave out; none was given.")
        else:
            both = Condition.cat([condition, condition.null()])
            guided, plain = self.inner(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        mixed = plain + per_sample(weight, x) * (guided - plain)
        return torch.where(per_sample(weight == 1, x), guided, mixed)

    def _weights(self, x: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        if self.weight is not None:
            weight = torch.full_like(sigma, self.weight)
        elif condition.guidance is not None:
            weight = condition.guidance.to(sigma)
            slots = {k: v for k, v in condition.slots().items() if k != "guidance"}
            condition = Condition(**slots)
        else:
            raise ConfigError("weight=None takes the guidance weight from `condition.guidance`, which is not set.")
        low, high = self.interval
        inside = (sigma > low) & (sigma <= high)
        return torch.where(inside, weight, torch.ones_like(weight)), condition
