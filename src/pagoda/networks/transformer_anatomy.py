"""What the anatomies of all diffusers' image transformers share: patch embedding, blocks, head, and runs over a part of the tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError
from pagoda.networks.parts import Anatomy, Context, EncoderState
from pagoda.networks.tokens import Attend, KeptAttention, TokenRows, attend, check_attention


class TransformerAnatomy(Anatomy):
    """Parts of a transformer that works on patches of an image. Inside, features are tokens (B, N, D); taps give maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._net: Any = model

    @property
    def stride(self) -> int:
        return int(self._net.config.patch_size)

    @property
    def embedding_dim(self) -> int:
        return int(self._net.inner_dim)

    @property
    def blocks(self) -> list[Any]:
        """The blocks, in order."""
        return list(self._net.transformer_blocks)

    def names(self) -> list[str]:
        return ["stem", *[f"block.{k}" for k in range(len(self._net.transformer_blocks))], "head"]

    def part(self, name: str) -> list[nn.Module]:
        if name == "embedding":
            return self._embedders()
        self.check(name)
        if name == "stem":
            return [self._net.pos_embed]
        if name == "head":
            return self._head_modules()
        return [self._net.transformer_blocks[int(name.removeprefix("block."))]]

    @abstractmethod
    def _embedders(self) -> list[nn.Module]:
        """The modules that embed time and condition."""

    @abstractmethod
    def _head_modules(self) -> list[nn.Module]:
        """The modules after the last block."""

    def channels(self, name: str) -> int:
        return int(self._net.out_channels) if self.check(name) == "head" else int(self._net.inner_dim)

    def level(self, name: str) -> int:
        return 1 if self.check(name) == "head" else self.stride

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.stride, x.shape[-1] // self.stride

    def first(self, arguments: Mapping[str, Any], context: Context) -> Any:
        return self._net.pos_embed(arguments["hidden_states"])

    def advance(self, state: EncoderState, *, stop: int | None = None) -> EncoderState:
        return state

    def middle(self, state: EncoderState) -> Any:
        return state.hidden

    def decode(self, hidden: Any, state: EncoderState, *, start: int = 0, stop: int | None = None) -> Any:
        for index in range(len(self._net.transformer_blocks))[start:stop]:
            if index not in state.context.skipped:
                hidden = self._run_block(index, hidden, state.context)
            hidden = self._add_residual(index, hidden, state.context, None)
        return hidden

    def decode_tokens(
        self, hidden: Any, state: EncoderState, *, kept: KeptAttention | None, rows: TokenRows | None = None
    ) -> Any:
        """Run all blocks over the active rows; keys and values of the others are those in `kept`, which is brought up to date.

        Args:
            hidden: Features of the active rows (B, m, D), of all tokens where `rows` is None; of a joint transformer with the
                whole text.
            kept: Keys and values of an earlier run over all tokens; filled by a run with `rows` None. None: the active rows
                attend to one another (and to the text) only.

        Returns:
            Features of the active rows. With `rows` None they are bit for bit those of `decode`.

        Raises:
            ConfigError: attention that cannot be split, or nothing kept yet.
        """
        if state.context.attention:
            raise ConfigError(
                f"attention arguments {sorted(state.context.attention)} have no run over a part of the tokens."
            )
        if state.context.bias is not None:
            raise ConfigError("a mask of self-attention has no run over a part of the tokens.")
        attending = partial(self._attend, kept=kept, rows=rows)
        for index in range(len(self._net.transformer_blocks)):
            if index not in state.context.skipped:
                hidden = self._run_block_over(index, hidden, state.context, attending)
            hidden = self._add_residual(index, hidden, state.context, rows)
        return hidden

    @staticmethod
    def _attend(
        attention: Any,
        hidden: Tensor,
        name: str,
        text: Tensor | None = None,
        *,
        kept: KeptAttention | None,
        rows: TokenRows | None,
    ) -> tuple[Tensor, Tensor | None]:
        check_attention(attention)
        return attend(attention, hidden, name, kept, rows, text)

    def take(self, hidden: Any, rows: TokenRows) -> Any:
        """The active rows of first features."""
        return rows.gather(hidden)

    def head(self, hidden: Any, state: EncoderState) -> Tensor:
        return self.to_images(self.head_tokens(hidden, state), state.context.grid)

    @abstractmethod
    def head_tokens(self, hidden: Any, state: EncoderState) -> Tensor:
        """Output patches (B, m, p * p * C) of the rows in `hidden`."""

    def to_images(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Patches (B, N, p * p * C) of all tokens -> images (B, C, H, W); square where no grid (rows, columns) is given."""
        side = int(patches.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        patch, channels = self.stride, self._net.out_channels
        patches = patches.reshape(-1, rows, columns, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, channels, rows * patch, columns * patch)

    def walk(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Iterator[tuple[str, Tensor]]:
        state = self.encode(x, t, condition)
        hidden = state.hidden
        yield "stem", self.as_map(hidden)
        for index in range(len(self._net.transformer_blocks)):
            hidden = self._run_block(index, hidden, state.context)
            yield f"block.{index}", self.as_map(hidden)
        yield "head", self.head(hidden, state)

    def as_map(self, hidden: Any) -> Tensor:
        side = int(hidden.shape[1] ** 0.5)
        return hidden.transpose(1, 2).unflatten(2, (side, side))  # (B, N, D) -> (B, D, h, w)

    @abstractmethod
    def _run_block(self, index: int, hidden: Any, context: Context) -> Any:
        """One block by its own forward."""

    @abstractmethod
    def _run_block_over(self, index: int, hidden: Any, context: Context, attending: Attend) -> Any:
        """One block over some rows; `attending` does its self-attention."""

    def _add_residual(self, index: int, hidden: Any, context: Context, rows: TokenRows | None) -> Any:
        """What a ControlNet adds after a block; nothing where the model takes none."""
        return hidden
