"""One more octave for a one-step generator: a level after its last features, and the proof that nothing was lost.

h (B, C_h, r, r) -> 1x1 conv if the width differs -> 2x enlarged (+ 3x3 conv of the enlarged image) -> residual blocks -> head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ArtifactError, ConfigError, ShapeError, did_you_mean

MAX_GROUPS = 32
"""Group norms of new levels use the largest number of groups up to this that leaves at least 4 channels in each."""

ATTENTION_CHANNELS = 32
"""Channels of an attention head."""

HEAD_INITS = ("skip_rgb", "zero", "copy")
UPSAMPLES = ("nearest", "bilinear")


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """Shape of one level; what a grown generator's config lists.

    Raises:
        ConfigError: an unknown choice or a count below 1.
        ShapeError: `head_groups` does not divide `channels`.
    """

    channels: int
    """Width of the level's features."""
    num_blocks: int = 2
    """Residual blocks."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """How features are enlarged; official: nearest."""
    head_init: Literal["skip_rgb", "zero", "copy"] = "skip_rgb"
    """skip_rgb: image = enlarged lower image + head, head zero at first. zero: image = head. copy: the lower head, copied."""
    use_rgb: bool = True
    """Whether the level also sees the enlarged lower image."""
    attention: bool = False
    """Self-attention after each residual block; its cost grows with the fourth power of the side."""
    head_groups: int
    """Groups of the head's norm."""
    head_eps: float = 1e-5
    """Epsilon of the head's norm."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("upsample", self.upsample, UPSAMPLES),
            ("head_init", self.head_init, HEAD_INITS),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}. {did_you_mean(str(value), known)}")
        if self.channels < 1 or self.num_blocks < 1 or self.head_groups < 1:
            raise ConfigError(
                f"a level needs channels, num_blocks and head_groups of at least 1, got {self.channels}, "
                f"{self.num_blocks} and {self.head_groups}."
            )
        if self.channels % self.head_groups:
            raise ShapeError(f"head_groups={self.head_groups} does not divide the level's width {self.channels}.")


def count_groups(channels: int) -> int:
    """Largest number of groups <= `MAX_GROUPS` that divides `channels` and leaves at least 4 channels in each, or 1."""
    return max((n for n in range(1, MAX_GROUPS + 1) if channels % n == 0 and channels // n >= 4), default=1)


def enlarge_image(image: Tensor) -> Tensor:
    """Bilinear enlargement by 2: (B, C, r, r) -> (B, C, 2r, 2r)."""
    return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """h + conv(SiLU(norm(conv(SiLU(norm(h))) + linear(SiLU(embedding))))); the last conv starts at zero: the identity."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        groups = count_groups(channels)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.embed = nn.Linear(embedding_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        zero_layer(self.conv2)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, r, r) and (B, E) -> (B, C, r, r)."""
        h = self.conv1(F.silu(self.norm1(hidden)))
        h = h + self.embed(F.silu(embedding))[:, :, None, None]
        return hidden + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """h + out(attention(norm(h))) over all pixels, heads of about 32 channels; `out` starts at zero: the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // ATTENTION_CHANNELS) if channels % ATTENTION_CHANNELS == 0 else 1
        self.norm = nn.GroupNorm(count_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero_layer(self.out)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, r, r) -> (B, C, r, r)."""
        qkv = self.qkv(self.norm(hidden)).flatten(2).unflatten(1, (3, self.heads, -1))  # (B, 3, heads, C/heads, N)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        return hidden + self.out(mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, hidden.shape[-2:]))


