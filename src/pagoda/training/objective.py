"""What the loop trains: the protocol between one objective and the one loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, nn

from pagoda.training.optim import OptimizerConfig
from pagoda.training.randomness import StepRandom
from pagoda.training.runtime import Runtime

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Trainable:
    """A network under training.

    Args:
        module: Parameters with `requires_grad` are trained; everything else is saved with it all the same.
        optimizer: How.
        ema: Decay of the average of its weights; None keeps no average.
    """

    module: nn.Module
    optimizer: OptimizerConfig
    ema: float | None = None


@dataclass(frozen=True)
class Losses:
    """What one network is to descend, and what is worth logging.

    Args:
        total: Scalar whose gradient is taken: the mean over this process's rows.
        named: Losses and other figures by name, each per sample (B,) before reduction, or a scalar.
    """

    total: Tensor
    named: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC, Generic[BatchT]):
    """Several networks, how a batch is made, and what each network descends.

    In every step the loop asks for one batch and then for the losses of each network in the order of `trainables`, updating
    that network before it asks for the next: alternating updates of a generator and a discriminator are two entries.
    """

    @abstractmethod
    def trainables(self) -> Mapping[str, Trainable]:
        """The networks under training, by name, in the order of their updates."""

    def updates(self) -> Sequence[tuple[str, str]]:
        """The updates of one step, in order: the name that `losses` is asked for, and the network that descends them.

        A network may be updated several times in a step, with the one optimiser that it has. One update for each by default.
        """
        return [(name, name) for name in self.trainables()]

    @abstractmethod
    def batch(self, indices: Tensor, random: StepRandom) -> BatchT:
        """Data for the samples `indices` (B,) int64, on the CPU; called ahead of the step, perhaps in another thread."""

    @abstractmethod
    def losses(self, name: str, batch: BatchT, random: StepRandom, runtime: Runtime) -> Losses | None:
        """The losses of update `name` (see `updates`) on this process's rows; None leaves the network as it is."""

    def receive_averages(self, averages: Mapping[str, nn.Module]) -> None:
        """Called once by the loop with the averages that it keeps, by name of the network; most objectives need none."""

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        """Images (N, C, H, W) in [-1, 1] on fixed noise, from the given (raw or averaged) networks; None shows nothing."""
        return None
