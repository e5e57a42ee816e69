"""The law of the noise level in training, and the index that a noise level has under it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NoiseLaw:
    """The law of the noise level in training: ln sigma ~ N(mean, std^2). Source: Karras et al. 2022, table 1."""

    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"the std of ln sigma must be > 0, got {self.std}.")

    def draw(self, normal: Tensor) -> Tensor:
        """Noise levels from unit Gaussian draws."""
        return (self.mean + self.std * normal).exp()

    def quantile(self, sigma: Tensor) -> Tensor:
        """The share of training noise levels below `sigma`, in [0, 1], float64: 0 is the cleanest."""
        z = (sigma.double().log() - self.mean) / self.std
        return 0.5 * torch.erfc(-z / math.sqrt(2))

    def sigma_at(self, quantile: Tensor) -> Tensor:
        """The noise level below which a share `quantile` (in (0, 1)) of training levels lies, float64."""
        z = math.sqrt(2) * torch.erfinv(2 * quantile.double() - 1)
        return (self.mean + self.std * z).exp()
