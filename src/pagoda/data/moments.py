"""Statistics of latents: the cheapest detector of a wrong scale, a coarse solver or a weak teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentMoments:
    """Statistics of unit-scale latents. A perfect encoder of perfect data gives mean 0, std 1, kurtosis 3."""

    mean: float
    std: float
    rms: float
    """Root mean square over all values."""
    kurtosis: float
    """Fourth central moment over the squared variance (not the excess): 3 for a Gaussian."""
    rms_min: float
    """Smallest root mean square of a single latent."""
    rms_max: float
    """Largest root mean square of a single latent."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dict(asdict(self), channel_std=list(self.channel_std))


class MomentSums:
    """Sums of powers, in float64, over latents (B, C, H, W) that arrive in pieces."""

    def __init__(self, channels: int) -> None:
        self._powers = torch.zeros(4, channels, dtype=torch.float64)
        self._values_per_channel = 0
        self._rms_min, self._rms_max = float("inf"), 0.0

    def add(self, z: Tensor) -> None:
        """Take in more latents (B, C, H, W)."""
        z = z.detach().double()
        power = z
        for order in range(4):
            self._powers[order] += power.sum((0, 2, 3)).cpu()
            power = power * z
        self._values_per_channel += z.shape[0] * z.shape[2] * z.shape[3]
        rms = z.square().flatten(1).mean(1).sqrt()
        self._rms_min = min(self._rms_min, float(rms.min()))
        self._rms_max = max(self._rms_max, float(rms.max()))

    def result(self) -> LatentMoments:
        """The statistics of all that was added; at least one latent must have been."""
        per_channel = self._powers / self._values_per_channel
        first, second, third, fourth = (float(value) for value in per_channel.mean(1))
        variance = max(second - first**2, 0.0)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        channel_variance = (per_channel[1] - per_channel[0] ** 2).clamp(min=0)
        return LatentMoments(
            mean=first,
            std=variance**0.5,
            rms=second**0.5,
            kurtosis=central / variance**2 if variance > 0 else float("nan"),
            rms_min=self._rms_min,
            rms_max=self._rms_max,
            channel_std=tuple(channel_variance.sqrt().tolist()),
        )
