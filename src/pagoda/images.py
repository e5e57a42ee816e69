"""Images in and out: bytes from tensors, grids, and files that say what made them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from pagoda.errors import ShapeError
from pagoda.files import atomic_path
from pagoda.version import __version__

METADATA_KEY = "pagoda"
"""Name of the PNG text chunk that holds what made an image, as JSON."""


def to_uint8(images: Tensor) -> Tensor:
    """Images (..., C, H, W) in [-1, 1] as bytes, rounded to nearest; values outside are clamped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, C, H, W) in [-1, 1] with one or three channels as PIL images.

    Raises:
        ShapeError: another number of axes or channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"expected images (B, 1 or 3, H, W), got shape {tuple(images.shape)}.")
    arrays = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


def make_grid(images: Tensor, *, columns: int | None = None, gap: int = 1, scale: int = 1) -> Image.Image:
    """One picture of many.

    Args:
        images: (B, C, H, W) in [-1, 1].
        columns: Images a row; about as many as rows when None.
        gap: White pixels between images.
        scale: Every pixel becomes scale x scale.
    """
    tiles = [np.asarray(image.convert("RGB")) for image in to_pil(images)]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    height, width = tiles[0].shape[:2]
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.repeat(scale, 0).repeat(scale, 1))


def save_image(image: Image.Image, path: Path | str, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all, with what made it in its metadata.

    Args:
        metadata: JSON-able facts: model hash, seeds, condition, settings.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps({"version": __version__, **(metadata or {})}))
    with atomic_path(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def read_metadata(path: Path | str) -> dict[str, Any] | None:
    """What made an image, as `save_image` wrote it; None for an image without it."""
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    return None if text is None else dict(json.loads(text))
