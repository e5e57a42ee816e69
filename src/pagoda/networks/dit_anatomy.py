"""The anatomy of diffusers' class-conditional DiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.networks.calling import concatenate_image, resolve_condition
from pagoda.networks.parts import Context, EncoderState
from pagoda.networks.tokens import Attend, run_basic_block
from pagoda.networks.transformer_anatomy import TransformerAnatomy


class DiTAnatomy(TransformerAnatomy):
    """Parts of a `DiTTransformer2DModel`. Every block embeds time and label by itself, so these belong to the blocks."""

    def _embedders(self) -> list[nn.Module]:
        return [self._net.transformer_blocks[0].norm1.emb]

    def _head_modules(self) -> list[nn.Module]:
        return [self._net.norm_out, self._net.proj_out_1, self._net.proj_out_2]

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        labels = resolve_condition(self.model, condition, t.shape[0], t.device).labels
        dtype = self._net.proj_out_2.weight.dtype
        embedding = self._net.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=dtype)
        return Context(time=t, labels=labels, embedding=embedding)

    def context(self, arguments: Mapping[str, Any]) -> Context:
        sample, time, labels = arguments["hidden_states"], arguments["timestep"], arguments.get("class_labels")
        embedding = self._net.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=sample.dtype)
        attention = arguments.get("cross_attention_kwargs")
        return Context(time=time, labels=labels, embedding=embedding, attention=attention, grid=self.grid_of(sample))

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        return self._net.pos_embed(concatenate_image(self.model, x, condition))

    def head_tokens(self, hidden: Tensor, state: EncoderState) -> Tensor:
        shift, scale = self._net.proj_out_1(F.silu(state.embedding)).chunk(2, dim=1)
        hidden = self._net.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        return self._net.proj_out_2(hidden)  # (B, N, p * p * C)

    def _run_block(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        block = self._net.transformer_blocks[index]
        if torch.is_grad_enabled() and self._net.gradient_checkpointing:
            return self._net._gradient_checkpointing_func(
                block, hidden, None, None, None, context.time, context.attention, context.labels
            )
        return block(
            hidden, timestep=context.time, class_labels=context.labels, cross_attention_kwargs=context.attention
        )

    def _run_block_over(self, index: int, hidden: Tensor, context: Context, attending: Attend) -> Tensor:
        return run_basic_block(self._net.transformer_blocks[index], hidden, context, f"block.{index}", attending)
