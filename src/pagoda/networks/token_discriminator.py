"""A discriminator of tokens: one logit for each place of each feature map, judged together with the condition.

    h = LeakyReLU(norm(conv1(tokens)));  h = (h + LeakyReLU(norm(conv9(h)))) / sqrt(2);  logit = <conv1(h), c> / sqrt(64)

with c the 64 numbers that the class or the text is mapped to, and the guidance weight where there is one. Group norm stands where the
paper normalises over eight samples, so that logits depend neither on the batch size nor on the number of processes.

Source: Sauer et al. 2023, StyleGAN-T, arXiv:2301.09515, section 4.1; the hinge loss is taken per token, and the guidance
weight told, as in Kim et al. 2024, PaGoDA, arXiv:2405.14822 (as far as its figures tell).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.calling import resolve_labels
from pagoda.networks.growth import count_groups
from pagoda.networks.guidance import GuidanceEmbedding

CONDITION_WIDTH = 64
"""Numbers that a condition is mapped to."""
REACH = 9
"""Tokens that the second convolution sees, in a circle; of a map with fewer, as many as there are."""


class TextProjection(nn.Module):
    """Pooled embedding of a text (B, P) -> (B, width); a sample without its text (zeros) gives zeros.

    The embedding is normalised first, so that encoders of all scales are heard alike; there is no bias.
    """

    def __init__(self, pooled_dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pooled_dim, width, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, P) -> (B, width)."""
        projected: Tensor = self.linear(F.layer_norm(pooled, pooled.shape[-1:]))
        return projected


