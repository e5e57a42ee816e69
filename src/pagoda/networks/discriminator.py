"""A multi-scale, conditional discriminator: small heads on the maps of a frozen feature stack (see `MixedFeatures` for mixed ones).

Nothing in it looks across the batch (group norm instead of the official batch norm), so that logits depend neither on the
batch size nor on the number of processes.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, after Sauer et al. 2022, StyleGAN-XL, arXiv:2202.00273.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.calling import resolve_labels
from pagoda.networks.features import FeatureStack
from pagoda.networks.growth import count_groups
from pagoda.networks.guidance import GuidanceEmbedding
from pagoda.networks.token_discriminator import TextProjection, TokenDiscriminator, judged_texts, judged_weights


class MapHead(nn.Module):
    """One feature map -> a map of logits.

    conv 1x1 (pixels: 3x3), then stride-2 convs down to `target` px, then a conv to h (B, width, s, s);
    logits = conv(h) + <h, embed(label)> / sqrt(width). All convs are spectrally normalised.

    Args:
        channels: Channels of the map.
        side: Side of the map in pixels.
        target: Side of the map of logits, at most; a smaller map keeps its side.
        width: Channels inside.
        num_classes: 0 for none; otherwise the table has one row more, for samples without a class.
        pixels: The map is the image itself.
    """

    def __init__(
        self, channels: int, side: int, *, target: int, width: int, num_classes: int, pixels: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(channels, width, 3 if pixels else 1), nn.LeakyReLU(0.2)]
        while side > target:
            layers += [_conv(width, width, 4, stride=2), nn.GroupNorm(count_groups(width), width), nn.LeakyReLU(0.2)]
            side //= 2
        layers.append(_conv(width, width, 3))
        self.layers = nn.Sequential(*layers)
        self.logit = _conv(width, 1, 1)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.guided: GuidanceEmbedding | None = None  # given by `ProjectedDiscriminator`
        self.text: TextProjection | None = None  # likewise
        self.scale = 1 / math.sqrt(width)

    def forward(
        self, features: Tensor, labels: Tensor | None, guidance: Tensor | None = None, pooled: Tensor | None = None
    ) -> Tensor:
        """Map (B, C, h, w), rows of the table (B,), guidance weights (B,) and pooled texts (B, P) -> logits (B, s * s)."""
        h = self.layers(features)
        logits = self.logit(F.leaky_relu(h, 0.2))[:, 0]
        if self.label is not None and labels is not None:
            logits = logits + torch.einsum("bchw,bc->bhw", h, self.label(labels)) * self.scale
        if self.guided is not None and guidance is not None:
            logits = logits + torch.einsum("bchw,bc->bhw", h, self.guided(guidance)) * self.scale
        if self.text is not None and pooled is not None:
            logits = logits + torch.einsum("bchw,bc->bhw", h, self.text(pooled)) * self.scale
        return logits.flatten(1)


class ProjectedDiscriminator(nn.Module):
    """One head per feature map; their logits are concatenated. It does not own the stack that makes the maps.

    Power iterations of the spectral norms advance in training mode; their vectors are buffers of the state dict.

    Args:
        channels: Channels of each map.
        sides: Side of each map in pixels (`FeatureStack.sides`).
        num_classes: 0 for none.
        width: Channels inside each head.
        raw_pixels: The last map is the image itself.
        guided: It is told the guidance weight of each image; logits start as without it.
        pooled_dim: Width of the pooled embeddings of texts that images are judged by; 0 for none.

    Raises:
        ConfigError: no map, or a number below 1.
        ShapeError: `channels` and `sides` differ in number.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        sides: Sequence[int],
        num_classes: int,
        width: int = 64,
        raw_pixels: bool = False,
        guided: bool = False,
        pooled_dim: int = 0,
    ) -> None:
        super().__init__()
        if len(channels) != len(sides):
            raise ShapeError(f"{len(channels)} maps have channels and {len(sides)} have sides; they must agree.")
        if not channels or min([*channels, *sides, width]) < 1 or num_classes < 0:
            raise ConfigError(
                f"a discriminator needs at least one map and positive sizes, got channels={tuple(channels)}, "
                f"sides={tuple(sides)}, width={width}, num_classes={num_classes}."
            )
        self.num_classes = num_classes
        self.raw_pixels = raw_pixels
        target = 8 if max(sides) > 16 else 4  # the official 8 px; small maps would not be reduced at all
        self.heads = nn.ModuleList(
            MapHead(
                count,
                side,
                target=target,
                width=width,
                num_classes=num_classes,
                pixels=raw_pixels and index == len(sides) - 1,
            )
            for index, (count, side) in enumerate(zip(channels, sides, strict=True))
        )
        self.guided = guided
        for head in self.heads if guided else ():  # after all heads, whose weights are then those of one without
            head.guided = GuidanceEmbedding(width)
        for head in self.heads if pooled_dim else ():
            head.text = TextProjection(pooled_dim, width)

    def forward(self, maps: Sequence[Tensor], condition: Condition = UNCONDITIONAL) -> Tensor:
        """Logits (B, P) of all patches of all maps; positive = real.

        Args:
            maps: (B, C_k, h_k, w_k).
            condition: Labels, -1 or none at all for no class; guidance weights, none at all for 1; or the pooled embeddings of
                texts, or the mean of their tokens where there are none.

        Raises:
            ShapeError: another number of maps.
            ConfigError: a label out of range, guidance weights for one that is not told of them, or texts that are missing or
                have no input.
        """
        if len(maps) != len(self.heads):
            raise ShapeError(f"this discriminator reads {len(self.heads)} maps, got {len(maps)}.")
        labels = None
        if self.num_classes or condition.label is not None:
            labels = resolve_labels(condition.label, self.num_classes, len(maps[0]), maps[0].device)
        weights = judged_weights(condition, self.guided, maps[0])
        pooled = judged_texts(condition, cast(MapHead, self.heads[0]).text)
        return torch.cat(
            [head(features, labels, weights, pooled) for head, features in zip(self.heads, maps, strict=True)], dim=1
        )


