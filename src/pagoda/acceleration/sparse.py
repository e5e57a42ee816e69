"""Carries out Region-Adaptive Sampling: full steps that keep keys and values, sparse steps over the active tokens, and their choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pagoda.acceleration.plan import PlannedStep
from pagoda.acceleration.ras import RAS, count_left_out, select_tokens, token_scores
from pagoda.acceleration.reading import Reading
from pagoda.acceleration.split import Compile, Kept
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import Anatomy, KeptAttention, TokenRows, TransformerAnatomy


class SparseNetwork:
    """A transformer over all tokens, or over the active ones."""

    def __init__(self, parts: TransformerAnatomy, compile: Compile | None) -> None:
        self._parts = parts
        self.run = self._run if compile is None else compile(self._run)

    def _run(self, arguments: dict[str, Any], attention: KeptAttention | None, rows: TokenRows | None) -> Tensor:
        """Output patches (B, m, p * p * C) of the active rows."""
        parts = self._parts
        state = parts.enter(arguments)
        hidden = state.hidden if rows is None else parts.take(state.hidden, rows)
        return parts.head_tokens(parts.decode_tokens(hidden, state, kept=attention, rows=rows), state)

    def images(self, patches: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Patches of all tokens as images."""
        return self._parts.to_images(patches, self._parts.grid_of(arguments["hidden_states"]))

    def active_pixels(self, rows: TokenRows, patches: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Where the pixels of active tokens are, shaped as the images of `patches`."""
        active = patches.new_zeros(len(patches), rows.total).scatter_(1, rows.index, 1.0)
        return self.images(active[..., None].expand_as(patches), arguments) > 0


class TokenChoice:
    """Which tokens are active in the present step, and what is kept of the others, for all streams of one run."""

    def __init__(self, plan: RAS, num_steps: int, parts: Anatomy) -> None:
        self._plan, self._num_steps, self._parts = plan, num_steps, parts
        self._sparse = set(plan.sparse_steps(num_steps))
        self._budget: list[int] = []
        self._index: Tensor | None = None
        self._dropped: Tensor | None = None
        self._attention: dict[int, KeptAttention] = {}
        self.history: list[Tensor] = []

    def held(self) -> list[Any]:
        """Everything that is held besides outputs."""
        return list(self._attention.values())

    def observe(self, index: int, prediction: Tensor) -> None:
        """Choose the tokens of the step after `index` from the guided prediction (B, C, H, W)."""
        following = index + 1
        if following not in self._sparse:
            self._index = None
            return
        scores = token_scores(prediction, self._parts.stride, self._plan.metric)
        total = scores.shape[1]
        if not self._budget:
            self._budget = self._plan.token_budget(self._num_steps, total)
        cleared = index not in self._sparse and not self._plan.official_compat  # a full step has computed every token
        if self._dropped is None or cleared:
            self._dropped = torch.zeros_like(scores)
        self._index = select_tokens(scores, self._dropped, self._budget[following], self._plan, draw=following)
        self._dropped = count_left_out(self._dropped, self._index, self._plan)
        self.history.append(self._index)

    def run(
        self,
        network: SparseNetwork,
        step: PlannedStep,
        arguments: dict[str, Any],
        kept: Kept,
        plain: Callable[[dict[str, Any]], Tensor],
        reading: Reading | None,
    ) -> Tensor:
        """One call of the network: full, or over the active tokens with the rest as it was.

        With a `reading` it is the estimate of the clean image that stays, not the output.
        """
        following = step.index + 1 in self._sparse
        if step.kind != "full":
            output = self._part(network, arguments, kept, reading)
        elif following:
            output = self._whole(network, arguments, kept)
        else:
            kept.middle, output = None, plain(arguments)
        if not following:
            self._attention.pop(id(kept), None)
        if reading is not None:
            kept.estimate = reading.estimate(arguments["hidden_states"], output) if following else None
        return output

    def _whole(self, network: SparseNetwork, arguments: dict[str, Any], kept: Kept) -> Tensor:
        """All tokens, with keys and values kept."""
        attention = KeptAttention() if self._plan.kv_cache else None
        kept.middle = network.run(arguments, attention, None)
        if attention is not None:
            self._attention[id(kept)] = attention
        return network.images(kept.middle, arguments)

    def _part(self, network: SparseNetwork, arguments: dict[str, Any], kept: Kept, reading: Reading | None) -> Tensor:
        """The active tokens, with the rest as it was."""
        if self._index is None:
            raise ConfigError(
                "no prediction was seen to choose tokens by: the pipeline must step its own scheduler, a loop of your own "
                "must call `run.observe(prediction)` after each step."
            )
        batch = len(arguments["hidden_states"])
        if batch % len(self._index):
            raise ShapeError(f"tokens were chosen for {len(self._index)} samples, the network is called with {batch}.")
        rows = TokenRows(self._index, kept.middle.shape[1]).repeat(batch // len(self._index))
        fresh = network.run(arguments, self._attention.get(id(kept)), rows)
        if self._parts.stride == 1:  # the images that were handed out may be a view of the patches
            kept.middle = kept.middle.clone()
        rows.write(fresh, kept.middle)
        output = network.images(kept.middle, arguments)
        if reading is not None and kept.estimate is not None:
            stays = reading.output(kept.estimate, arguments["hidden_states"], output)
            output = torch.where(network.active_pixels(rows, kept.middle, arguments), output, stays)
        return output