class GrowthLevel(nn.Module):
    """Features and image of one size -> features and image of twice the size.

    With equal width and `use_rgb=False`, the new features start as the nearest-neighbour enlargement of the old, bit for
    bit. With `head_init="skip_rgb"` the new image starts as the bilinear enlargement of the old, bit for bit.

    Args:
        config: The level's own shape.
        lower_channels: Width of the features below.
        image_channels: Channels of the image.
        embedding_dim: Width of the time and class embedding.

    Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, stage 3; skip_rgb is ours.
    """

    def __init__(self, config: LevelConfig, *, lower_channels: int, image_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.config = config
        same = lower_channels == config.channels
        self.project = nn.Identity() if same else nn.Conv2d(lower_channels, config.channels, 1)
        self.from_rgb = nn.Conv2d(image_channels, config.channels, 3, padding=1) if config.use_rgb else None
        self.blocks = nn.ModuleList(ResidualBlock(config.channels, embedding_dim) for _ in range(config.num_blocks))
        self.attentions = nn.ModuleList(
            SelfAttention(config.channels) for _ in range(config.num_blocks if config.attention else 0)
        )
        self.norm_out = nn.GroupNorm(config.head_groups, config.channels, eps=config.head_eps)
        self.conv_out = nn.Conv2d(config.channels, image_channels, 3, padding=1)
        if config.head_init != "copy":
            zero_layer(self.conv_out)
        elif self.from_rgb is not None:
            zero_layer(self.from_rgb)  # a copied head expects the old features

    def forward(self, hidden: Tensor, rgb: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Grow one octave.

        Args:
            hidden: Features of the level below (B, C_lower, r, r).
            rgb: Image of the level below (B, C, r, r), nominally in [-1, 1].
            embedding: Time and class embedding (B, E).

        Returns:
            Features (B, channels, 2r, 2r) and image (B, C, 2r, 2r).
        """
        enlarged = enlarge_image(rgb)
        h = self.project(hidden)
        if self.config.upsample == "nearest":
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        else:
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        if self.from_rgb is not None:
            h = h + self.from_rgb(enlarged)
        if torch.is_grad_enabled() and not h.requires_grad:
            # A transformer's maps have their channels last. On CPUs the backward pass of PyTorch's group norm dies of a segmentation
            # fault where such an input takes no gradient, as features of a frozen base do.
            h = h.contiguous()
        for index, block in enumerate(self.blocks):
            h = block(h, embedding)
            if len(self.attentions):
                h = self.attentions[index](h)
        image = self.conv_out(F.silu(self.norm_out(h)))
        return h, enlarged + image if self.config.head_init == "skip_rgb" else image

    @torch.no_grad()
    def copy_head(self, norm: nn.GroupNorm, conv: nn.Conv2d, *, scale: float) -> None:
        """Start from the head of the level below; `scale` is what that level multiplies its head's output by.

        Raises:
            ShapeError: the widths differ.
        """
        if conv.weight.shape != self.conv_out.weight.shape:
            raise ShapeError(
                f'head_init="copy" needs the width of the level below, {conv.in_channels}, got {self.config.channels}; '
                'use that width, or head_init="skip_rgb".'
            )
        self.norm_out.load_state_dict(norm.state_dict())
        self.conv_out.weight.copy_(conv.weight * scale)
        if conv.bias is not None and self.conv_out.bias is not None:
            self.conv_out.bias.copy_(conv.bias * scale)


def zero_layer(layer: nn.Module) -> None:
    """Set every parameter of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Copy every tensor of `old` into `new`, which has more, and prove that each arrived.

    Raises:
        ArtifactError: `new` lacks a tensor of `old`, or holds another value afterwards (a NaN, or tied weights).
        ShapeError: a tensor has another shape in `new`.
    """
    target = new.state_dict()
    source = old.state_dict()
    missing = [name for name in source if name not in target]
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {len(source)} tensors have no place in the grown network, the first is `{missing[0]}`. "
            "Both must be built from the same base configuration."
        )
    for name, value in source.items():
        if target[name].shape != value.shape:
            raise ShapeError(
                f"`{name}` has shape {tuple(value.shape)} in the old network and {tuple(target[name].shape)} in the "
                "grown one. Both must be built from the same base configuration."
            )
        target[name].copy_(value)
    arrived = new.state_dict()
    for name, value in source.items():
        if not torch.equal(arrived[name].to(value), value):
            raise ArtifactError(f"`{name}` was not carried over to the grown network bit for bit; is it finite?")
