"""A multi-scale, conditional discriminator: small heads on the maps of a frozen feature stack (see `MixedFeatures` for mixed ones).

Nothing in it looks across the batch (group norm instead of the official batch norm), so that logits depend neither on the
batch size nor on the number of processes.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, after Sauer et al. 2022, StyleGAN-XL, arXiv:2202.00273.
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
from pagoda.networks.features import FeatureStack
from pagoda.networks.growth import count_groups, zero_layer


class MapHead(nn.Module):
    """One feature map -> a map of logits.

    conv 1x1 (pixels: 3x3), then stride-2 convs down to `target` px, then a conv to h (B, width, s, s);
    logits = conv(h) + <h, embed(label) + embed(guidance)> / sqrt(width). All convs are spectrally normalised.

    Args:
        channels: Channels of the map.
        side: Side of the map in pixels.
        target: Side of the map of logits, at most; a smaller map keeps its side.
        width: Channels inside.
        num_classes: 0 for none; otherwise the table has one row more, for samples without a class.
        guidance: Also project on the guidance weight that an image was made with; its embedding starts at zero.
        pixels: The map is the image itself.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        target: int,
        width: int,
        num_classes: int,
        guidance: bool = False,
        pixels: bool = False,
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
        self.guidance = GuidanceEmbedding(width) if guidance else None
        self.scale = 1 / math.sqrt(width)

    def forward(self, features: Tensor, labels: Tensor | None, guidance: Tensor | None = None) -> Tensor:
        """Map (B, C, h, w), rows of the table (B,) and guidance weights (B,) -> logits (B, s * s)."""
        h = self.layers(features)
        logits = self.logit(F.leaky_relu(h, 0.2))[:, 0]
        if self.label is not None and labels is not None:
            logits = logits + torch.einsum("bchw,bc->bhw", h, self.label(labels)) * self.scale
        if self.guidance is not None and guidance is not None:
            logits = logits + torch.einsum("bchw,bc->bhw", h, self.guidance(guidance).to(h)) * self.scale
        return logits.flatten(1)


class GuidanceEmbedding(nn.Module):
    """Guidance weights (B,) -> (B, width): sines and cosines of w at periods 2 to 64, then two layers, the last one zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2.0 ** torch.arange(6), persistent=False)
        self.layers = nn.Sequential(nn.Linear(12, width), nn.SiLU(), nn.Linear(width, width))
        zero_layer(self.layers[-1])

    def forward(self, guidance: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        phases = guidance[:, None] * self.get_buffer("frequencies")
        embedded: Tensor = self.layers(torch.cat([phases.sin(), phases.cos()], dim=1))
        return embedded


class ProjectedDiscriminator(nn.Module):
    """One head per feature map; their logits are concatenated. It does not own the stack that makes the maps.

    Power iterations of the spectral norms advance in training mode; their vectors are buffers of the state dict.

    Args:
        channels: Channels of each map.
        sides: Side of each map in pixels (`FeatureStack.sides`).
        num_classes: 0 for none.
        width: Channels inside each head.
        guidance: Whether samples are also judged by the guidance weight that they were made with.
        raw_pixels: The last map is the image itself.

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
        guidance: bool = False,
        raw_pixels: bool = False,
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
        self.guidance = guidance
        self.raw_pixels = raw_pixels
        target = 8 if max(sides) > 16 else 4  # the official 8 px; small maps would not be reduced at all
        self.heads = nn.ModuleList(
            MapHead(
                count,
                side,
                target=target,
                width=width,
                num_classes=num_classes,
                guidance=guidance,
                pixels=raw_pixels and index == len(sides) - 1,
            )
            for index, (count, side) in enumerate(zip(channels, sides, strict=True))
        )

    def forward(self, maps: Sequence[Tensor], condition: Condition = UNCONDITIONAL) -> Tensor:
        """Logits (B, P) of all patches of all maps; positive = real.

        Args:
            maps: (B, C_k, h_k, w_k).
            condition: Labels, -1 or none at all for no class; guidance weights where the heads take them.

        Raises:
            ShapeError: another number of maps.
            ConfigError: a label out of range, or a guidance weight that is missing or has no input.
        """
        if len(maps) != len(self.heads):
            raise ShapeError(f"this discriminator reads {len(self.heads)} maps, got {len(maps)}.")
        labels = None
        if self.num_classes or condition.label is not None:
            labels = resolve_labels(condition.label, self.num_classes, len(maps[0]), maps[0].device)
        if (condition.guidance is not None) != self.guidance:
            seen = "none came" if condition.guidance is None else "some came"
            raise ConfigError(
                f"this discriminator was built with guidance={self.guidance}, and of guidance weights {seen}; build it "
                f"with guidance={not self.guidance}, or {'give' if self.guidance else 'leave out'} `condition.guidance`."
            )
        judged = [head(m, labels, condition.guidance) for head, m in zip(self.heads, maps, strict=True)]
        return torch.cat(judged, dim=1)


class Discriminator(nn.Module):
    """A feature stack and the heads on it: images in, logits out. Only the heads are trained.

    Args:
        stack: Frozen.
        heads: Built for the stack's maps, and with `raw_pixels` for the image after them.
    """

    def __init__(self, stack: FeatureStack, heads: ProjectedDiscriminator) -> None:
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
        guidance: bool = False,
        raw_pixels: bool = False,
    ) -> Discriminator:
        """Fresh heads for a stack and images of `image_size` px; the maps' sizes are measured. See `ProjectedDiscriminator`."""
        heads = ProjectedDiscriminator(
            [*stack.channels, *([stack.in_channels] if raw_pixels else [])],
            sides=[*stack.sides(image_size), *([image_size] if raw_pixels else [])],
            num_classes=num_classes,
            width=width,
            guidance=guidance,
            raw_pixels=raw_pixels,
        )
        return cls(stack, heads)

    def forward(self, images: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Logits (B, P) of images (B, C, H, W) in [-1, 1]; positive = real."""
        maps = self.stack(images)
        return self.heads([*maps, images] if self.heads.raw_pixels else maps, condition)

    def heads_state_dict(self) -> dict[str, Tensor]:
        """The state of the heads only: the stack is frozen and is found again by its fingerprint."""
        return self.heads.state_dict()


def _conv(before: int, after: int, kernel: int, *, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(before, after, kernel, stride=stride, padding=(kernel - 1) // 2))
