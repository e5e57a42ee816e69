"""The one place where images are made smaller.

Stage 1, the encoder and the growing stages must see the same small version of an image, or the encoder is asked about
images that its teacher has never seen. So there is one `Downsampler`, and its fingerprint goes into every artefact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError, did_you_mean
from pagoda.files import hash_json

DownsamplerKind = Literal["box_bicubic", "lanczos", "area", "bicubic_aa"]

_ALGORITHM_VERSION = (
    1  # Raise it when a change here moves a single pixel: artefacts of the old kernel are then refused.
)


@dataclass(frozen=True)
class Downsampler:
    """Reduces the short side of an image to a size and cuts out the centre square.

    | kind | kernel |
    |---|---|
    | `box_bicubic` | halve with a box while the short side is at least twice the size, then bicubic (guided-diffusion, PaGoDA) |
    | `lanczos` | one Lanczos-3 reduction (the dataset tool of EDM) |
    | `area` | the exact mean over the area that each pixel covers |
    | `bicubic_aa` | one bicubic reduction whose kernel is widened by the scale, that is, antialiased |

    Pillow's filters always widen their kernel by the reduction factor, so `bicubic` of Pillow *is* the antialiased one.
    An image whose short side already has the size is only cut, by every kind.

    Raises:
        ConfigError: `kind` is unknown.

    Source: the kernel of Kim et al. 2024 (PaGoDA, arXiv:2405.14822) is that of Dhariwal & Nichol 2021.
    """

    kind: DownsamplerKind = "box_bicubic"

    def __post_init__(self) -> None:
        if self.kind not in get_args(DownsamplerKind):
            raise ConfigError(
                f"unknown downsampler kind `{self.kind}`. {did_you_mean(self.kind, get_args(DownsamplerKind))}"
            )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal characters that change with the kind and with the algorithm."""
        return hash_json({"downsampler": self.kind, "version": _ALGORITHM_VERSION})

    def __call__(self, image: Image.Image, size: int) -> np.ndarray:
        """The centre square of `image`, `size` pixels a side.

        Args:
            image: Mode "L" or "RGB", any aspect ratio.

        Returns:
            uint8 (size, size, C), C = 1 or 3.

        Raises:
            ShapeError: the image is smaller than `size`, `size` is not positive, or the mode is another one.
        """
        if image.mode not in ("L", "RGB"):
            raise ShapeError(
                f"the downsampler takes images of mode L or RGB, got {image.mode}. Convert the image first."
            )
        if size < 1 or min(image.size) < size:
            raise ShapeError(
                f"an image of {image.width}x{image.height} pixels cannot be reduced to {size}x{size}: "
                "images are never enlarged. Choose a size from 1 to the short side, or leave the image out."
            )
        small = self._reduce(image, size)
        left, top = (small.width - size) // 2, (small.height - size) // 2
        pixels = np.array(small.crop((left, top, left + size, top + size)))  # a copy: Pillow's own memory is read-only
        return pixels.reshape(size, size, -1)

    def tensor(self, images: Tensor, size: int) -> Tensor:
        """The same kernel over a batch of tensors, by way of 8-bit pixels.

        Args:
            images: (B, C, H, W) in [-1, 1], C = 1 or 3; values outside are clamped.

        Returns:
            (B, C, size, size) in [-1, 1], float32, on the device of `images`. Not differentiable.

        Raises:
            ShapeError: the images are smaller than `size`, or have neither 1 nor 3 channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ShapeError(f"images must be (B, 1 or 3, H, W), got {tuple(images.shape)}.")
        channels = images.shape[1]
        pixels = ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        small = np.empty((len(pixels), size, size, channels), dtype=np.uint8)
        for row, target in zip(pixels, small, strict=True):
            target[:] = self(Image.fromarray(row[:, :, 0] if channels == 1 else row), size)
        return (torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1).to(images.device)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """What the downsampler does along either axis of a square image, before it rounds: (new, old) float64, rows sum to 1.

        Raises:
            ShapeError: `new` is not in 1..old.
        """
        if not 1 <= new <= old:
            raise ShapeError(f"{old} pixels cannot be reduced to {new}: choose a number from 1 to {old}.")
        units, height = Image.fromarray(np.eye(old, dtype=np.float32)), old
        if self.kind == "box_bicubic":
            while height >= 2 * new:
                height //= 2
                units = units.resize((old, height), Image.Resampling.BOX)
        if height != new and self.kind == "area":
            return _overlaps(old, new)
        if height != new:
            lanczos = self.kind == "lanczos"
            units = units.resize((old, new), Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC)
        return np.asarray(units, dtype=np.float64)

    def _reduce(self, image: Image.Image, size: int) -> Image.Image:
        """The whole image with its short side at `size`."""
        if self.kind == "box_bicubic":
            while min(image.size) >= 2 * size:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        if min(image.size) == size:
            return image
        scale = size / min(image.size)
        width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
        if self.kind == "area":
            return _area_mean(image, width, height)
        lanczos = self.kind == "lanczos"
        return image.resize((width, height), Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC)


def _area_mean(image: Image.Image, width: int, height: int) -> Image.Image:
    """Each new pixel is the mean over the rectangle that it covers, partly covered pixels by their share.

    Pillow's BOX filter does this for whole factors only: at others it takes a pixel either fully or not at all.
    """
    pixels = np.asarray(image, dtype=np.float64)
    pixels = np.tensordot(_overlaps(image.height, height), pixels, axes=(1, 0))  # (height, W[, C])
    pixels = np.moveaxis(np.tensordot(_overlaps(image.width, width), pixels, axes=(1, 1)), 0, 1)  # (height, width[, C])
    return Image.fromarray(np.floor(pixels + 0.5).astype(np.uint8))


def _overlaps(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of the share that each old pixel has in each new one; every row sums to 1."""
    edges = np.linspace(0, old, new + 1)
    start, stop = edges[:-1, None], edges[1:, None]
    pixel = np.arange(old)[None, :]
    return np.clip(np.minimum(stop, pixel + 1) - np.maximum(start, pixel), 0, None) * (new / old)
