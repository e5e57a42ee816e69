"""What an image is conditioned on: typed slots, null values, and dropout in exactly one place.

A `Condition` holds one row per sample in every slot that is set. A slot that is `None` is absent for the whole batch;
one *sample* without a condition carries the slot's null value, so that conditional and unconditional samples share a batch:

| slot | shape | null value |
|---|---|---|
| `label` | (B,) int64 | `num_classes`, the extra row of the embedding table (written `NULL_LABEL` = -1 until a network resolves it) |
| `tokens` | (B, T, D) | zeros, with `tokens_mask` all False |
| `pooled` | (B, D) | zeros |
| `image` | (B, C, H, W), concatenated to the input | zeros |
| `guidance` | (B,) guidance weight w that the network is conditioned on | 1 (no guidance) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError

NULL_LABEL = -1
"""Label of a sample without a class. Networks map it to the last row of their embedding table."""


@dataclass(frozen=True)
class Condition:
    """Per-sample conditions; every slot that is set has the batch as its first axis.

    Raises:
        ShapeError: slots disagree about the batch size.
    """

    label: Tensor | None = None
    tokens: Tensor | None = None
    tokens_mask: Tensor | None = None
    pooled: Tensor | None = None
    image: Tensor | None = None
    guidance: Tensor | None = None

    def __post_init__(self) -> None:
        # Not `len`, here and in networks: exported graphs would take it for a constant.
        sizes = {name: value.shape[0] for name, value in self.slots().items()}
        if any(size != next(iter(sizes.values())) for size in sizes.values()):
            raise ShapeError(f"the slots of a condition must share one batch size, got {sizes}.")

    def slots(self) -> dict[str, Tensor]:
        """The slots that are set, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}

    @property
    def batch_size(self) -> int | None:
        """Number of samples, or None when nothing is set (any batch size fits)."""
        return next((value.shape[0] for value in self.slots().values()), None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `function` applied to every slot that is set."""
        return replace(self, **{name: function(value) for name, value in self.slots().items()})

    def to(self, device: torch.device | str) -> Condition:
        """The condition on another device."""
        return self.map(lambda value: value.to(device))

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Rows of the condition: a slice, a boolean mask or an index tensor."""
        return self.map(lambda value: value[index])

    def null(self) -> Condition:
        """The same slots, every sample without its condition. `guidance` is a setting, not a condition: it stays."""
        dropped = {name: _null_like(name, value) for name, value in self.slots().items()}
        return replace(self, **dropped)

    def drop(self, probability: float, generator: torch.Generator | None = None) -> Condition:
        """Each sample loses its whole condition with `probability`: the one place where conditions are dropped.

        Args:
            probability: Chance per sample, in [0, 1].
            generator: Source of the draw; lives on the CPU so that every device draws alike.

        Raises:
            ConfigError: `probability` is outside [0, 1].
        """
        if not 0 <= probability <= 1:
            raise ConfigError(f"condition dropout must lie in [0, 1], got {probability}.")
        size = self.batch_size
        if size is None or probability == 0:
            return self
        lost = torch.rand(size, generator=generator) < probability
        return self.drop_rows(lost)

    def drop_rows(self, lost: Tensor) -> Condition:
        """Samples where `lost` (B,) is True lose their whole condition."""

        def choose(name: str, value: Tensor) -> Tensor:
            mask = lost.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
            return torch.where(mask, _null_like(name, value), value)

        return replace(self, **{name: choose(name, value) for name, value in self.slots().items()})

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """Join conditions along the batch.

        Raises:
            ShapeError: the conditions do not have the same slots set.
        """
        names = [tuple(condition.slots()) for condition in conditions]
        if len(set(names)) != 1:
            raise ShapeError(f"conditions to be joined must set the same slots, got {names}.")
        return Condition(**{name: torch.cat([getattr(c, name) for c in conditions]) for name in names[0]})

    @staticmethod
    def of_labels(labels: Tensor | list[int] | None) -> Condition:
        """A condition on class labels (B,), or on nothing."""
        if labels is None:
            return Condition()
        return Condition(label=torch.as_tensor(labels, dtype=torch.int64))


def _null_like(name: str, value: Tensor) -> Tensor:
    if name == "label":
        return torch.full_like(value, NULL_LABEL)
    if name == "guidance":
        return value
    return torch.zeros_like(value)


UNCONDITIONAL = Condition()
"""A condition on nothing."""