class TokenHead(nn.Module):
    """Tokens of one map (B, C, N) and the mapped condition (B, 64) -> logits (B, N)."""

    def __init__(self, channels: int, width: int, count: int) -> None:
        super().__init__()
        reach = min(REACH, count - (count + 1) % 2)  # odd, and once around at most
        self.first = nn.Sequential(_conv(channels, width, 1), nn.GroupNorm(count_groups(width), width))
        self.second = nn.Sequential(_conv(width, width, reach), nn.GroupNorm(count_groups(width), width))
        self.logit = _conv(width, CONDITION_WIDTH, 1)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, N)."""
        h = F.leaky_relu(self.first(tokens), 0.2)
        h = (h + F.leaky_relu(self.second(h), 0.2)) / math.sqrt(2)
        return torch.einsum("bcn,bc->bn", self.logit(h), condition) / math.sqrt(CONDITION_WIDTH)


class TokenDiscriminator(nn.Module):
    """One head a map; the logits of all tokens are concatenated. It takes the place of `ProjectedDiscriminator`.

    Args:
        channels: Channels of each map.
        num_classes: 0 for none.
        pooled_dim: Width of the pooled embeddings of texts; 0 for none.
        width: Channels inside each head.
        raw_pixels: The last map is the image itself, of which patches of 4 x 4 px are tokens (2 x 2 or single pixels where 4 does
            not divide the side, or leaves too few).
        guided: It is told the guidance weight of each image; logits start as without it.

    Raises:
        ConfigError: no map, a number below 1, or classes and texts at once.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        sides: Sequence[int],
        num_classes: int = 0,
        pooled_dim: int = 0,
        width: int = 64,
        raw_pixels: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != len(sides):
            raise ShapeError(f"{len(channels)} maps have channels and {len(sides)} have sides; they must agree.")
        if not channels or min([*channels, *sides, width]) < 1 or num_classes < 0 or pooled_dim < 0:
            raise ConfigError(
                f"a discriminator needs at least one map and positive sizes, got channels={tuple(channels)}, "
                f"sides={tuple(sides)}, width={width}, num_classes={num_classes}, pooled_dim={pooled_dim}."
            )
        if num_classes and pooled_dim:
            raise ConfigError(f"a discriminator judges by classes or by texts, got {num_classes} classes and texts.")
        self.num_classes = num_classes
        self.raw_pixels = raw_pixels
        fits = [p for p in (4, 2) if sides[-1] % p == 0 and (sides[-1] // p) ** 2 >= REACH]
        self.patch = (fits or [1])[0] if raw_pixels else 1
        widths, counts = list(channels), [side**2 for side in sides]
        widths[-1], counts[-1] = widths[-1] * self.patch**2, counts[-1] // self.patch**2
        self.heads = nn.ModuleList(TokenHead(c, width, n) for c, n in zip(widths, counts, strict=True))
        # Without a condition, one learnt vector is what every token is held against.
        self.mapping: nn.Module = nn.Embedding(num_classes + 1, CONDITION_WIDTH)
        self.text = TextProjection(pooled_dim, CONDITION_WIDTH) if pooled_dim else None
        self.guided = GuidanceEmbedding(CONDITION_WIDTH) if guided else None

    def forward(self, maps: Sequence[Tensor], condition: Condition = UNCONDITIONAL) -> Tensor:
        """Logits (B, P) of all tokens of all maps; positive = real.

        Args:
            maps: (B, C_k, h_k, w_k).
            condition: Labels, -1 or none at all for no class; or the pooled embeddings of texts, or their tokens where there are none;
                guidance weights, none at all for 1.

        Raises:
            ShapeError: another number of maps.
            ConfigError: a label out of range, texts that are missing or have no input, or guidance weights for one that is not told of
                them.
        """
        if len(maps) != len(self.heads):
            raise ShapeError(f"this discriminator reads {len(self.heads)} maps, got {len(maps)}.")
        weights = judged_weights(condition, self.guided is not None, maps[0])
        rows = resolve_labels(condition.label, self.num_classes, len(maps[0]), maps[0].device)
        texts = judged_texts(condition, self.text)
        told: Tensor = self.mapping(rows)
        if self.text is not None:
            told = told + self.text(texts)
        if self.guided is not None:
            told = told + self.guided(weights)
        tokens = [m.flatten(2) for m in maps[:-1]]
        tokens.append(F.pixel_unshuffle(maps[-1], self.patch).flatten(2))
        return torch.cat([head(t, told) for head, t in zip(self.heads, tokens, strict=True)], dim=1)


def judged_weights(condition: Condition, guided: bool, like: Tensor) -> Tensor | None:
    """Guidance weights (B,) of the images whose map is `like`: 1 where none are given, None for a discriminator that is not told them.

    Raises:
        ConfigError: weights for one that is not told of them.
    """
    if condition.guidance is not None and not guided:
        raise ConfigError("this discriminator has no input for the condition `guidance`; leave it out.")
    if not guided:
        return None
    return torch.ones(len(like), device=like.device) if condition.guidance is None else condition.guidance


def judged_texts(condition: Condition, text: nn.Module | None) -> Tensor | None:
    """What a discriminator of texts holds images against, (B, P): pooled embeddings, or the mean over the tokens of texts that have none.

    Returns:
        None for a discriminator that does not judge by texts.

    Raises:
        ConfigError: texts for a discriminator without an input for them, or none for one that needs them.
    """
    if text is None:
        if condition.pooled is not None:
            raise ConfigError("this discriminator has no input for the condition `pooled`; build it with pooled_dim.")
        return None
    if condition.pooled is not None:
        return condition.pooled
    if condition.tokens is None:
        raise ConfigError(
            "this discriminator judges by texts: give `pooled` embeddings (B, P), zeros for none, or `tokens` (B, T, P)."
        )
    if condition.tokens_mask is None:
        return condition.tokens.mean(1)
    kept = condition.tokens_mask[..., None].to(condition.tokens)
    return (condition.tokens * kept).sum(1) / kept.sum(1).clamp_min(1)


def _conv(before: int, after: int, reach: int) -> nn.Module:
    # Circular: the tokens of a map have no natural ends, as in the official code.
    return spectral_norm(nn.Conv1d(before, after, reach, padding=reach // 2, padding_mode="circular"))