class Discriminator(nn.Module):
    """A feature stack and the heads on it: images in, logits out. Only the heads are trained.

    Args:
        stack: Frozen.
        heads: Built for the stack's maps, and with `raw_pixels` for the image after them.
    """

    def __init__(self, stack: FeatureStack, heads: ProjectedDiscriminator | TokenDiscriminator) -> None:
        super().__init__()
        self.stack = stack
        self.heads = heads

    @classmethod
    def for_stack(
        cls,
        stack: FeatureStack,
        *,
        image_size: int,
        num_classes: int,
        width: int = 64,
        raw_pixels: bool = False,
        guided: bool = False,
        pooled_dim: int = 0,
        tokens: bool = False,
    ) -> Discriminator:
        """Fresh heads for a stack and images of `image_size` px; the maps' sizes are measured. See `ProjectedDiscriminator`, and
        for one logit a token (`tokens=True`) `TokenDiscriminator`.

        Raises:
            ConfigError: numbers that the heads refuse.
        """
        channels = [*stack.channels, *([stack.in_channels] if raw_pixels else [])]
        sides = [*stack.sides(image_size), *([image_size] if raw_pixels else [])]
        common: dict[str, Any] = {"num_classes": num_classes, "pooled_dim": pooled_dim, "width": width}
        common |= {"sides": sides, "raw_pixels": raw_pixels, "guided": guided}
        return cls(stack, (TokenDiscriminator if tokens else ProjectedDiscriminator)(channels, **common))

    def forward(self, images: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Logits (B, P) of images (B, C, H, W) in [-1, 1]; positive = real."""
        maps = self.stack(images)
        return self.heads([*maps, images] if self.heads.raw_pixels else maps, condition)

    def heads_state_dict(self) -> dict[str, Tensor]:
        """The state of the heads only: the stack is frozen and is found again by its fingerprint."""
        return self.heads.state_dict()


def _conv(before: int, after: int, kernel: int, *, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(before, after, kernel, stride=stride, padding=(kernel - 1) // 2))
