"""A user's image onto the model's square, and the edited square back into the image.

The image may have any size, shape and file format. A square is laid over it: the whole image with its edge continued ("pad"), its centre
("crop"), or a box of the user's. The square is reduced by the run's downsampler, or enlarged where it is smaller than the model's.
Compositing puts the edited square back at the image's own resolution; pixels that are to be kept are copied byte by byte.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pagoda.data import Downsampler
from pagoda.data.decode import UndecodableError, has_colour, load_upright, to_plain
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.images import to_uint8
from pagoda.steering.depth import is_deep, load_rounded

ImageLike: TypeAlias = Path | str | bytes | Image.Image
"""A file's name, its bytes, or an image that is open."""
Fit = Literal["pad", "crop"]
Box: TypeAlias = tuple[int, int, int]
"""left, top and side of a square, in pixels of the user's image."""


@dataclass(frozen=True)
class Picture:
    """A user's image as plain pixels.

    Attributes:
        pixels: uint8 (H, W, C), upright, composited on the background where the image is transparent; C is 1 or 3.
        own: uint8 (H, W, C) with the image's own colours under transparent pixels; `pixels` where there are none.
        alpha: uint8 (H, W), or None for an image without.
        name: For messages.
        profile: The file's ICC profile, where it is one of such pixels (grey or RGB); None for a file without.
    """

    pixels: np.ndarray
    own: np.ndarray
    alpha: np.ndarray | None
    name: str
    profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, in the order of Pillow."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def digest(self) -> str:
        """SHA-256 over the pixels, 64 hexadecimal characters, whatever file they came in."""
        found = hashlib.sha256(f"{self.pixels.shape}|".encode() + self.own.tobytes())
        found.update(b"" if self.alpha is None else self.alpha.tobytes())
        return found.hexdigest()

    def to_pil(self) -> Image.Image:
        """The opaque pixels."""
        return _to_pil(self.pixels)


