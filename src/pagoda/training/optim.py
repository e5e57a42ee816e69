"""Optimisers, learning rates and averages of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError

OPTIMIZERS = ("adam", "adamw", "radam")
RATE_SHAPES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How one network is optimised."""

    name: str = "adam"
    """adam, adamw or radam."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    weight_decay: float = 0.0
    """Decoupled for adamw, L2 for the others."""
    rate: str = "cosine"
    """Shape of the learning rate over the run: cosine to zero, or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 clips nothing."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {OPTIMIZERS}, got {self.name!r}.")
        if self.rate not in RATE_SHAPES:
            raise ConfigError(f"the learning-rate shape must be one of {RATE_SHAPES}, got {self.rate!r}.")
        if not self.lr > 0:
            raise ConfigError(f"lr must be > 0, got {self.lr}.")
        if self.clip < 0 or self.warmup_steps < 0:
            raise ConfigError(f"clip and warmup_steps must be >= 0, got {self.clip} and {self.warmup_steps}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are two decays in [0, 1), got {self.betas}.")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be >= 0, got {self.weight_decay}.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over those parameters that are to be trained."""
        trained = [p for p in parameters if p.requires_grad]
        if self.name == "radam":
            return torch.optim.RAdam(trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return kind(trained, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of step `step` of `num_steps`: a pure function, so that resuming needs no state."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.rate == "constant":
            return self.lr * warm
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, num_steps))))


class EMA:
    """Exponential moving average of a network's weights; buffers are copied.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights.

    Args:
        module: The network to average; left untouched.
        decay: Decay per step in [0, 1).

    Raises:
        ConfigError: `decay` is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the EMA decay must lie in [0, 1), got {decay}.")
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        averaged, live = dict(self.module.named_parameters()), dict(module.named_parameters())
        # Pairs are resolved once: looking names up every step costs as much as the update itself on small networks.
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([averaged[n] for n in trained], [live[n] for n in trained])
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average after step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, live = self._pairs
        if averaged:
            torch._foreach_lerp_(averaged, live, 1 - decay)
        for mine, other in self._buffers:
            mine.copy_(other)
