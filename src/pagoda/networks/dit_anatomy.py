"""The anatomy of diffusers' DiT: patch embedding, blocks, head. Inside, features are tokens (B, N, D); taps give maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.networks.calling import concatenate_image, resolve_condition
from pagoda.networks.parts import Anatomy, Context, EncoderState


class DiTAnatomy(Anatomy):
    """Parts of a `DiTTransformer2DModel`. Every block embeds time and label by itself, so these belong to the blocks."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__(model)
        self._net: Any = model

    @property
    def stride(self) -> int:
        return int(self._net.patch_size)

    @property
    def embedding_dim(self) -> int:
        return int(self._net.inner_dim)

    def names(self) -> list[str]:
        return ["stem", *[f"block.{k}" for k in range(len(self._net.transformer_blocks))], "head"]

    def part(self, name: str) -> list[nn.Module]:
        if name == "embedding":
            return [self._net.transformer_blocks[0].norm1.emb]
        self.check(name)
        if name == "stem":
            return [self._net.pos_embed]
        if name == "head":
            return [self._net.norm_out, self._net.proj_out_1, self._net.proj_out_2]
        return [self._net.transformer_blocks[int(name.removeprefix("block."))]]

    def channels(self, name: str) -> int:
        return int(self._net.out_channels) if self.check(name) == "head" else int(self._net.inner_dim)

    def level(self, name: str) -> int:
        return 1 if self.check(name) == "head" else self.stride

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        labels = resolve_condition(self.model, condition, len(t), t.device).labels
        dtype = self._net.proj_out_2.weight.dtype
        embedding = self._net.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=dtype)
        return Context(time=t, labels=labels, embedding=embedding)

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        return self._net.pos_embed(concatenate_image(self.model, x, condition))

    def encode(
        self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL, *, stop: int | None = None
    ) -> EncoderState:
        return EncoderState(hidden=self.stem(x, condition), skips=(), context=self.embed(t, condition))

    def middle(self, state: EncoderState) -> Tensor:
        return state.hidden

    def decode(self, hidden: Tensor, state: EncoderState, *, start: int = 0, stop: int | None = None) -> Tensor:
        for block in self._net.transformer_blocks[start:stop]:
            hidden = self._run_block(block, hidden, state.context)
        return hidden

    def head(self, hidden: Tensor, state: EncoderState) -> Tensor:
        shift, scale = self._net.proj_out_1(F.silu(state.embedding)).chunk(2, dim=1)
        hidden = self._net.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        hidden = self._net.proj_out_2(hidden)  # (B, N, p * p * C)
        side, patch, channels = int(hidden.shape[1] ** 0.5), self.stride, self._net.out_channels
        hidden = hidden.reshape(-1, side, side, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", hidden).reshape(-1, channels, side * patch, side * patch)

    def walk(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Iterator[tuple[str, Tensor]]:
        state = self.encode(x, t, condition)
        hidden = state.hidden
        yield "stem", self.as_map(hidden)
        for index, block in enumerate(self._net.transformer_blocks):
            hidden = self._run_block(block, hidden, state.context)
            yield f"block.{index}", self.as_map(hidden)
        yield "head", self.head(hidden, state)

    def as_map(self, hidden: Tensor) -> Tensor:
        side = int(hidden.shape[1] ** 0.5)
        return hidden.transpose(1, 2).unflatten(2, (side, side))  # (B, N, D) -> (B, D, h, w)

    def _run_block(self, block: Any, hidden: Tensor, context: Context) -> Tensor:
        if torch.is_grad_enabled() and self._net.gradient_checkpointing:
            return self._net._gradient_checkpointing_func(
                block, hidden, None, None, None, context.time, None, context.labels
            )
        return block(hidden, timestep=context.time, class_labels=context.labels)
