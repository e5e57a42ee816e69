"""Noise levels for reading a model: sigma or log-SNR, the range that a model knows, and stratified grids whose prefixes nest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import EDMDenoiser, EDMSchedule, Schedule, ScheduledDenoiser
from pagoda.errors import ConfigError

_EDM_RANGE = (EDMSchedule.t_min, EDMSchedule.t_max)


def sigma_of_log_snr(log_snr: float) -> float:
    """The canonical noise level whose log signal-to-noise ratio ln(alpha^2 / sigma^2) is `log_snr`: exp(-log_snr / 2)."""
    return math.exp(-log_snr / 2)


def log_snr_of_sigma(sigma: float) -> float:
    """ln(1 / sigma^2) of a canonical noise level: the same number on every schedule."""
    return -2 * math.log(sigma)


def noise_range(denoiser: nn.Module) -> tuple[float, float]:
    """Noise levels that a denoiser was trained for: its schedule's range; 0.002 to 80 under EDM; unbounded for others."""
    if isinstance(denoiser, ScheduledDenoiser):
        ends = torch.tensor([denoiser.schedule.t_min, denoiser.schedule.t_max], dtype=torch.float64)
        low, high = denoiser.schedule.nu(ends).tolist()
        return float(low), float(high)
    return _EDM_RANGE if isinstance(denoiser, EDMDenoiser) else (0.0, math.inf)


def check_sigmas(sigmas: float | Sequence[float] | Tensor, known: tuple[float, float]) -> list[float]:
    """Noise levels as a list.

    Raises:
        ConfigError: there is none, or one is not finite, not > 0, or outside the range `known`.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).reshape(-1).tolist()
    if not levels:
        raise ConfigError("no noise level was given; name at least one sigma > 0.")
    low, high = known
    for sigma in levels:
        if not (math.isfinite(sigma) and sigma > 0 and low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6)):
            raise ConfigError(
                f"noise level sigma={sigma:.4g} is outside of what this model knows, {low:.4g} to {high:.4g} "
                f"(log-SNR {log_snr_of_sigma(high) if math.isfinite(high) else -math.inf:.3g} to "
                f"{log_snr_of_sigma(low) if low > 0 else math.inf:.3g}). Choose one inside."
            )
    return levels


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """Stratified noise levels in an order whose every prefix is spread over the whole range; see the constructors.

    Attributes:
        sigmas: (M,) float64, the centres of M strata of equal probability, in nested order.
        density: (M,) float64, density of ln sigma at each; what an average has to be divided by to become an integral.
    """

    sigmas: Tensor
    density: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    @classmethod
    def log_uniform(cls, num_levels: int, *, sigma_min: float = 0.02, sigma_max: float = 20.0) -> LevelGrid:
        """Even in ln sigma, that is in log-SNR.

        Raises:
            ConfigError: no level, or not 0 < sigma_min < sigma_max.
        """
        if not 0 < sigma_min < sigma_max:
            raise ConfigError(f"a grid needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        low, span = math.log(sigma_min), math.log(sigma_max / sigma_min)
        sigmas = (low + span * nested_strata(num_levels)).exp()
        return cls(sigmas, torch.full_like(sigmas, 1 / span))

    @classmethod
    def log_normal(cls, num_levels: int, *, mean: float = -1.2, std: float = 1.2) -> LevelGrid:
        """Even in the quantiles of ln sigma ~ N(mean, std^2), the law that EDM-type models are trained with.

        Raises:
            ConfigError: no level, or not std > 0.
        """
        if not std > 0:
            raise ConfigError(f"the std of ln sigma must be > 0, got {std}.")
        z = torch.special.ndtri(nested_strata(num_levels))
        density = (-(z**2) / 2).exp() / (std * math.sqrt(2 * math.pi))
        return cls((mean + std * z).exp(), density)

    @classmethod
    def of_schedule(cls, num_levels: int, schedule: Schedule) -> LevelGrid:
        """Even in the time of a schedule, as Diffusion Classifier does for a discrete one.

        Raises:
            ConfigError: no level.
        """
        span = schedule.t_max - schedule.t_min
        t = schedule.t_min + span * nested_strata(num_levels)
        # d ln nu / dt = sigma' / sigma - alpha' / alpha
        slope = schedule.dsigma(t) / schedule.sigma(t) - schedule.dalpha(t) / schedule.alpha(t)
        return cls(schedule.nu(t).double(), 1 / (span * slope.double()))


def nested_strata(count: int) -> Tensor:
    """(count,) float64: the centres (j + 1/2) / count of equal strata of (0, 1), in bit-reversed order of j.

    Every prefix covers the interval evenly, so a longer evaluation continues a shorter one and wastes nothing.

    Raises:
        ConfigError: a count below 1.
    """
    if count < 1:
        raise ConfigError(f"a grid needs at least one noise level, got {count}.")
    bits = max(1, (count - 1).bit_length())
    reversed_ = [int(format(j, f"0{bits}b")[::-1], 2) for j in range(2**bits)]
    order = torch.tensor([j for j in reversed_ if j < count], dtype=torch.float64)
    return (order + 0.5) / count
