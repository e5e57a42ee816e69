"""The noise level as one of T tasks, 0 the cleanest: what routing by noise level looks up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pagoda.errors import ConfigError

KINDS = ("quantile", "uniform", "timestep")


@dataclass(frozen=True, kw_only=True)
class NoiseIndex:
    """A network's time input as an index 0 .. num_tasks - 1.

    | kind | the time input t is | index |
    |---|---|---|
    | quantile | noise_scale * ln(sigma) | floor(T * share of training noise levels below sigma) |
    | uniform | a flow's time in [0, 1] | floor(T t) |
    | timestep | 0 .. T - 1 | t |

    `quantile` gives every task the same share of the training, as `timestep` does in DDPM.

    Raises:
        ConfigError: an unknown kind, no task, or a law without width.
    """

    kind: Literal["quantile", "uniform", "timestep"] = "quantile"
    num_tasks: int = 1000
    mean: float = -1.2
    """quantile: mean of ln sigma in training."""
    std: float = 1.2
    """quantile: standard deviation of ln sigma in training."""
    noise_scale: float = 25.0
    """quantile: the network is told noise_scale * ln(sigma)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"the kind of a noise index must be one of {KINDS}, got {self.kind!r}.")
        if self.num_tasks < 1 or not self.std > 0 or not self.noise_scale > 0:
            raise ConfigError(
                f"a noise index needs num_tasks >= 1, std > 0 and noise_scale > 0, "
                f"got {self.num_tasks}, {self.std} and {self.noise_scale}."
            )

    def __call__(self, t: Tensor) -> Tensor:
        """Indices (B,) int64 of time inputs (B,).

        Raises:
            ConfigError: a time outside of [0, 1] (uniform), or one that is not a whole number of 0 .. T - 1 (timestep).
        """
        total = self.num_tasks
        if self.kind == "quantile":
            z = (t.double() / self.noise_scale - self.mean) / self.std
            return (0.5 * torch.erfc(-z / math.sqrt(2)) * total).long().clamp(0, total - 1)
        if self.kind == "uniform":
            if bool(((t < 0) | (t > 1)).any()):
                raise ConfigError(f"times of a flow lie in [0, 1], got {t.min():.4g} to {t.max():.4g}.")
            return (t.double() * total).long().clamp(0, total - 1)
        if bool(((t != t.round()) | (t < 0) | (t > total - 1)).any()):
            raise ConfigError(
                f"timesteps are whole numbers of 0 to {total - 1}, the original ones in a respaced sampler too; got {t.tolist()}."
            )
        return t.long()

    def times(self) -> Tensor:
        """One time input (T,) float32 in the middle of each task."""
        total = self.num_tasks
        middle = (torch.arange(total, dtype=torch.float64) + 0.5) / total
        if self.kind == "timestep":
            return torch.arange(total, dtype=torch.float32)
        if self.kind == "uniform":
            return middle.float()
        z = math.sqrt(2) * torch.erfinv(2 * middle - 1)
        return (self.noise_scale * (self.mean + self.std * z)).float()
