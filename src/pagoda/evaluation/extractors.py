"""What turns images into features for metrics, and what every extractor shares: checks, resizing, the hash of its weights."""

from __future__ import annotations

import hashlib
import itertools
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import DataError, ShapeError
from pagoda.files import hash_json
from pagoda.networks import FeatureStack

_RANGE_SLACK = 1e-3  # rounding of image files and of half precision


class FeatureExtractor(Protocol):
    """Images (B, C, H, W) in [-1, 1] of any square size -> features (B, dim) float32, the same for the same image."""

    @property
    def name(self) -> str:
        """What the features are, for tables: never "Inception" or "FID" for anything else."""

    @property
    def dim(self) -> int:
        """Number of values of one feature vector."""

    @property
    def input_size(self) -> int:
        """Height and width that images are resized to before they enter the network; 0 where they keep their own."""

    @property
    def resize(self) -> str:
        """The kernel that resizes, by library: "torch bicubic, antialiased", or "none"."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of everything else that decides the features."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch."""


@runtime_checkable
class ClassifyingExtractor(FeatureExtractor, Protocol):
    """An extractor that also classifies, which the Inception Score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and logits (B, classes) of a batch."""


RESIZE = "torch bicubic, antialiased"
"""What `resize_images` is called in provenance."""


class StackFeatures:
    """A stack of feature maps (the teacher's, a fixed random network's) as an extractor: the mean of each map over space.

    Args:
        stack: The stack; put in evaluation mode.
        name: For tables, such as "teacher" or "random".
        input_size: Side that images are resized to; None leaves each image its own size.
    """

    def __init__(self, stack: FeatureStack, *, name: str, input_size: int | None = None) -> None:
        self.stack = stack.eval()
        self._name, self._input_size = name, input_size

    @property
    def name(self) -> str:
        return self._name

    @property
    def dim(self) -> int:
        return sum(self.stack.channels)

    @property
    def input_size(self) -> int:
        return self._input_size or 0

    @property
    def resize(self) -> str:
        return RESIZE if self._input_size else "none"

    @property
    def fingerprint(self) -> str:
        return hash_json([self._name, self._input_size, self.stack.fingerprint])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        if images.shape[1] != self.stack.in_channels:
            raise ShapeError(
                f"`{self._name}` reads images of {self.stack.in_channels} channel(s), got {images.shape[1]}."
            )
        like = next(itertools.chain(self.stack.parameters(), self.stack.buffers()))
        pixels = images if self._input_size is None else resize_images(images.float(), self._input_size)
        return torch.cat([maps.mean((2, 3)) for maps in self.stack(pixels.to(like))], 1).float()


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