@dataclass(frozen=True)
class Square:
    """A square over an image, in pixels of the image; it may reach beyond the edges."""

    left: int
    top: int
    side: int

    def inside(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of the image that the square covers."""
        rows = slice(max(0, self.top), min(height, self.top + self.side))
        return rows, slice(max(0, self.left), min(width, self.left + self.side))


def read_picture(
    image: ImageLike,
    *,
    channels: int,
    background: tuple[int, int, int] = (255, 255, 255),
    frame: int | None = None,
    frame_name: str = "frame",
) -> Picture:
    """An image for a model of 1 or 3 channels: upright by its EXIF, 8 bits (65535 becomes 255), transparency composited.

    An image of 16 bits is warned about.

    Args:
        image: Name of a file, its bytes, or a Pillow image.
        channels: Of the model. Grey images become RGB; an RGB image without colour becomes grey.
        background: Behind transparent pixels.
        frame: Which frame of an animation, counted from 0; None refuses animations.
        frame_name: What the caller calls `frame`, for messages.

    Raises:
        DataError: it cannot be read, it is animated and no frame was chosen, or it is coloured and the model is grey.
    """
    name = str(image) if isinstance(image, Path | str) else "the image"
    try:
        upright, deep = _load(image, frame)
        plain = to_plain(upright, background)
    except UndecodableError as error:
        step = (
            f"Choose one of its frames, counted from 0, by --{frame_name.replace('_', '-')} (in Python {frame_name}=)."
            if "frames" in str(error)
            else "Give a PNG, WebP, JPEG or the like."
        )
        raise DataError(f"{name} cannot be edited: {error}. {step}") from error
    if deep:
        cut = " Open the file by its name: of an image that Pillow has opened, colours are cut, not rounded."
        warnings.warn(
            f"{name} has 16 bits a channel. It is edited and written with 8, its known pixels too: 65535 becomes 255."
            + (cut if isinstance(image, Image.Image) and not image.mode.startswith("I") else ""),
            stacklevel=2,
        )
    alpha = None
    own = plain
    if "A" in upright.getbands() or "a" in upright.getbands() or "transparency" in upright.info:
        with_alpha = upright.convert("RGBA")
        alpha = np.asarray(with_alpha.getchannel("A"))
        own = with_alpha.convert("RGB")
        if plain.mode == "L":
            own = own.convert("L")
    if channels == 1 and plain.mode == "RGB":
        if has_colour(plain):
            raise DataError(
                f"{name} is coloured and the model makes grey images. Convert it first: image.convert('L')."
            )
        plain, own = plain.getchannel(0), own.convert("L")
    elif channels == 3:
        plain, own = plain.convert("RGB"), own.convert("RGB")
    profile = upright.info.get("icc_profile")
    fits = isinstance(profile, bytes) and profile[16:20] == (b"GRAY" if channels == 1 else b"RGB ")
    return Picture(_pixels(plain), _pixels(own), alpha, name, profile if fits else None)


def choose_square(size: tuple[int, int], *, fit: Fit | None = None, box: Box | None = None) -> Square:
    """Where the model's square lies.

    Args:
        size: Width and height of the image, in pixels.
        fit: "pad", also when None: the whole image, its edge continued; "crop": its centre.
        box: left, top and side of a square within the image, in place of `fit`.

    Raises:
        ConfigError: an unknown way to fit, one beside a box, or a box that reaches beyond the image.
    """
    width, height = size
    if box is not None and fit is not None:
        raise ConfigError(
            f"the box {tuple(box)} says where the square lies, and fit={fit} says it too: leave one of them out."
        )
    fit = fit or "pad"
    if box is not None:
        left, top, side = box
        if side < 1 or left < 0 or top < 0 or left + side > width or top + side > height:
            raise ConfigError(
                f"the box (left, top, side) = {tuple(box)} does not lie within the image's {width} x {height} px."
            )
        return Square(left, top, side)
    if fit not in ("pad", "crop"):
        raise ConfigError(f"fit must be pad or crop, got {fit!r}.")
    side = max(size) if fit == "pad" else min(size)
    return Square((width - side) // 2, (height - side) // 2, side)


def cut_square(pixels: np.ndarray, square: Square) -> np.ndarray:
    """The pixels (side, side, ...) under a square; beyond the image its edge is continued."""
    rows = np.arange(square.top, square.top + square.side).clip(0, pixels.shape[0] - 1)
    columns = np.arange(square.left, square.left + square.side).clip(0, pixels.shape[1] - 1)
    return pixels[rows[:, None], columns[None, :]]


def resize_square(pixels: np.ndarray, size: int, downsampler: Downsampler) -> np.ndarray:
    """A square (s, s, C) of bytes at another size: by the downsampler where it shrinks, bicubic where it grows."""
    if len(pixels) == size:
        return pixels
    image = _to_pil(pixels)
    if len(pixels) > size:
        return downsampler(image, size)
    return _pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Bytes (H, W, C) as an image (1, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 127.5 - 1


def fit_picture(picture: Picture, square: Square, size: int, downsampler: Downsampler) -> Tensor:
    """What the model sees of a picture: (1, C, size, size) in [-1, 1]."""
    return to_tensor(resize_square(cut_square(picture.pixels, square), size, downsampler))


def composite(
    picture: Picture, square: Square, edited: Tensor, downsampler: Downsampler, *, keep: np.ndarray | None = None
) -> Picture:
    """The picture with an edited square in it, at its own size. The same call again changes nothing.

    Args:
        picture: As it was.
        square: Where the edited image belongs; what reaches beyond the picture is cut off.
        edited: (1, C, s, s) in [-1, 1].
        downsampler: Shrinks `edited` where the square is smaller.
        keep: bool (H, W); pixels of the picture that stay as they are, byte by byte. Without it all pixels of the square are
            replaced. What is not replaced keeps its transparency; what is replaced becomes opaque.

    Raises:
        ShapeError: `edited` has another number of channels, or `keep` another size.
    """
    height, width, channels = picture.pixels.shape
    if edited.ndim != 4 or edited.shape[:2] != (1, channels) or edited.shape[2] != edited.shape[3]:
        raise ShapeError(f"the edited square must be (1, {channels}, s, s), got {tuple(edited.shape)}.")
    if keep is not None and keep.shape != (height, width):
        raise ShapeError(f"the mask has {keep.shape[1]} x {keep.shape[0]} px, the image {width} x {height}.")
    new = resize_square(to_uint8(edited)[0].permute(1, 2, 0).numpy(), square.side, downsampler)
    rows, columns = square.inside(width, height)
    part = new[
        rows.start - square.top : rows.stop - square.top, columns.start - square.left : columns.stop - square.left
    ]
    replaced = np.zeros((height, width), bool)
    replaced[rows, columns] = True
    if keep is not None:
        replaced &= ~keep
    pixels, own = picture.pixels.copy(), picture.own.copy()
    for target in (pixels, own):
        target[rows, columns] = np.where(replaced[rows, columns][..., None], part, target[rows, columns])
    alpha = None
    if picture.alpha is not None and not (keep is None and replaced.all()):
        alpha = np.where(replaced, np.uint8(255), picture.alpha)
    return replace(picture, pixels=pixels, own=pixels if alpha is None else own, alpha=alpha)


def to_image(picture: Picture) -> Image.Image:
    """A picture as a Pillow image: "L" or "RGB", with alpha "LA" or "RGBA"; the profile lies in its `info`."""
    image = _to_pil(picture.own)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    if picture.profile is not None:
        image.info["icc_profile"] = picture.profile
    return image


def load_image(image: ImageLike, frame: int | None) -> Image.Image:
    """One frame, upright, in the mode that it came in, colours of 16 bits rounded to 8; None refuses animations.

    Raises:
        UndecodableError: see `load_rounded`; or a file that cannot be read.
    """
    return _load(image, frame)[0]


def _load(image: ImageLike, frame: int | None) -> tuple[Image.Image, bool]:
    """`load_image`, and whether it has 16 bits a channel."""
    if isinstance(image, Image.Image):
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frame is None and frames > 1:
            raise UndecodableError(f"animated, {frames} frames")
        if frame is not None and not 0 <= frame < frames:
            raise UndecodableError(f"has {frames} frames, none of number {frame}")
        if frame is not None:
            image.seek(frame)
        deep = is_deep(image)
        buffer = io.BytesIO()
        # PNG keeps every pixel, TIFF also modes that PNG does not know.
        known = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        image.save(buffer, format="PNG" if known else "TIFF", exif=image.getexif())
        return load_upright(buffer.getvalue()), deep
    try:
        return load_rounded(image if isinstance(image, bytes) else Path(image).read_bytes(), frame)
    except OSError as error:
        raise UndecodableError(f"unreadable: {error.strerror}") from error


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def _to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
