"""Schedules: how much signal and how much noise a diffusion process holds at each time.

x_t = alpha_t x_0 + sigma_t eps, with t = t_min near the data. Any two schedules are one up to scale and clock: dividing by alpha
gives the canonical state, whose noise level is nu = sigma / alpha. Times and levels are handled in float64, because VP schedules
reach nu > 150 where float32 loses the small alpha.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagoda.errors import ConfigError


class Schedule(ABC):
    """alpha_t and sigma_t with their derivatives; times are float64 tensors of any shape in [t_min, t_max]."""

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale alpha_t > 0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale sigma_t."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def _invert_nu(self, nu: Tensor) -> Tensor:
        """The time of a noise ratio that lies in the schedule's range; callers use `t_of_nu`."""

    def t_of_nu(self, nu: Tensor) -> Tensor:
        """The time whose noise ratio sigma / alpha is `nu` (float64).

        Raises:
            ConfigError: `nu` is outside the range that the schedule covers.
        """
        low, high = self.nu(torch.tensor([self.t_min, self.t_max], dtype=torch.float64)).tolist()
        # Outside, the network was never trained; the tolerance only forgives the rounding of float32.
        if bool((nu < low * (1 - 1e-6)).any()) or bool((nu > high * (1 + 1e-6)).any()):
            raise ConfigError(
                f"noise levels {nu.min():.4g} to {nu.max():.4g} leave the range of this schedule, "
                f"{low:.4g} to {high:.4g}. Choose sigma_min and sigma_max inside it."
            )
        return self._invert_nu(nu)

    def nu(self, t: Tensor) -> Tensor:
        """Noise ratio sigma / alpha: the canonical noise level."""
        return self.sigma(t) / self.alpha(t)

    def lam(self, t: Tensor) -> Tensor:
        """Half log-SNR, log(alpha / sigma); decreases in t."""
        return -self.nu(t).log()

    def network_time(self, t: Tensor) -> Tensor:
        """What a network trained on this schedule receives as its time input; the time itself unless overridden."""
        return t

    def rescale_to(self, other: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, clock): the state of `self` at t is `scale` times smaller than that of `other` at time `clock`.

        x_other = scale * x_self has equal noise ratio. Source: flow maps, arXiv:2510.21890.
        """
        clock = other.t_of_nu(self.nu(t))
        return other.alpha(clock) / self.alpha(t), clock


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """alpha = 1, sigma = t: the canonical schedule itself. Source: Karras et al. 2022, arXiv:2206.00364."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _invert_nu(self, nu: Tensor) -> Tensor:
        return nu


@dataclass(frozen=True)
class VESchedule(Schedule):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. Source: Song et al. 2021, arXiv:2011.13456."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self._rate * self.sigma(t)

    def _invert_nu(self, nu: Tensor) -> Tensor:
        return (nu / self.sigma_min).log() / self._rate


@dataclass(frozen=True)
class LinearVPSchedule(Schedule):
    """Variance preserving with linear beta: log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.

    Source: Song et al. 2021, arXiv:2011.13456, eq. 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * (t * (self.beta_max - self.beta_min) + self.beta_min) / 2

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.dalpha(t) / self.sigma(t)  # from alpha^2 + sigma^2 = 1

    def _invert_nu(self, nu: Tensor) -> Tensor:
        # -2 log alpha = log(1 + nu^2) is quadratic in t; the form below does not cancel for small nu.
        c = torch.log1p(nu**2)
        slope = self.beta_max - self.beta_min
        return 2 * c / (self.beta_min + (self.beta_min**2 + 2 * slope * c).sqrt())


@dataclass(frozen=True)
class CosineVPSchedule(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the continuous cosine schedule; TrigFlow with the angle as a fraction.

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17 without its offset.
    """

    t_min: float = 1e-4
    t_max: float = 1 - 1e-4

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def _invert_nu(self, nu: Tensor) -> Tensor:
        return torch.atan(nu) * 2 / math.pi


@dataclass(frozen=True)
class FlowMatchingSchedule(Schedule):
    """alpha = 1 - t, sigma = t: rectified flow with t = 0 the data.

    Args:
        time_scale: Networks receive `time_scale * t`; diffusers' flow networks expect 1000.

    Source: Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747.
    """

    time_scale: float = 1.0
    t_min: float = 1e-4
    t_max: float = 1 - 1e-4

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _invert_nu(self, nu: Tensor) -> Tensor:
        return nu / (1 + nu)

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t


@dataclass(frozen=True, eq=False)
class DiscreteVPSchedule(Schedule):
    """A table of alphas_cumprod, read at fractional steps by linear interpolation of log nu; t counts steps from 0.

    Args:
        alphas_cumprod: (T,), decreasing, in (0, 1).

    Raises:
        ConfigError: the table is not strictly decreasing inside (0, 1). A last value of 0 (zero terminal SNR) is refused
            too: its state holds no signal, so that it has no canonical form; drop that step.
    """

    alphas_cumprod: Tensor
    t_min: float = field(init=False, default=0.0)
    t_max: float = field(init=False, default=0.0)
    _log_nu: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ConfigError(f"alphas_cumprod must be a table of at least two steps, got shape {tuple(table.shape)}.")
        if not bool(((table > 0) & (table < 1)).all()) or not bool((table.diff() < 0).all()):
            raise ConfigError(
                "alphas_cumprod must decrease strictly inside (0, 1), got values from "
                f"{table[0]:.6g} to {table[-1]:.6g}. With zero terminal SNR, leave out the last step."
            )
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "_log_nu", ((1 - table) / table).log() / 2)
        object.__setattr__(self, "t_max", float(len(table) - 1))

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log nu, d log nu / dt) at fractional steps."""
        table = self._log_nu.to(t.device)
        left = t.floor().long().clamp(0, len(table) - 2)
        slope = table[left + 1] - table[left]
        return table[left] + (t - left) * slope, slope

    def alpha(self, t: Tensor) -> Tensor:
        log_nu, _ = self._interval(t.double())
        return torch.rsqrt(1 + (2 * log_nu).exp())

    def sigma(self, t: Tensor) -> Tensor:
        log_nu, _ = self._interval(t.double())
        return torch.rsqrt(1 + (-2 * log_nu).exp())

    def dalpha(self, t: Tensor) -> Tensor:
        _, slope = self._interval(t.double())
        return -self.alpha(t) * self.sigma(t) ** 2 * slope

    def dsigma(self, t: Tensor) -> Tensor:
        _, slope = self._interval(t.double())
        return self.sigma(t) * self.alpha(t) ** 2 * slope

    def _invert_nu(self, nu: Tensor) -> Tensor:
        table = self._log_nu.to(nu.device)
        log_nu = nu.double().log()
        right = torch.searchsorted(table, log_nu.contiguous()).clamp(1, len(table) - 1)
        left = right - 1
        return (left + (log_nu - table[left]) / (table[right] - table[left])).clamp(0, self.t_max)
