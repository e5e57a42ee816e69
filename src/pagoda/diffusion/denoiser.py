"""The one interface to every diffusion model: `denoiser(x, sigma, condition) -> E[x_0 | x]` in the canonical state.

The canonical state is x = x_0 + sigma * n with n ~ N(0, I), whatever schedule the network was trained with. A state
x_t = alpha_t x_0 + sigma_t eps of another schedule becomes canonical by x = x_t / alpha_t, sigma = sigma_t / alpha_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.diffusion.predictions import convert
from pagoda.diffusion.scheduler_configs import schedule_from_scheduler
from pagoda.diffusion.schedules import Schedule
from pagoda.errors import ConfigError, ShapeError

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""What a denoiser needs of a network: (input (B, C, H, W), time or noise embedding input (B,), condition) -> output."""


class Denoiser(nn.Module, ABC):
    """Estimates the clean image. Differentiable, without hidden state; denoisers wrap denoisers.

    A subclass implements `denoise`. Callers use `denoiser(x, sigma, condition)`, which also takes a number for `sigma`.
    """

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Estimate x_0.

        Args:
            x: Canonical noisy images (B, C, H, W).
            sigma: Noise level, one for all or (B,), > 0, in the units of the data.
            condition: One row per sample, or nothing.

        Returns:
            E[x_0 | x], (B, C, H, W).

        Raises:
            ShapeError: `sigma` or `condition` has another batch size than `x`.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        if sigma.ndim == 0:
            sigma = sigma.expand(len(x))
        if sigma.shape != (len(x),):
            raise ShapeError(f"sigma must be a number or have shape ({len(x)},), got {tuple(sigma.shape)}.")
        if condition.batch_size not in (None, len(x)):
            raise ShapeError(f"the condition has {condition.batch_size} rows for {len(x)} images.")
        return self.denoise(x, sigma, condition)

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Estimate x_0 from canonical `x` (B, C, H, W) at `sigma` (B,)."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that it takes; (0, inf) where every level will do."""
        return 0.0, math.inf


