"""What an image may be: the conditions among which the diffusion classifier chooses, several to a class where wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser
from pagoda.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class Candidates:
    """K conditions, and the class that each stands for.

    Attributes:
        condition: K rows: labels, or the tokens of K prompts of one length.
        classes: (K,) int64 from 0: several prompts may stand for one class; the best of them counts.
        names: One name per class.

    Raises:
        ConfigError: fewer than two classes, a class without a condition, or names of another number.
        ShapeError: classes of another number than conditions.
    """

    condition: Condition
    classes: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = self.condition.batch_size
        if rows is None:
            raise ConfigError("the candidates set no slot of a condition; give labels, or tokens of prompts.")
        if self.classes.shape != (rows,):
            raise ShapeError(f"{rows} conditions need as many classes, got {tuple(self.classes.shape)}.")
        found = sorted(set(self.classes.tolist()))
        if len(found) < 2:
            raise ConfigError(f"there is one class ({found}), so there is nothing to choose; give two or more.")
        if found != list(range(len(found))):
            raise ConfigError(f"classes must be numbered 0, 1, 2, ... with a condition each, got {found}.")
        if len(self.names) != len(found):
            raise ConfigError(f"{len(self.names)} names for {len(found)} classes.")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes, at most the number of conditions."""
        return len(self.names)

    @classmethod
    def of_labels(cls, labels: list[int] | Tensor, names: list[str] | None = None) -> Candidates:
        """One candidate per label; class k is labels[k].

        Raises:
            ConfigError: fewer than two labels, a label twice, or the label of no class, which does not compare.
        """
        values = torch.as_tensor(labels, dtype=torch.int64).tolist()
        if len(set(values)) != len(values):
            raise ConfigError(f"labels must differ, got {values}.")
        if any(value < 0 for value in values):
            raise ConfigError(f"{values}: the label of no class is no candidate; its error does not compare.")
        shown = tuple(names) if names is not None else tuple(str(value) for value in values)
        return cls(Condition.of_labels(values), torch.arange(len(values)), shown)

    @classmethod
    def of_model(cls, denoiser: Denoiser, names: list[str] | None = None) -> Candidates:
        """Every class of a class-conditional model.

        Raises:
            ConfigError: the model knows no classes, or one only.
        """
        network: Any = getattr(denoiser, "network", None)
        count = int(getattr(network, "num_classes", 0))
        if count == 0:
            raise ConfigError(
                "this model was trained without labels, so that it cannot say which class fits an image. Train one on "
                "labelled images, give `Candidates` for another condition, or fit a head on features (`pagoda probe fit`)."
            )
        return cls.of_labels(list(range(count)), names)
