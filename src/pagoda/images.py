"""Images in and out: bytes from tensors, grids, and files that say what made them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.files import atomic_path
from pagoda.version import __version__

METADATA_KEY = "pagoda"
"""Name of the PNG text chunk that holds what made an image, as JSON. WebP and JPEG hold it in EXIF's UserComment."""
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Endings of the files that are written, and their formats."""
_EXIF_IFD, _USER_COMMENT, _SOFTWARE = 0x8769, 0x9286, 0x0131
_ASCII = b"ASCII\0\0\0"
_JPEG_LIMIT = 65533 - 6


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


def save_image(
    image: Image.Image, path: Path | str, *, metadata: Mapping[str, Any] | None = None, quality: int = 95
) -> None:
    """Write a PNG, a lossless WebP or a JPEG, by the name's ending, whole or not at all, with what made it in its metadata.

    Args:
        metadata: JSON-able facts: model hash, seeds, condition, settings. The version is added to them.
        quality: Of a JPEG, 1 to 100.

    Raises:
        ConfigError: another ending, or facts or transparency, which a JPEG cannot hold.
    """
    path = Path(path)
    content = encode_image(image, image_format(path), metadata=metadata, quality=quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_bytes(content)


def save_animation(
    frames: Sequence[Image.Image], path: Path | str, *, milliseconds: int, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an endless animation, a lossless WebP or a GIF, by the name's ending, whole or not at all, with what made it.

    A GIF has 256 colours a frame and times in hundredths of a second.

    Args:
        frames: Two or more, of one size.
        milliseconds: That each frame is shown.

    Raises:
        ConfigError: another ending, or fewer than two frames.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".gif", ".webp") or len(frames) < 2:
        raise ConfigError(
            f"animations have 2 frames or more and end with .gif or .webp, got {len(frames)} as {path.name!r}."
        )
    text = json.dumps({"version": __version__, **(metadata or {})})
    options: dict[str, Any] = {"comment": f"{METADATA_KEY} {text}".encode("ascii")}
    if ending == ".webp":
        options = {"exif": _exif_block(text), "lossless": True, "method": 4}
    buffer = io.BytesIO()
    images = [frame.convert("RGB") for frame in frames]
    images[0].save(
        buffer,
        format="GIF" if ending == ".gif" else "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=milliseconds,
        loop=0,
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getvalue())


def image_format(path: Path | str) -> str:
    """PNG, WEBP or JPEG, by the ending of a name.

    Raises:
        ConfigError: another ending.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(f"images are written as {', '.join(sorted(FORMATS))}, got the name {Path(path).name!r}.")
    return FORMATS[ending]


def encode_image(
    image: Image.Image, format: str, *, metadata: Mapping[str, Any] | None = None, quality: int = 95
) -> bytes:
    """The bytes of an image file, see `save_image`; with the image's ICC profile, where it has one.

    Raises:
        ConfigError: facts that a JPEG cannot hold, or transparency.
    """
    if format == "JPEG" and image.mode in ("LA", "RGBA"):
        raise ConfigError("a JPEG has no transparency, this image has: write .png or .webp.")
    facts = {"version": __version__, **(metadata or {})}
    options: dict[str, Any] = {}
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(facts))
        options = {"pnginfo": info}
    else:
        if format == "JPEG":
            facts["quality"] = quality
        block = _exif_block(json.dumps(facts))
        if format == "JPEG" and len(block) > _JPEG_LIMIT:
            raise ConfigError(
                f"what made this image takes {len(block)} bytes, a JPEG holds {_JPEG_LIMIT}; write .png or .webp, or fewer images."
            )
        options = {"exif": block, **({"quality": quality} if format == "JPEG" else {"lossless": True})}
    buffer = io.BytesIO()
    image.save(buffer, format=format, icc_profile=image.info.get("icc_profile"), **options)
    return buffer.getvalue()


def _exif_block(text: str) -> bytes:
    """EXIF that holds a text in ASCII."""
    exif = Image.Exif()
    exif[_SOFTWARE] = f"{METADATA_KEY} {__version__}"
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + text.encode("ascii")
    return exif.tobytes()


def read_metadata(path: Path | str) -> dict[str, Any] | None:
    """What made an image, as `save_image` wrote it; None for an image without it.

    Raises:
        ArtifactError: the file is no image, or its metadata was damaged.
    """
    try:
        with Image.open(path) as image:
            text = _metadata_text(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"{path} cannot be read as an image ({error}). Give a PNG, WebP or JPEG file.") from error
    if text is None:
        return None
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise ArtifactError(
            f"{path} says what made it in words that are no JSON ({error}): it was tampered with."
        ) from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path} says what made it as {type(facts).__name__}, not by name: it was tampered with.")
    return facts


def _metadata_text(image: Image.Image) -> str | None:
    text = image.info.get(METADATA_KEY)
    if text is not None:
        return str(text)
    said = image.info.get("comment")
    if image.format == "GIF" and isinstance(said, bytes) and said.startswith(f"{METADATA_KEY} {{".encode()):
        return said.removeprefix(f"{METADATA_KEY} ".encode()).decode("ascii", errors="replace")
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII + b"{"):
        return None  # a photograph's own comment, or none
    return comment.removeprefix(_ASCII).decode("ascii", errors="replace")