class PreconditionedDenoiser(Denoiser):
    """A network between its scalings: x0 = c_skip x + c_out F(c_in x, c_noise). Every kind of prediction is of this form."""

    network: Network

    @abstractmethod
    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at `sigma`, of its shape and type."""

    @abstractmethod
    def noise_input(self, sigma: Tensor) -> Tensor:
        """c_noise: what the network's noise embedding receives, (B,)."""

    @property
    @abstractmethod
    def preconditioning(self) -> dict[str, Any]:
        """The scalings as plain JSON values: `precondition(network, **preconditioning)` is this denoiser again."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...), to multiply a batch shaped `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class EDMDenoiser(PreconditionedDenoiser):
    """A network under EDM preconditioning: x0 = c_skip x + c_out F(c_in x, c_noise).

    Args:
        network: F; sees inputs of unit variance.
        sigma_data: Standard deviation of the data.
        noise_scale: c_noise = noise_scale * ln(sigma). 250 suits networks whose time embedding was made for 0..1000
            (the convention of consistency models and of the official PaGoDA code); NVlabs/edm uses 0.25.

    Source: Karras et al. 2022, arXiv:2206.00364, table 1 and eq. 7.
    """

    def __init__(self, network: Network, *, sigma_data: float = 0.5, noise_scale: float = 250.0) -> None:
        super().__init__()
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data must be > 0, got {sigma_data}.")
        self.network = network
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at `sigma`."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt()

    def noise_input(self, sigma: Tensor) -> Tensor:
        """c_noise: what the network's noise embedding receives, (B,)."""
        return self.noise_scale * sigma.log()

    @property
    def preconditioning(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data, "noise_scale": self.noise_scale}

    def network_input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with for canonical `x` (B, C, H, W) at `sigma` (B,): its input and its time."""
        return per_sample(self.scalings(sigma)[2], x) * x, self.noise_input(sigma)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        c_skip, c_out, _ = (per_sample(c, x) for c in self.scalings(sigma))
        scaled, time = self.network_input(x, sigma)
        return c_skip * x + c_out * self.network(scaled, time, condition)


class ScheduledDenoiser(PreconditionedDenoiser):
    """A network trained on some schedule with some prediction, read as a canonical denoiser.

    Args:
        network: Sees x_t = alpha_t x_0 + sigma_t eps and the schedule's time.
        schedule: Gives alpha, sigma and the time of a noise level.
        prediction: What the network estimates: "eps", "x0", "v" or "velocity" (see `schedules.convert`).
        scheduler: The diffusers configuration that schedule and prediction were read from, where there is one.
    """

    def __init__(
        self, network: Network, schedule: Schedule, prediction: str, *, scheduler: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.scheduler = None if scheduler is None else dict(scheduler)

    @property
    def sigma_range(self) -> tuple[float, float]:
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        low, high = self.schedule.nu(ends).tolist()
        return low, high

    @property
    def preconditioning(self) -> dict[str, Any]:
        """See `PreconditionedDenoiser`.

        Raises:
            ConfigError: the schedule was not read from a scheduler, so that nothing describes it.
        """
        if self.scheduler is None:
            raise ConfigError(
                "this denoiser's schedule was made by hand and has no description; build it with `precondition`."
            )
        return {"scheduler": self.scheduler}

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at `sigma`, of its shape and type.

        Raises:
            ConfigError: a noise level outside the schedule.
        """
        t = self.schedule.t_of_nu(sigma.double())
        alpha, none, one = self.schedule.alpha(t), torch.zeros_like(t), torch.ones_like(t)
        # x0 is linear in (state, prediction): its two coefficients are what it gives for (1, 0) and for (0, 1).
        c_skip = alpha * convert(none, one, t, self.prediction, "x0", self.schedule)
        c_out = convert(one, none, t, self.prediction, "x0", self.schedule)
        return c_skip.to(sigma), c_out.to(sigma), alpha.to(sigma)

    def noise_input(self, sigma: Tensor) -> Tensor:
        """The network's time, (B,).

        Raises:
            ConfigError: a noise level outside the schedule.
        """
        return self.schedule.network_time(self.schedule.t_of_nu(sigma.double())).to(sigma)

    def network_input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with for canonical `x` (B, C, H, W) at `sigma` (B,): its input and its time.

        Raises:
            ConfigError: a noise level outside the schedule.
        """
        return self._at_time(x, self.schedule.t_of_nu(sigma.double()))

    def _at_time(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x * per_sample(self.schedule.alpha(t).to(x.dtype), x), self.schedule.network_time(t).to(x.dtype)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        t = self.schedule.t_of_nu(sigma.double())
        x_t, time = self._at_time(x, t)
        prediction = self.network(x_t, time, condition)
        t = per_sample(t, x)
        x0 = convert(prediction.double(), x_t.double(), t, self.prediction, "x0", self.schedule)
        return x0.to(x.dtype)


def precondition(
    network: Network,
    *,
    sigma_data: float = 0.5,
    noise_scale: float = 250.0,
    scheduler: Mapping[str, Any] | None = None,
) -> PreconditionedDenoiser:
    """A network as the denoiser that it was trained to be.

    Args:
        network: F.
        sigma_data: Of EDM preconditioning; not read where a scheduler is given.
        noise_scale: Of EDM preconditioning; not read where a scheduler is given.
        scheduler: Configuration of a diffusers scheduler, with its class in `_class_name`. None: EDM preconditioning.

    Raises:
        ConfigError: a scheduler that cannot be read (see `schedule_from_scheduler`).
    """
    if scheduler is None:
        return EDMDenoiser(network, sigma_data=sigma_data, noise_scale=noise_scale)
    schedule, prediction = schedule_from_scheduler(dict(scheduler))
    if prediction == "edm":  # diffusers' EDM schedulers tell the network ln(sigma) / 4, as NVlabs/edm does
        return EDMDenoiser(network, sigma_data=float(scheduler["sigma_data"]), noise_scale=0.25)
    return ScheduledDenoiser(network, schedule, prediction, scheduler=scheduler)
