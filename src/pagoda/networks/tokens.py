"""Runs over a part of a transformer's tokens: which rows, their keys and values among those that are kept, and the blocks.

Only the active rows go through a block. Everything in it works row by row but self-attention, whose queries come from the active rows and
whose keys and values are those of all tokens: fresh for the active rows, kept from earlier steps for the others. Rows are gathered
and written in place; no tensor of all tokens is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.parts import Context, JointTokens

PLAIN_PROCESSORS = (AttnProcessor2_0, JointAttnProcessor2_0)


@dataclass(frozen=True)
class TokenRows:
    """The active tokens of each sample.

    Args:
        index: (B, m) int64, places in 0 .. total - 1, each at most once in a sample.
        total: Number of tokens of a sample.

    Raises:
        ShapeError: another shape than (B, m).
    """

    index: Tensor
    total: int

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape[1] > self.total:
            raise ShapeError(f"token rows must have shape (B, m), m <= {self.total}, got {tuple(self.index.shape)}.")

    def gather(self, tokens: Tensor) -> Tensor:
        """(B, total, D) -> (B, m, D)."""
        if len(self.index) == 1:
            return tokens.index_select(1, self.index[0])
        return tokens[torch.arange(len(self.index), device=self.index.device)[:, None], self.index]

    def write(self, rows: Tensor, into: Tensor, dim: int = 1) -> None:
        """Write (B, m, D) into (B, total, D), in place; with `dim` 2, (B, h, m, d) into (B, h, total, d)."""
        for number, index in enumerate(
            self.index
        ):  # a loop over samples: one shared index copies by rows, not by elements
            into[number].index_copy_(dim - 1, index, rows[number])

    def repeat(self, streams: int) -> TokenRows:
        """The same rows for several streams, one after another in the batch."""
        return self if streams == 1 else TokenRows(self.index.repeat(streams, 1), self.total)


@dataclass
class KeptAttention:
    """Keys and values of every self-attention of one stream, (B, heads, N, d) each, with the text's rows after the image's."""

    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (*self.keys.values(), *self.values.values()))

    def update(self, name: str, key: Tensor, value: Tensor, rows: TokenRows | None, num_image: int) -> None:
        """Take all keys and values (`rows` None), or write those of `rows`, and of the text behind them, in place."""
        if rows is None:
            self.keys[name], self.values[name] = key, value
            return
        if name not in self.keys:
            raise ConfigError(
                "no keys and values are kept yet: a run over a part of the tokens needs a full one before."
            )
        for kept, fresh in ((self.keys[name], key), (self.values[name], value)):
            if kept.shape[0] != fresh.shape[0]:
                raise ShapeError(f"keys of {kept.shape[0]} samples are kept, {fresh.shape[0]} were given.")
            rows.write(fresh[:, :, :num_image], kept, dim=2)
            kept[:, :, rows.total :] = fresh[:, :, num_image:]


def check_attention(attention: Any) -> None:
    """Refuse attention that is not diffusers' plain one.

    Raises:
        ConfigError: another processor (fused, sliced, of an adapter), or normalised inputs.
    """
    if type(attention.processor) not in PLAIN_PROCESSORS:
        raise ConfigError(
            f"attention by `{type(attention.processor).__name__}` cannot be run over a part of the tokens; accepted: "
            "`AttnProcessor2_0`, `JointAttnProcessor2_0` (undo `fuse_qkv_projections`, unload image prompt adapters)."
        )
    if attention.group_norm is not None or attention.spatial_norm is not None:
        raise ConfigError("attention with a norm over all tokens cannot be run over a part of them.")


def attend(
    attention: Any,
    hidden: Tensor,
    name: str,
    kept: KeptAttention | None,
    rows: TokenRows | None,
    text: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention, or joint attention with `text`, of the active rows over all tokens; diffusers' own order of sums.

    Args:
        attention: diffusers' `Attention`.
        hidden: (B, m, D), normed; all tokens where `rows` is None.
        name: Key of its keys and values in `kept`.
        kept: Updated. None: nothing is kept, the active rows attend to one another only.
        text: (B, T, D), normed.

    Returns:
        Outputs for `hidden` and `text`.
    """
    batch, count = hidden.shape[:2]
    width = attention.to_k.out_features // attention.heads

    def split(tokens: Tensor, norm: Any) -> Tensor:
        tokens = tokens.view(batch, -1, attention.heads, width).transpose(1, 2)
        return tokens if norm is None else norm(tokens)

    query = split(attention.to_q(hidden), attention.norm_q)
    key, value = split(attention.to_k(hidden), attention.norm_k), split(attention.to_v(hidden), None)
    if text is not None:
        query = torch.cat([query, split(attention.add_q_proj(text), attention.norm_added_q)], dim=2)
        key = torch.cat([key, split(attention.add_k_proj(text), attention.norm_added_k)], dim=2)
        value = torch.cat([value, split(attention.add_v_proj(text), None)], dim=2)
    if kept is not None:
        kept.update(name, key, value, rows, count)
        key, value = kept.keys[name], kept.values[name]
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
    output = output.transpose(1, 2).reshape(batch, -1, attention.heads * width)
    text_output = None
    if text is not None:
        output, text_output = output[:, :count], output[:, count:]
        if not attention.context_pre_only:
            text_output = attention.to_add_out(text_output)
    output = attention.to_out[1](attention.to_out[0](output))
    if text is None and attention.residual_connection:
        output = output + hidden
    return (output / attention.rescale_output_factor if text is None else output), text_output


