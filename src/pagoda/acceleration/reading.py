"""What a network's output says of the clean image: how an output that is kept from step to step is brought up to date.

Along a step of Euler (DDIM) the estimate of the clean image and that of the noise stay what they were where nothing is computed. An
output need not: a velocity between them stays too, but the target of EDM preconditioning turns from the image to the noise as the
noise level falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """At one noise level: estimate = skip * input + out * output.

    Args:
        skip: Of the network's input, which is a multiple of the state.
        out: Of its output, not 0.
        channels: Those of the state. What a network is given or gives beyond them is no part of the estimate.
    """

    skip: float
    out: float
    channels: int

    def estimate(self, given: Tensor, output: Tensor) -> Tensor:
        """The clean image (B, C, H, W) that an output means."""
        given, output = wide(given[:, : self.channels]), wide(output[:, : self.channels])
        return self.skip * given + self.out * output

    def output(self, estimate: Tensor, given: Tensor, before: Tensor) -> Tensor:
        """The output that means this estimate; `before` gives the channels beyond the state's."""
        now = (estimate - self.skip * wide(given[:, : self.channels])) / self.out
        return torch.cat([now.to(before.dtype), before[:, self.channels :]], dim=1)


def wide(values: Tensor) -> Tensor:
    """At least float32: at low noise an output is a small difference of large numbers."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Preconditioning:
    """How a denoiser speaks to its network.

    Args:
        owner: A `PreconditionedDenoiser`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._like = next(iter(owner.parameters()))

    @classmethod
    def of(cls, model: nn.Module, *, within: nn.Module) -> Preconditioning | None:
        """That of the preconditioned denoiser that holds a model, somewhere within a module; None where none does."""
        for owner in within.modules():
            network = getattr(owner, "network", None)
            if hasattr(owner, "network_input") and isinstance(network, nn.Module) and model in set(network.modules()):
                return cls(owner)
        return None

    def time(self, sigma: float) -> Tensor:
        """What the network is told of a noise level (1,)."""
        x = self._like.new_zeros(1, 1, 1, 1)
        time: Tensor = self._owner.network_input(x, torch.tensor([sigma], dtype=x.dtype, device=x.device))[1]
        return time

    def reading(self, sigma: float, channels: int) -> Reading:
        """How its output is read at a noise level."""
        skip, out, scale = (float(c) for c in self._owner.scalings(torch.tensor([sigma], dtype=torch.float64)))
        return Reading(skip / scale, out, channels)
