"""Images of 16 bits a channel, which edits reduce to 8: which they are, and colours that are rounded instead of cut."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pagoda.data.decode import UndecodableError, load_upright

_OTHER_END = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_GREY = "LA;16B"


def is_deep(image: Image.Image) -> bool:
    """Whether an image has 16 bits a channel, as far as it is known: an open file of colours forgets it when it is loaded."""
    return image.mode.startswith("I") or any(";16" in mode for mode in _raw_modes(image))


def load_rounded(content: bytes, frame: int | None) -> tuple[Image.Image, bool]:
    """`load_upright`, colours of 16 bits rounded to the nearest of 8 (65535 becomes 255); and whether the file is that deep.

    Pillow keeps the upper byte of a colour alone. A second look at the file, with the order of the two bytes exchanged, finds the
    lower one. Grey images stay in the 16-bit mode that they come in.

    Raises:
        UndecodableError: see `load_upright`; or 16 bits in a form of which the lower bytes cannot be read.
    """
    upright = load_upright(content, frame)
    with Image.open(io.BytesIO(content)) as image:
        image.seek(frame or 0)
        modes = [mode for mode in _raw_modes(image) if ";16" in mode]
        if upright.mode.startswith("I") or not modes:
            return upright, upright.mode.startswith("I")
        if image.format == "PNG" and frame:
            raise UndecodableError("a frame of 16 bits a channel that lies on others; save it as an image of its own")
        # Plain tuples, which every version of Pillow reads.
        image.tile = [(*tile[:3], _exchanged(tile[3])) for tile in image.tile]  # type: ignore[list-item, misc, assignment]
        try:
            image.load()
        except (ValueError, OSError) as error:
            raise UndecodableError(
                f"16 bits a channel as {modes[0]}, which cannot be rounded to 8 ({error})"
            ) from error
        lower = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint32)
    if modes[0] == _GREY:  # read as four bytes: grey and transparency, the upper one of each first
        lower = lower[..., [1, 1, 1, 3]]
    rounded = Image.fromarray(((np.asarray(upright) * np.uint32(256) + lower + 128) // 257).astype(np.uint8))
    rounded.info = dict(upright.info)
    return rounded, True


def _exchanged(args: Any) -> Any:
    """How pixels lie in a file (with settings of the decoder, in a tuple), of 16 bits with the order of the two bytes exchanged."""
    if isinstance(args, tuple):
        return tuple(_exchanged(word) for word in args)
    if args == _GREY:
        return "RGBA"
    return args[:-1] + _OTHER_END[args[-1]] if isinstance(args, str) and ";16" in args else args


def _raw_modes(image: Image.Image) -> list[str]:
    """How the pixels lie in a file that is open and not loaded yet."""
    words = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in getattr(image, "tile", [])]
    return [word for args in words for word in args if isinstance(word, str)]