Attend = Callable[..., tuple[Tensor, Any]]


def run_basic_block(block: Any, hidden: Tensor, context: Context, name: str, attending: Attend) -> Tensor:
    """diffusers' `BasicTransformerBlock` of a DiT or a PixArt over some rows (B, m, D); `attending` does self-attention.

    Raises:
        ConfigError: another kind of block.
    """
    single = block.norm_type == "ada_norm_single"
    if not single and block.norm_type != "ada_norm_zero":
        raise ConfigError(f"blocks with norm_type={block.norm_type!r} cannot be run over a part of the tokens.")
    if single:
        assert context.modulation is not None
        shared = context.modulation.reshape(len(hidden), 6, -1)
        modulation = (block.scale_shift_table[None] + shared).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        normed = block.norm1(hidden) * (1 + scale_msa) + shift_msa
    else:
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(
            hidden, context.time, context.labels, hidden_dtype=hidden.dtype
        )
        gate_msa, shift_mlp, scale_mlp, gate_mlp = (v.unsqueeze(1) for v in (gate_msa, shift_mlp, scale_mlp, gate_mlp))
    hidden = gate_msa * attending(block.attn1, normed, name)[0] + hidden
    if block.attn2 is not None:
        normed = hidden if single else block.norm2(hidden)
        found = block.attn2(normed, encoder_hidden_states=context.tokens, attention_mask=context.tokens_bias)
        hidden = found + hidden
    normed = (block.norm2 if single else block.norm3)(hidden) * (1 + scale_mlp) + shift_mlp
    return gate_mlp * block.ff(normed) + hidden


def run_joint_block(block: Any, hidden: JointTokens, context: Context, name: str, attending: Attend) -> JointTokens:
    """diffusers' `JointTransformerBlock` over some rows of the image and all of the text."""
    image, text = hidden
    assert text is not None
    second: Any = None
    gate_second: Any = None
    if block.use_dual_attention:
        normed, gate, shift, scale, gate_mlp, second, gate_second = block.norm1(image, emb=context.embedding)
    else:
        normed, gate, shift, scale, gate_mlp = block.norm1(image, emb=context.embedding)
    if block.context_pre_only:
        text_normed = block.norm1_context(text, context.embedding)
    else:
        text_normed, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(text, emb=context.embedding)
    found, text_found = attending(block.attn, normed, name, text_normed)
    image = image + gate.unsqueeze(1) * found
    if block.use_dual_attention:
        image = image + gate_second.unsqueeze(1) * attending(block.attn2, second, f"{name}.dual")[0]
    normed = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
    image = image + gate_mlp.unsqueeze(1) * block.ff(normed)
    if block.context_pre_only:
        return JointTokens(image, None)
    text = text + text_gate.unsqueeze(1) * text_found
    normed = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
    return JointTokens(image, text + text_gate_mlp.unsqueeze(1) * block.ff_context(normed))
