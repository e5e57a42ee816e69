"""The guidance weight as an input of a network: an embedding that is added to that of time and class, and starts at zero.

Source: the embedding follows Meng et al. 2023, On Distillation of Guided Diffusion Models, arXiv:2210.03142, section 3.1; the
place of the weight is that of text-to-image PaGoDA (Kim et al. 2024, arXiv:2405.14822) as far as its figures tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.diffusion.conditions import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.growth import zero_layer
from pagoda.networks.parts import Anatomy, EncoderState

_WAVES = 16
"""Sines and cosines of ln w each."""
_SLACK = 1e-5
"""How far outside of the range a weight may lie by rounding."""


class GuidanceEmbedding(nn.Module):
    """Guidance weight w (B,), > 0 -> embedding (B, dim); zero for every w until it is trained.

    sin and cos of f ln w, f from 1/2 to 32 in equal ratios, then two layers of which the last starts at zero.
    """

    waves: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("waves", torch.logspace(-1, 5, _WAVES, base=2.0))
        self.inner = nn.Linear(2 * _WAVES, dim)
        self.outer = nn.Linear(dim, dim)
        zero_layer(self.outer)

    def forward(self, weight: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        angles = weight.to(self.waves).log()[:, None] * self.waves
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.inner.weight.dtype)
        embedding: Tensor = self.outer(F.silu(self.inner(waves)))
        return embedding


def split_guidance(condition: Condition) -> tuple[Condition, Tensor | None]:
    """The condition without its guidance weight, and the weight (B,)."""
    return replace(condition, guidance=None), condition.guidance


def resolve_guidance(weight: Tensor | None, largest: float, batch: int, like: Tensor) -> Tensor:
    """Weights (B,), checked: between 1 and `largest`; none at all means 1 for everyone.

    Raises:
        ConfigError: a weight outside of the range that the network was trained with.
        ShapeError: not one weight a sample.
    """
    if weight is None:
        return torch.ones(batch, device=like.device)
    if weight.shape != (batch,):
        raise ShapeError(f"guidance weights must have shape ({batch},), one per image, got {tuple(weight.shape)}.")
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        check_guidance_range(float(weight.min()), float(weight.max()), largest)
    return weight.to(like.device)


def check_guidance_range(low: float, high: float, largest: float | None) -> None:
    """Refuse guidance weights outside of [1, `largest`].

    Args:
        low, high: Smallest and largest weight that is asked for.
        largest: Of the weights in training; None for a network without guidance.

    Raises:
        ConfigError: see above.
    """
    top = 1.0 if largest is None else largest
    if low >= 1 - _SLACK and high <= top + _SLACK:
        return
    wrong = low if low < 1 - _SLACK else high
    if largest is None:
        raise ConfigError(
            f"a guidance weight of {wrong:g} was asked of a network that was trained without guidance; leave it out, or train "
            "with guidance.scale_max above 1."
        )
    raise ConfigError(f"the guidance weight must lie in [1, {top:g}], as in training (1 is none), got {wrong:g}.")


def shifted_state(
    parts: Anatomy, x: Tensor, t: Tensor, condition: Condition, shift: Tensor | None
) -> tuple[Tensor, EncoderState]:
    """`Anatomy.last_state` with `shift` (B, E) added to the embedding of time and class that all layers see.

    With `shift=None`, or a shift of zeros, the result is that of `last_state`, bit for bit.
    """
    if shift is None:
        return parts.last_state(x, t, condition)
    if isinstance(parts.model, DiTTransformer2DModel):
        with _shifted_blocks(parts.model, shift):
            return parts.last_state(x, t, condition)
    context = parts.embed(t, condition)
    context = replace(context, embedding=context.embedding + shift, grid=parts.grid_of(x))
    hidden = parts.stem(x, condition)
    state = parts.advance(EncoderState(hidden, parts.first_skips(hidden, context), context))
    return parts.decode(parts.middle(state), state), state


@contextlib.contextmanager
def _shifted_blocks(model: Any, shift: Tensor) -> Iterator[None]:
    """Inside, the embedding of every block of a DiT is shifted: each block embeds time and class by itself.

    Raises:
        ConfigError: activations are recomputed in the backward pass (gradient checkpointing), when the shift is gone.
    """
    if getattr(model, "is_gradient_checkpointing", False):
        raise ConfigError("guidance cannot enter a DiT under gradient checkpointing; switch that off.")
    modules = [block.norm1.emb for block in model.transformer_blocks]
    handles = [module.register_forward_hook(lambda _, __, output: output + shift) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
