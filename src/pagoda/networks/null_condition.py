"""What a text-conditional network receives where nothing was said: one fixed row of embeddings, kept with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion.conditions import Condition
from pagoda.errors import ConfigError, ShapeError, did_you_mean

SLOTS = {"tokens": 2, "tokens_mask": 1, "pooled": 1}
"""Slots that can be kept, with the number of axes of one row: tokens (T, D), tokens_mask (T,) bool, pooled (P,)."""


class NullCondition(nn.Module):
    """One row for each slot, as buffers. Usually the embedding of the empty prompt.

    Args:
        shapes: Slot -> shape of its row; filled by `set` or by loading weights. A slot that is not named is not filled.

    Raises:
        ConfigError: an unknown slot.
        ShapeError: a row with another number of axes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if name not in SLOTS:
                raise ConfigError(f"`{name}` cannot be a null condition. {did_you_mean(name, SLOTS)}")
            if len(shape) != SLOTS[name]:
                raise ShapeError(f"the null condition `{name}` has {SLOTS[name]} axes, got the shape {tuple(shape)}.")
            self.register_buffer(
                name, torch.zeros(tuple(shape), dtype=torch.bool if name == "tokens_mask" else torch.float32)
            )

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> NullCondition:
        """The null condition that holds these rows.

        Raises:
            ConfigError: an unknown slot, or values that are not finite.
            ShapeError: a row with another number of axes.
        """
        null = cls({name: tuple(row.shape) for name, row in rows.items()})
        for name, row in rows.items():
            if not bool(row.isfinite().all()):
                raise ConfigError(f"the null condition `{name}` holds values that are not finite.")
            null.get_buffer(name).copy_(row)
        return null

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Slot -> shape of its row: plain values, for a config."""
        return {name: list(row.shape) for name, row in self.rows().items()}

    def rows(self) -> dict[str, Tensor]:
        """The row of each slot."""
        return dict(self.named_buffers())

    def fill(self, condition: Condition, batch: int) -> Condition:
        """The condition with the slots that it lacks; those that are set stay as they are.

        A mask belongs to its tokens: it is filled only together with them.
        """
        missing: dict[str, Any] = {}
        for name, row in self.rows().items():
            absent = getattr(condition, name) is None
            if absent and not (name == "tokens_mask" and condition.tokens is not None):
                missing[name] = row.expand(batch, *row.shape)
        return replace(condition, **missing)
