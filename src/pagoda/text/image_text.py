"""Encoders of images and texts into one space, and the distance that keeps generated images with their texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ShapeError
from pagoda.evaluation.extractors import hash_weights
from pagoda.evaluation.transformers import CLIP_MEAN, CLIP_STD
from pagoda.files import hash_json
from pagoda.text.encoders import TransformersTextEncoder
from pagoda.text.loading import load_dual, read_json_part

_ADVICE = (
    "Give the folder of a CLIP with safetensors in it, or train an encoder: `pagoda text train DATA --out FOLDER`; a hub name needs "
    "text.allow_download=true."
)


class ImageTextEncoder(ABC):
    """Images and texts -> unit vectors of one space. Frozen; gradients flow through it to the images."""

    dim: int
    """Length of a vector."""
    image_size: int
    """Side that images are resized to, in pixels."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal characters over everything that decides the vectors."""

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, dim) of unit length from images (B, 1 or 3, H, W) in [-1, 1]; differentiable."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, dim) of unit length, on the CPU.

        Raises:
            DataError: an empty text.
        """


class TransformersImageTextEncoder(ImageTextEncoder):
    """A CLIP, or a two-tower encoder that `pagoda` trained, from a local folder or the hub's cache.

    Args:
        source: Folder in the Hugging Face layout, or a hub name.
        allow_download: Fetch what is not in the hub's cache.
        device: Where to compute.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there is no such model here.
        ConfigError: a model without an image tower.
    """

    def __init__(self, source: Path | str, *, allow_download: bool = False, device: torch.device | str = "cpu") -> None:
        model = load_dual(source, advice=_ADVICE, allow_download=allow_download).to(device)
        self._vision, self._projection = model.vision_model, model.visual_projection
        self._text = TransformersTextEncoder(
            source, max_tokens=512, allow_download=allow_download, device=device, advice=_ADVICE
        )
        self.dim = int(self._projection.out_features)
        self.image_size = int(self._vision.config.image_size)
        found = read_json_part(source, "preprocessor_config.json", allow_download=allow_download) or {}
        self._mean = torch.tensor(found.get("image_mean", CLIP_MEAN)).reshape(1, 3, 1, 1)
        self._std = torch.tensor(found.get("image_std", CLIP_STD)).reshape(1, 3, 1, 1)

    @property
    def fingerprint(self) -> str:
        weights = [hash_weights(self._vision), hash_weights(self._projection), self._text.fingerprint]
        return hash_json([*weights, self.image_size, self._mean.flatten().tolist(), self._std.flatten().tolist()])

    def embed_images(self, images: Tensor) -> Tensor:
        pixels = prepare_pixels(images, self.image_size, self._mean, self._std)
        vectors = self._projection(self._vision(pixel_values=pixels).pooler_output)
        return F.normalize(vectors.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self._text.embed(texts).pooled, dim=-1)


def prepare_pixels(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """What an image tower reads: (B, 3, size, size), grey repeated, resized, from [-1, 1] to the tower's own scale.

    Smaller images are enlarged bilinearly, larger ones reduced by area averaging.

    Raises:
        ShapeError: images that are not (B, 1 or 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"images must be (B, 1 or 3, H, W), got {tuple(images.shape)}.")
    pixels = images.expand(-1, 3, -1, -1)
    if images.shape[-2:] != (size, size):
        larger = images.shape[-1] > size
        pixels = F.interpolate(
            pixels,
            size=(size, size),
            mode="area" if larger else "bilinear",
            **({} if larger else {"align_corners": False}),
        )
    return (pixels / 2 + 0.5 - mean.to(images)) / std.to(images)


def spherical_distance(images: Tensor, texts: Tensor) -> Tensor:
    """Squared angle between unit vectors, (B, d) twice -> (B,) in [0, pi^2]; its gradient is finite where they are equal.

    arccos(<a, b>) is computed as 2 arcsin(|a - b| / 2), whose rounding error does not grow as the angle goes to 0.

    Raises:
        ShapeError: different shapes.

    Source: Sauer et al. 2023, StyleGAN-T, arXiv:2301.09515, section 4.2.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ShapeError(f"vectors must be (B, d), as many images as texts, got {images.shape} and {texts.shape}.")
    half = ((images - texts).square().sum(1) + 1e-12).sqrt() / 2
    return (2 * torch.arcsin(half.clamp(max=1 - 1e-6))).square()
