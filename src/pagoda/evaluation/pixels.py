"""Figures read off the pixels alone, in float64: fidelity of a reconstruction (PSNR, SSIM), contrast, sharpness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ShapeError

SSIM_WINDOW = 11
"""Pixels a side that SSIM looks at."""


class Contrast(NamedTuple):
    """Standard deviations of pixel values, in the units of the pixels."""

    per_image: float
    """Mean over images of the standard deviation within the image."""
    overall: float
    """Standard deviation over all pixels of all images."""


def psnr(images: Tensor, references: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over images (see `psnr_values`)."""
    return float(psnr_values(images, references).mean())


def psnr_values(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; infinite where an image equals its reference.

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
    errors = (images.double() - references.double()).square().mean((1, 2, 3))
    return 10 * (4 / errors).log10()  # 4 / 0 is infinite


def ssim(images: Tensor, references: Tensor) -> float:
    """Structural similarity, mean over images (see `ssim_values`)."""
    return float(ssim_values(images, references).mean())


def ssim_values(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, mean over channels and pixels, (B,) float64 in [-1, 1]; 1 when the images are equal.

    Gaussian window of 11 x 11 pixels with standard deviation 1.5, K_1 = 0.01, K_2 = 0.03, over windows that lie inside; pixels and
    peak are those of [0, 1].

    Args:
        images, references: (B, C, H, W) in [-1, 1], at least 11 pixels a side.

    Raises:
        ShapeError: different shapes, no image, or images smaller than the window.

    Source: Wang et al. 2004, Image quality assessment: from error visibility to structural similarity, eq. 13.
    """
    if images.shape != references.shape or images.ndim != 4 or len(images) == 0 or min(images.shape[2:]) < SSIM_WINDOW:
        raise ShapeError(
            f"SSIM compares images of one shape (B, C, H, W), at least {SSIM_WINDOW} pixels a side, got {tuple(images.shape)} and "
            f"{tuple(references.shape)}."
        )
    x, y = ((batch.double() + 1).div(2).reshape(-1, 1, *batch.shape[2:]) for batch in (images, references))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    profile = torch.exp(-offsets.square() / (2 * 1.5**2))
    profile /= profile.sum()

    def blur(pixels: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(pixels, profile[None, None, :, None]), profile[None, None, None, :])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c_1, c_2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
    likeness /= (mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2)
    return likeness.reshape(len(images), -1).mean(1)


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
