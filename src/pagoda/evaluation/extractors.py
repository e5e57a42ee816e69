"""What turns images into features for metrics; checks, resizing and the hash of weights are those of `pagoda.networks`."""

from __future__ import annotations

import itertools
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pagoda.errors import ShapeError
from pagoda.files import hash_json
from pagoda.networks import FeatureStack
from pagoda.networks.inputs import check_images, hash_weights, resize_images

__all__ = [
    "RESIZE",
    "ClassifyingExtractor",
    "FeatureExtractor",
    "StackFeatures",
    "check_images",
    "hash_weights",
    "resize_images",
]


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
