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
        """The condition with the slots that it lacks; those that are set stay as they are, apart from texts that were dropped.

        A mask belongs to its tokens: it is filled only together with them. A sample whose mask is False throughout has lost its text
        (`Condition.drop`), and gets this one, if it has as many tokens. A null condition without a mask belongs to a network that reads
        every token, the padding too: a mask that hides nothing else goes no further.
        """
        if condition.tokens_mask is not None and condition.tokens is not None and "tokens" in self.rows():
            condition = self._fill_dropped(condition, condition.tokens, condition.tokens_mask)
        missing: dict[str, Any] = {}
        for name, row in self.rows().items():
            absent = getattr(condition, name) is None
            if absent and not (name == "tokens_mask" and condition.tokens is not None):
                missing[name] = row.expand(batch, *row.shape)
        return replace(condition, **missing)

    def _fill_dropped(self, condition: Condition, tokens: Tensor, mask: Tensor) -> Condition:
        rows, lost = self.rows(), ~mask.any(1)
        if rows["tokens"].shape[0] != tokens.shape[1]:
            return condition  # texts of another encoder than this one comes from: they know none as zeros, under their mask
        filled: dict[str, Any] = {"tokens": torch.where(lost[:, None, None], rows["tokens"], tokens)}
        if condition.pooled is not None and "pooled" in rows:
            filled["pooled"] = torch.where(lost[:, None], rows["pooled"], condition.pooled)
        own = rows.get("tokens_mask")
        if own is not None:
            filled["tokens_mask"] = torch.where(lost[:, None], own, mask)
        else:
            whole = mask | lost[:, None]
            # A graph cannot look at values, and keeps the mask; without one, the network does what it was trained to do.
            masked = torch.compiler.is_compiling() or not bool(whole.all())
            filled["tokens_mask"] = whole if masked else None
        return replace(condition, **filled)
