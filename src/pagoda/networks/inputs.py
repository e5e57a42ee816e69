"""What every network that reads images shares: checks of a batch, resizing, and the hash of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import DataError, ShapeError

_RANGE_SLACK = 1e-3  # rounding of image files and of half precision


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of square float images in [-1, 1].

    Raises:
        ShapeError: not (B, 1 or 3, S, S).
        DataError: integers, NaN or infinity, or values outside [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise ShapeError(f"images must be (B, 1 or 3, S, S), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise DataError(f"images must be floats in [-1, 1], got {images.dtype}. Use x / 127.5 - 1 on 8-bit values.")
    if images.numel() == 0:
        return
    low, high = (float(v) for v in images.aminmax())
    if not (torch.isfinite(images).all()):
        raise DataError("images hold NaN or infinity; a generator that has diverged makes such images.")
    if low < -1 - _RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise DataError(
            f"images must lie in [-1, 1], got values from {low:.4g} to {high:.4g}. "
            "Clamp generated images first, and use x / 127.5 - 1 on 8-bit values."
        )


def resize_images(images: Tensor, size: int) -> Tensor:
    """Square images at another size, bicubic with antialiasing, back in [-1, 1]; unchanged when they have that size."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)  # bicubic overshoots at edges


def hash_weights(module: nn.Module) -> str:
    """16 hexadecimal characters of the SHA-256 of a network's weights: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
