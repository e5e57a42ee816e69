"""What is to be kept of an image and what is to be made: masks that are given, painted into the image, or boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from pagoda.data.decode import UndecodableError, to_plain
from pagoda.errors import ConfigError, DataError
from pagoda.images import to_uint8
from pagoda.steering.fitting import ImageLike, Picture, Square, cut_square, load_image, to_tensor
from pagoda.steering.holes import fill_hole, with_border

MaskIs = Literal["known", "holes"]
MASK_IS: tuple[MaskIs, ...] = ("known", "holes")
"""What may be white in a mask."""


def read_mask(
    mask: ImageLike | np.ndarray | Tensor,
    size: tuple[int, int],
    *,
    mask_is: MaskIs = "known",
    threshold: int | None = None,
) -> np.ndarray:
    """A mask of an image: True = keep, False = hole.

    Args:
        mask: A file or image in black and white (0 and 255, or 0 and 1); or an array or tensor (H, W) of booleans, or of 0 and 1.
        size: Width and height of the image, in pixels.
        mask_is: What is white (1, True): "known", what is kept; "holes", what is to be made.
        threshold: Values of a grey file from this one on, 1 to 255, are white; None refuses grey ones.

    Returns:
        bool (H, W).

    Raises:
        ConfigError: an unknown convention; a threshold out of range, or of an array.
        DataError: another size, no hole, or nothing but a hole; values between black and white; a file that cannot be read.
    """
    check_mask_settings(mask_is=mask_is, threshold=threshold)
    if isinstance(mask, np.ndarray | Tensor):
        values = np.asarray(mask)
        if threshold is not None:
            raise ConfigError("mask_threshold is read for images; of an array give `values >= threshold`.")
        if values.dtype != bool and not np.isin(values, (0, 1)).all():
            raise DataError("a mask of numbers holds 0 (black) and 1 (white) only; give `values >= threshold`.")
        white = values.astype(bool)
    else:
        try:
            plain = to_plain(load_image(mask, None), (255, 255, 255))
        except UndecodableError as error:
            raise DataError(f"the mask cannot be used: {error}. Give a PNG of the image's size.") from error
        values = np.asarray(plain.convert("L"))
        if threshold is None and not (np.isin(values, (0, 255)).all() or np.isin(values, (0, 1)).all()):
            grey = np.unique(values[(values > 0) & (values < 255)])
            raise DataError(
                f"a mask is black and white (0 and 255, or 0 and 1), this one also has {len(grey)} values between, from {grey[0]} to "
                f"{grey[-1]}. Draw it without soft edges and save it as PNG, or say which value is white by --mask-threshold N "
                "(in Python mask_threshold=N), such as 128."
            )
        white = values > 0 if threshold is None else values >= threshold
    if white.shape != (size[1], size[0]):
        seen = " x ".join(map(str, white.shape[::-1]))
        raise DataError(f"the mask has {seen} px, the image {size[0]} x {size[1]} px. Give a mask of the image's size.")
    return _check_hole(white if mask_is == "known" else ~white, mask_is)


def check_mask_settings(*, mask_is: str = "known", threshold: int | None = None, given: bool = True) -> None:
    """Refuse settings of a mask that are none, or that no mask reads.

    Args:
        mask_is, threshold: See `read_mask`.
        given: Whether there is a mask that reads them.

    Raises:
        ConfigError: see above.
    """
    if mask_is not in MASK_IS:
        raise ConfigError(f"mask_is says what is white in a mask, {' or '.join(MASK_IS)}; got {mask_is!r}.")
    if threshold is not None and not 1 <= threshold <= 255:
        raise ConfigError(f"mask_threshold is a value of bytes from 1 to 255, got {threshold}.")
    if not given and (mask_is != "known" or threshold is not None):
        name = f"mask_is={mask_is}" if mask_is != "known" else f"mask_threshold={threshold}"
        raise ConfigError(f"{name} is read for a mask alone, and none is given: leave it out, or give one.")


def paint_mask(
    picture: Picture, *, colour: str | None = None, holes: Sequence[tuple[int, int, int, int]] = ()
) -> np.ndarray:
    """A mask from what was painted into the image itself, or from boxes: bool (H, W), True = keep.

    Args:
        picture: The image.
        colour: Pixels of exactly this colour (in any form that Pillow reads) are the hole; "transparent": fully transparent ones.
        holes: left, top, width and height of boxes that belong to the hole, in pixels.

    Raises:
        ConfigError: no colour at all, or a box beyond the image.
        DataError: no hole, or nothing but a hole; "transparent" for an image without transparency.
    """
    width, height = picture.size
    keep = np.ones((height, width), bool)
    if colour == "transparent":
        if picture.alpha is None:
            raise DataError(f"{picture.name} has no transparent pixels, so no hole is painted in it.")
        keep &= picture.alpha > 0
    elif colour is not None:
        try:
            wanted = np.array(ImageColor.getrgb(colour)[:3])
        except ValueError as error:
            raise ConfigError(
                f"no colour: {colour!r}. Give one such as `magenta` or `#ff00ff`, or `transparent`."
            ) from error
        keep &= (picture.own != wanted[: picture.own.shape[2]]).any(-1)
    for left, top, wide, high in holes:
        if left < 0 or top < 0 or wide < 1 or high < 1 or left + wide > width or top + high > height:
            raise ConfigError(
                f"the hole {left},{top},{wide},{high} does not lie within the image's {width} x {height} px."
            )
        keep[top : top + high, left : left + wide] = False
    return _check_hole(keep)


def fit_mask(keep: np.ndarray, square: Square, size: int) -> Tensor:
    """A mask as the model sees it, bool (1, 1, size, size): True where every pixel below is kept.

    Raises:
        DataError: the hole reaches beyond the square.
    """
    rows, columns = square.inside(keep.shape[1], keep.shape[0])
    outside = keep.copy()
    outside[rows, columns] = True
    if not outside.all():
        raise DataError("the hole reaches beyond the model's square. Use fit=pad, or a box that holds the whole hole.")
    cut = cut_square(keep, square)
    edges = np.arange(size) * square.side
    first, last = edges // size, np.maximum(edges // size + 1, -(-(edges + square.side) // size))
    holes = np.pad(np.cumsum(np.cumsum(~cut, 0), 1), ((1, 0), (1, 0)))
    count = holes[last][:, last] - holes[first][:, last] - holes[last][:, first] + holes[first][:, first]
    return torch.from_numpy(count == 0)[None, None]


def _check_hole(keep: np.ndarray, mask_is: MaskIs = "known") -> np.ndarray:
    hole = "Dark pixels (0)" if mask_is == "known" else "White pixels (1)"
    if keep.all():
        raise DataError(
            f"the mask has no hole: nothing is to be made. {hole} of a mask are the hole, mask_is={mask_is}."
        )
    if not keep.any():
        raise DataError(
            "the mask is all hole: nothing of the image is kept. `pagoda sample` makes images from nothing."
        )
    return keep


def fill_picture(picture: Picture, keep: np.ndarray) -> Picture:
    """The picture with its hole smoothly continued, so that nothing of what lay there leaks out when it is reduced."""
    rows, columns = (np.flatnonzero((~keep).any(axis)) for axis in (1, 0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    top, bottom, left, right = with_border(box, keep.shape)  # nothing else of a large photo is needed
    filled = fill_hole(
        to_tensor(picture.pixels[top:bottom, left:right]), torch.from_numpy(keep[top:bottom, left:right])
    )
    pixels = picture.pixels.copy()
    pixels[top:bottom, left:right] = to_uint8(filled)[0].permute(1, 2, 0).numpy()
    return replace(picture, pixels=pixels)
