"""The anatomies of diffusers' text transformers: PixArt (text by cross-attention) and Stable Diffusion 3 (a second stream)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError
from pagoda.networks.parts import Context, EncoderState, JointTokens, Residuals
from pagoda.networks.tokens import Attend, TokenRows, run_basic_block, run_joint_block
from pagoda.networks.transformer_anatomy import TransformerAnatomy
from pagoda.networks.unet_anatomy import mask_bias


def _slots(model: nn.Module, condition: Condition, *names: str) -> dict[str, Tensor]:
    """The slots of a condition that a model needs, and no others.

    Raises:
        ConfigError: one is missing, or one that the model has no input for is set.
    """
    found = condition.slots()
    unused = sorted(set(found) - {*names, "tokens_mask"})
    missing = [name for name in names if name not in found]
    if unused or missing:
        raise ConfigError(f"`{type(model).__name__}` takes the condition {', '.join(names)}; got {sorted(found)}.")
    return found


class PixArtAnatomy(TransformerAnatomy):
    """Parts of a `PixArtTransformer2DModel`."""

    def _embedders(self) -> list[nn.Module]:
        return [module for module in (self._net.adaln_single, self._net.caption_projection) if module is not None]

    def _head_modules(self) -> list[nn.Module]:
        return [self._net.norm_out, self._net.proj_out]

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        slots = _slots(self.model, condition, "tokens")
        like = t.new_empty((t.shape[0], 0, 0, 0), dtype=self._net.proj_out.weight.dtype)
        given: dict[str, Any] = {"hidden_states": like, "timestep": t, "encoder_hidden_states": slots["tokens"]}
        given["encoder_attention_mask"] = slots.get("tokens_mask")
        return self.context(given)

    def context(self, arguments: Mapping[str, Any]) -> Context:
        given = arguments.get
        sample, tokens, added = (
            arguments["hidden_states"],
            arguments["encoder_hidden_states"],
            given("added_cond_kwargs"),
        )
        if self._net.use_additional_conditions and added is None:
            raise ConfigError("this PixArt needs `added_cond_kwargs` with resolution and aspect ratio.")
        batch = sample.shape[0]
        modulation, embedding = self._net.adaln_single(
            arguments["timestep"], added, batch_size=batch, hidden_dtype=sample.dtype
        )
        if self._net.caption_projection is not None:
            tokens = self._net.caption_projection(tokens).view(batch, -1, self._net.inner_dim)
        masks = {name: given(name) for name in ("attention_mask", "encoder_attention_mask")}
        biases = {
            name: mask_bias(mask, sample.dtype) if mask is not None and mask.ndim == 2 else mask
            for name, mask in masks.items()
        }
        return Context(
            time=arguments["timestep"],
            labels=None,
            embedding=embedding,
            modulation=modulation,
            tokens=tokens,
            tokens_bias=biases["encoder_attention_mask"],
            bias=biases["attention_mask"],
            attention=given("cross_attention_kwargs"),
            grid=self.grid_of(sample),
        )

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        return self._net.pos_embed(x)

    def head_tokens(self, hidden: Tensor, state: EncoderState) -> Tensor:
        shift, scale = (self._net.scale_shift_table[None] + state.embedding[:, None]).chunk(2, dim=1)
        return self._net.proj_out(self._net.norm_out(hidden) * (1 + scale) + shift)

    def _run_block(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        block = self._net.transformer_blocks[index]
        arguments = (
            hidden,
            context.bias,
            context.tokens,
            context.tokens_bias,
            context.modulation,
            context.attention,
            None,
        )
        if torch.is_grad_enabled() and self._net.gradient_checkpointing:
            return self._net._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def _run_block_over(self, index: int, hidden: Tensor, context: Context, attending: Attend) -> Tensor:
        return run_basic_block(self._net.transformer_blocks[index], hidden, context, f"block.{index}", attending)


class SD3Anatomy(TransformerAnatomy):
    """Parts of an `SD3Transformer2DModel`; between its blocks, features are `JointTokens`. Maps are of the image's."""

    def _embedders(self) -> list[nn.Module]:
        candidates = (self._net.time_text_embed, self._net.context_embedder, getattr(self._net, "image_proj", None))
        return [module for module in candidates if isinstance(module, nn.Module)]

    def _head_modules(self) -> list[nn.Module]:
        return [self._net.norm_out, self._net.proj_out]

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        slots = _slots(self.model, condition, "tokens", "pooled")
        if "tokens_mask" in slots:
            raise ConfigError("`SD3Transformer2DModel` has no input for the condition `tokens_mask`; leave it out.")
        like = t.new_empty((t.shape[0], 0, 0, 0), dtype=self._net.proj_out.weight.dtype)
        return self.context(
            {
                "hidden_states": like,
                "timestep": t,
                "encoder_hidden_states": slots["tokens"],
                "pooled_projections": slots["pooled"],
            }
        )

    def context(self, arguments: Mapping[str, Any]) -> Context:
        given, time = arguments.get, arguments["timestep"]
        attention = dict(given("joint_attention_kwargs") or {})
        if "ip_adapter_image_embeds" in attention:
            hidden, embedding = self._net.image_proj(attention.pop("ip_adapter_image_embeds"), time)
            attention.update(ip_hidden_states=hidden, temb=embedding)
        added = given("block_controlnet_hidden_states")
        return Context(
            time=time,
            labels=None,
            embedding=self._net.time_text_embed(time, given("pooled_projections")),
            tokens=self._net.context_embedder(given("encoder_hidden_states")),
            attention=attention or None,
            residuals=None if added is None else Residuals(blocks=tuple(added)),
            grid=self.grid_of(arguments["hidden_states"]),
            skipped=tuple(given("skip_layers") or ()),
        )

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> JointTokens:
        return JointTokens(self._net.pos_embed(x).contiguous(), self._net.context_embedder(condition.tokens))

    def first(self, arguments: Mapping[str, Any], context: Context) -> JointTokens:
        return JointTokens(self._net.pos_embed(arguments["hidden_states"]).contiguous(), context.tokens)

    def take(self, hidden: JointTokens, rows: TokenRows) -> JointTokens:
        return JointTokens(rows.gather(hidden.image), hidden.text)

    def head_tokens(self, hidden: JointTokens, state: EncoderState) -> Tensor:
        return self._net.proj_out(self._net.norm_out(hidden.image, state.embedding))

    def as_map(self, hidden: Any) -> Tensor:
        return super().as_map(hidden.image)

    def _run_block(self, index: int, hidden: JointTokens, context: Context) -> JointTokens:
        block = self._net.transformer_blocks[index]
        if torch.is_grad_enabled() and self._net.gradient_checkpointing:
            text, image = self._net._gradient_checkpointing_func(
                block, hidden.image, hidden.text, context.embedding, context.attention
            )
        else:
            text, image = block(hidden.image, hidden.text, context.embedding, joint_attention_kwargs=context.attention)
        return JointTokens(image, text)

    def _run_block_over(self, index: int, hidden: JointTokens, context: Context, attending: Attend) -> JointTokens:
        return run_joint_block(self._net.transformer_blocks[index], hidden, context, f"block.{index}", attending)

    def _add_residual(self, index: int, hidden: JointTokens, context: Context, rows: TokenRows | None) -> JointTokens:
        added = context.residuals
        if added is None or self._net.transformer_blocks[index].context_pre_only:
            return hidden
        residual = added.blocks[int(index / (len(self._net.transformer_blocks) / len(added.blocks)))]
        return hidden._replace(image=hidden.image + (residual if rows is None else rows.gather(residual)))
