"""Task routing: every noise level sees its own fixed share of the channels, and near levels see nearly the same ones.

    Block(x) = x + F(x)    becomes    x + F(m_t * x)

with m_t a fixed row of zeros and ones for the noise level t. Nothing is learnt, nothing is added to the weights.

Source: Park et al. 2023, DTR, arXiv:2310.07138, eqs. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pagoda.diffusion.noise_index import NoiseIndex
from pagoda.errors import ConfigError
from pagoda.networks.extension import Extension
from pagoda.networks.parts import Context

SCHEMES = ("window", "random", "constant")


def window_starts(num_tasks: int, positions: int, alpha: float) -> Tensor:
    """Where the window of each task starts (T,): round((t / (T - 1))^alpha * positions), halves to even. Eq. 6."""
    t = torch.arange(num_tasks, dtype=torch.float64) / max(1, num_tasks - 1)
    return (t**alpha * positions).round().long()


def window_table(num_tasks: int, channels: int, active: int, alpha: float) -> Tensor:
    """One row of `channels` zeros and `active` neighbouring ones for every task (T, channels), float32."""
    starts = window_starts(num_tasks, channels - active, alpha)[:, None]
    places = torch.arange(channels)[None]
    return ((places >= starts) & (places < starts + active)).float()


class TaskMasks(Extension):
    """Masks of the inputs of residual branches by noise level.

    Args:
        index: Arguments of `NoiseIndex`: which task a time input is.
        beta: Share of the channels that a task sees; int(channels * beta) of them, as the paper's code cuts it off.
        alpha: 1 moves the window evenly; larger values leave clean levels together and move the noisy ones.
        scheme: window; random (a random subset for each task, an ablation); constant (the first task's for all, an ablation).
        seed: Of the random subsets.

    Raises:
        ConfigError: a share outside (0, 1], a negative alpha, an unknown scheme; at `attach`: a share that leaves no channel.
    """

    def __init__(
        self,
        *,
        index: Mapping[str, Any],
        beta: float = 0.8,
        alpha: float = 4.0,
        scheme: str = "window",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < beta <= 1 or not alpha >= 0:
            raise ConfigError(f"beta must lie in (0, 1] and alpha be >= 0, got {beta} and {alpha}.")
        if scheme not in SCHEMES:
            raise ConfigError(f"the scheme of task masks must be one of {SCHEMES}, got {scheme!r}.")
        self.index = NoiseIndex(**index)
        self.beta, self.alpha, self.scheme, self.seed = beta, alpha, scheme, seed

    def attach(self, net: Any) -> None:
        for width in self._widths(net):
            if f"table_{width}" not in dict(self.named_buffers()):
                # Rebuilt from the config, the random ones from their seed: not part of the weights.
                self.register_buffer(f"table_{width}", self.table(width), persistent=False)

    def table(self, channels: int) -> Tensor:
        """Masks (T, channels) of zeros and ones."""
        active, total = int(channels * self.beta), self.index.num_tasks
        if active == 0:
            raise ConfigError(f"beta={self.beta} leaves no channel of {channels}; use at least {1 / channels:.3g}.")
        if self.scheme == "random":
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.rand(total, channels, generator=generator).argsort(1)
            return torch.zeros(total, channels).scatter_(1, order[:, :active], 1.0)
        table = window_table(total, channels, active, self.alpha)
        return table[:1].expand(total, -1).clone() if self.scheme == "constant" else table

    def mask(self, t: Tensor, channels: int) -> Tensor:
        """Masks (B, channels) of time inputs (B,)."""
        return self.get_buffer(f"table_{channels}")[self.index(t)]

    def affinity(self, channels: int) -> Tensor:
        """Share of channels that two tasks have in common (T, T)."""
        table = self.get_buffer(f"table_{channels}")
        return table @ table.T / table[0].sum()

    def input_mask(self, net: Any, part: str, hidden: Tensor, context: Context) -> Tensor | None:
        channels = hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2]
        key = f"task_mask_{channels}"
        if key not in context.carried:  # the same in every block of a run
            mask = self.mask(context.time, channels).to(hidden.dtype)
            context.carried[key] = mask[:, :, None, None] if hidden.ndim == 4 else mask[:, None]
        return context.carried[key]

    @staticmethod
    def _widths(net: Any) -> list[int]:
        """Widths of the inputs of all residual branches."""
        if hasattr(net, "transformer_blocks"):
            return [int(net.inner_dim)]
        blocks = [*net.down_blocks, *net.up_blocks]
        return sorted({int(resnet.in_channels) for block in blocks for resnet in block.resnets})
