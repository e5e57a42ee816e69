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
    gaussian_distance: float
    """Wasserstein distance of order 2 between the values and the nearest Gaussian, in units of the latents: 0 for a Gaussian of any
    mean and std, and 0.21 for a uniform law of std 1."""
    rms_min: float
    """Smallest root mean square of a single latent."""
    rms_max: float
    """Largest root mean square of a single latent."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dict(asdict(self), channel_std=list(self.channel_std))


_REACH, _BINS = 16.0, 16384
"""Of the histogram behind the distance to a Gaussian: from -16 to 16, what lies outside counts at its ends."""


def nearest_gaussian(counts: Tensor, reach: float) -> float:
    """Wasserstein distance of order 2 from a law on the line to the nearest Gaussian, of whatever mean and std.

    With quantile function Q, W^2(N(m, s^2)) = int (Q(u) - m - s q(u))^2 du, q that of N(0, 1), is smallest at m = the mean and
    s = int Q q du, where it is Var - s^2. Over a bin with shares u_0 to u_1 below its ends, int q du = phi(q(u_0)) - phi(q(u_1)).

    Args:
        counts: Histogram over equal bins from -reach to reach, (N,) float64.
    """
    shares = counts / counts.sum()
    width = 2 * reach / len(counts)
    middles = -reach + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)]).clamp(0, 1)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    quantiles = normal.icdf(below.clamp(1e-300, 1 - 1e-16))
    densities = normal.log_prob(quantiles).exp()
    mean = (shares * middles).sum()
    variance = (shares * (middles - mean).square()).sum()
    spread = (middles * (densities[:-1] - densities[1:])).sum()
    return float((variance - spread.square()).clamp_min(0).sqrt())


class MomentSums:
    """Sums of powers, in float64, over latents (B, C, H, W) that arrive in pieces."""

    def __init__(self, channels: int) -> None:
        self._powers = torch.zeros(4, channels, dtype=torch.float64)
        self._values_per_channel = 0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._rms_min, self._rms_max = float("inf"), 0.0

    def add(self, z: Tensor) -> None:
        """Take in more latents (B, C, H, W)."""
        z = z.detach().double()
        power = z
        for order in range(4):
            self._powers[order] += power.sum((0, 2, 3)).cpu()
            power = power * z
        self._values_per_channel += z.shape[0] * z.shape[2] * z.shape[3]
        # 32-bit: histc is defined for floats, and a bin is far wider than the rounding.
        inside = z.float().clamp(-_REACH, _REACH).flatten().cpu()
        self._counts += torch.histc(inside, _BINS, -_REACH, _REACH).double()
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
            gaussian_distance=nearest_gaussian(self._counts, _REACH),
            rms_min=self._rms_min,
            rms_max=self._rms_max,
            channel_std=tuple(channel_variance.sqrt().tolist()),
        )
