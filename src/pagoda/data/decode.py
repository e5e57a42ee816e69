"""From the bytes of an image file to plain pixels: upright, opaque, 8 bits, "L" or "RGB"."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Colour = tuple[int, int, int]

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_PLAIN_COLOUR = ("CMYK", "YCbCr", "LAB", "HSV", "RGBX")


class UndecodableError(ValueError):
    """The bytes are not an image that can be used; the text is the reason, in a few words."""


def decode_image(content: bytes, background: Colour) -> Image.Image:
    """The first frame of an image file as plain pixels.

    Args:
        content: The whole file.
        background: What transparent pixels are composited on.

    Returns:
        Mode "L" or "RGB".

    Raises:
        UndecodableError: empty, truncated, not an image, far too large, or of a pixel format without a known range.
    """
    return to_plain(load_upright(content), background)


def load_upright(content: bytes, frame: int | None = 0) -> Image.Image:
    """One frame of an image file, upright, in the mode that it came in.

    Args:
        content: The whole file.
        frame: Which one, counted from 0; None takes the only one and refuses a file with several.

    Raises:
        UndecodableError: see `decode_image`; or no such frame, or several and none chosen.
    """
    if not content:
        raise UndecodableError("0 bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns about images beyond its limit of pixels, and raises beyond twice the limit: both are refused.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                # The second image of an MPO, as telephones write them, is a preview.
                count = 1 if image.format == "MPO" or frame == 0 else getattr(image, "n_frames", 1)
                if frame is None and count > 1:
                    raise UndecodableError(f"animated, {count} frames")
                if frame is not None and not 0 <= frame < count:
                    raise UndecodableError(f"has {count} frames, none of number {frame}")
                image.seek(frame or 0)
                image.load()
                return ImageOps.exif_transpose(image)
    except UndecodableError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UndecodableError("too many pixels, a decompression bomb?") from error
    except UnidentifiedImageError as error:
        known = content.startswith(_MAGIC)
        raise UndecodableError("truncated or damaged" if known else "not an image") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, OverflowError) as error:
        truncated = any(word in str(error).lower() for word in ("truncated", "broken data stream", "not enough"))
        raise UndecodableError("truncated" if truncated else f"damaged: {error}") from error


def to_plain(image: Image.Image, background: Colour) -> Image.Image:
    """Pixels as "L" or "RGB", whatever mode they came in.

    Transparency is composited on the background, so a grey image on a coloured background becomes RGB. 16-bit values
    0..65535 map onto 0..255; 1-bit images become grey.

    Raises:
        UndecodableError: the mode has no known range (32-bit integers beyond 65535, floats).
    """
    mode = image.mode
    if mode.startswith("I"):
        return _from_16_bit(image)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _composite(image, background)
    if mode in ("L", "RGB"):
        return image.copy()
    if mode == "1":
        return image.convert("L")
    if mode == "P":
        return image.convert("RGB")
    if mode in _PLAIN_COLOUR:
        return image.convert("RGB")
    raise UndecodableError(f"pixel format {mode} has no known range")


def _composite(image: Image.Image, background: Colour) -> Image.Image:
    """out = alpha * image + (1 - alpha) * background, rounded, per channel."""
    grey = image.mode in ("LA", "La", "L", "1") and len(set(background)) == 1
    if image.mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(image.convert("RGBA"), dtype=np.uint32)
    alpha = pixels[:, :, 3:]
    mixed = pixels[:, :, :3] * alpha + np.asarray(background, dtype=np.uint32) * (255 - alpha)
    opaque = ((mixed + 127) // 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(opaque[:, :, 0]) if grey else opaque)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Modes I;16, I;16B, I;16L and I: 65535 becomes 255. Older versions of Pillow open 16-bit PNG files as mode I."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UndecodableError(f"integer pixels from {values.min()} to {values.max()} have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def has_colour(image: Image.Image) -> bool:
    """Whether any pixel of an "L" or "RGB" image has unequal red, green and blue."""
    if image.mode == "L":
        return False
    pixels = np.asarray(image)
    return bool((pixels[:, :, 0] != pixels[:, :, 1]).any() or (pixels[:, :, 1] != pixels[:, :, 2]).any())


def pad_image(image: Image.Image, size: int, background: Colour) -> Image.Image:
    """An "L" or "RGB" image in the centre of a `size` x `size` square of the background.

    Raises:
        UndecodableError: the image is larger than the square.
    """
    if max(image.size) > size:
        raise UndecodableError(f"{image.width}x{image.height} pixels do not fit into source.pad={size}")
    if image.mode == "L" and len(set(background)) > 1:
        image = image.convert("RGB")
    square = Image.new(image.mode, (size, size), background[0] if image.mode == "L" else background)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square
