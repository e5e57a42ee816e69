"""Differentiable augmentation of what a discriminator or a feature distance sees, real and made images alike.

Source: Zhao et al. 2020, DiffAugment, arXiv:2006.10738.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError, did_you_mean

POLICIES = ("translation", "cutout", "colour", "flip")
NUMBERS = 8
"""Random numbers that one image takes."""
TRANSLATION = 0.125
"""Largest shift, as a fraction of the side."""
CUTOUT = 0.2
"""Side of the square that is cut out, as a fraction of the image's."""


class DiffAugment:
    """Random translation, cut-out, colour and mirroring, each always applied; relative, so one draw fits every size.

    Draw once and apply to both images of a pair:

        draw = augment.draw(len(real), generator)
        distance(augment.apply(real, draw), augment.apply(made, draw))

    Args:
        policy: Some of `POLICIES`; they are applied in the order colour, flip, translation, cutout. () changes nothing.

    Raises:
        ConfigError: an unknown policy.
    """

    def __init__(self, policy: Sequence[str] = POLICIES) -> None:
        for name in policy:
            if name not in POLICIES:
                raise ConfigError(f"unknown augmentation `{name}`. {did_you_mean(name, POLICIES)}")
        self.policy = tuple(policy)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Random numbers in [0, 1) for `batch` images, one row each, on the CPU.

        The numbers of a policy do not depend on which others are on.
        """
        return self.split(torch.rand(batch, NUMBERS, generator=generator))

    def split(self, numbers: Tensor) -> dict[str, Tensor]:
        """A draw from numbers (B, `NUMBERS`) in [0, 1) of one's own, for whom every row has a seed."""
        columns = {"colour": slice(0, 3), "flip": slice(3, 4), "translation": slice(4, 6), "cutout": slice(6, 8)}
        return {name: numbers[:, columns[name]] for name in self.policy}

    def apply(self, images: Tensor, draw: Mapping[str, Tensor]) -> Tensor:
        """Augment images (B, C, H, W) with a draw of as many rows; differentiable.

        Raises:
            ShapeError: the draw has another number of rows.
            ConfigError: the draw lacks a policy.
        """
        steps = {"colour": _colour, "flip": _flip, "translation": _translate, "cutout": _cutout}
        for name, step in steps.items():
            if name not in self.policy:
                continue
            if name not in draw:
                raise ConfigError(f"the draw has no `{name}`; make it with this augmentation's own `draw`.")
            if len(draw[name]) != len(images):
                raise ShapeError(f"the draw has {len(draw[name])} rows for {len(images)} images.")
            images = step(images, draw[name].to(images.device))
        return images


def _colour(images: Tensor, u: Tensor) -> Tensor:
    """Brightness +-0.5, saturation x 0..2, contrast x 0.5..1.5."""
    brightness, saturation, contrast = (u[:, k, None, None, None].to(images.dtype) for k in range(3))
    images = images + (brightness - 0.5)
    mean = images.mean(1, keepdim=True)
    images = (images - mean) * (2 * saturation) + mean if images.shape[1] > 1 else images  # grey has no saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _flip(images: Tensor, u: Tensor) -> Tensor:
    return torch.where((u < 0.5)[..., None, None], images.flip(-1), images)


def _translate(images: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels; what enters from outside is 0, mid-grey."""
    height, width = images.shape[-2:]
    rows = _shifted(u[:, 0], height)
    columns = _shifted(u[:, 1], width)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ]
    return moved.permute(0, 3, 1, 2) * inside[:, None].to(images.dtype)


def _shifted(u: Tensor, length: int) -> Tensor:
    """(B,) in [0, 1) -> (B, length): where each pixel comes from along one axis; shifts are uniform over whole pixels."""
    reach = round(TRANSLATION * length)
    shift = (u * (2 * reach + 1)).floor().long() - reach
    return torch.arange(length, device=u.device) + shift[:, None]


def _cutout(images: Tensor, u: Tensor) -> Tensor:
    """Set a square to 0, mid-grey; its centre may lie anywhere, so that it may stick out."""
    hit = [_covered(u[:, k], images.shape[2 + k]) for k in range(2)]
    keep = ~(hit[0][:, :, None] & hit[1][:, None, :])
    return images * keep[:, None].to(images.dtype)


def _covered(u: Tensor, length: int) -> Tensor:
    """(B,) in [0, 1) -> (B, length) bool: pixels inside the cut along one axis."""
    side = max(1, round(CUTOUT * length))
    start = (u * length).floor().long() - side // 2
    pixel = torch.arange(length, device=u.device)
    return (pixel >= start[:, None]) & (pixel < start[:, None] + side)
