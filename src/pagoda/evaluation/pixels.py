"""Figures read off the pixels alone, in float64: fidelity of a reconstruction, contrast, sharpness."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ShapeError


class Contrast(NamedTuple):
    """Standard deviations of pixel values, in the units of the pixels."""

    per_image: float
    """Mean over images of the standard deviation within the image."""
    overall: float
    """Standard deviation over all pixels of all images."""


def psnr(images: Tensor, references: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over images; infinite when an image equals its reference.

    10 log10(peak^2 / MSE) with peak 2, the length of [-1, 1].

    Args:
        images, references: (B, C, H, W) in [-1, 1].

    Raises:
        ShapeError: different shapes, or no image.
    """
    if images.shape != references.shape or images.ndim != 4 or len(images) == 0:
        raise ShapeError(
            f"PSNR compares images of one shape (B, C, H, W), got {tuple(images.shape)} and {tuple(references.shape)}."
        )
    errors = (images.double() - references.double()).square().mean((1, 2, 3)).tolist()
    return sum(10 * math.log10(4 / e) if e > 0 else math.inf for e in errors) / len(errors)


def contrast(images: Tensor) -> Contrast:
    """Standard deviation of pixels within images and overall; channels count as pixels.

    Args:
        images: (B, C, H, W).

    Raises:
        ShapeError: not a batch of images.
    """
    pixels = _as_batch(images).double().flatten(1)
    return Contrast(float(pixels.std(1, correction=0).mean()), float(pixels.std(correction=0)))


def sharpness(images: Tensor) -> float:
    """Mean absolute Laplacian: |4 x - left - right - above - below|, averaged over inner pixels, channels and images.

    Args:
        images: (B, C, H, W) of at least 3 x 3 pixels.

    Raises:
        ShapeError: not a batch of images of that size.
    """
    batch = _as_batch(images).double()
    if min(batch.shape[2:]) < 3:
        raise ShapeError(f"sharpness needs images of at least 3 x 3 pixels, got {tuple(batch.shape)}.")
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    flat = batch.reshape(-1, 1, *batch.shape[2:])
    return float(F.conv2d(flat, kernel.to(flat.device)[None, None]).abs().mean())


def _as_batch(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.numel() == 0:
        raise ShapeError(f"expected images (B, C, H, W), got shape {tuple(images.shape)}.")
    return images
