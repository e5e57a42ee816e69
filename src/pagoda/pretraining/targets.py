"""Features of every training image, computed once: the encoder then costs nothing while training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pagoda.errors import ArtifactError, DataError
from pagoda.files import load_tensors, save_tensors
from pagoda.pretraining.encoders import TargetEncoder, match_grid
from pagoda.training import Setup, seeded_generator

BATCH = 256


class TargetCache:
    """Features (count, 1 or 2, d, side, side) of images and their mirrors, on the CPU.

    Args:
        features: As above; the second axis has a mirrored row where mirrored images are trained on.
        fingerprint: Of the encoder.
    """

    def __init__(self, features: Tensor, fingerprint: str) -> None:
        self.features = features
        self.fingerprint = fingerprint

    def get(self, indices: Tensor, flips: Tensor) -> Tensor:
        """Features (B, d, side, side) of these images."""
        return self.features[indices, flips.long()]

    def shuffled(self) -> TargetCache:
        """Every image with the features of another one, the same in every run.

        Raises:
            DataError: there is no other image.
        """
        count = len(self.features)
        if count < 2:
            raise DataError(f"targets of other images need two images or more, got {count}.")
        order = torch.randperm(count, generator=seeded_generator("targets", "shuffled"))
        others = torch.empty_like(order)
        others[order] = order.roll(1)  # one cycle through all of them: nobody meets himself
        return TargetCache(self.features[others], self.fingerprint)

    def save(self, path: Path) -> None:
        """Write the features and the encoder's fingerprint to a safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"features": self.features}, {"encoder": self.fingerprint})

    @classmethod
    def open(cls, path: Path, *, fingerprint: str, shape: tuple[int, ...]) -> TargetCache:
        """Read what `save` wrote.

        Raises:
            ArtifactError: truncated, of another encoder, or of another number of images or grid.
        """
        tensors, facts = load_tensors(path)
        if facts.get("encoder") != fingerprint:
            raise ArtifactError(
                f"{path} holds features of the encoder {facts.get('encoder')}, this run's is {fingerprint}. Remove the file."
            )
        found = tuple(tensors["features"].shape)
        if found != shape:
            raise ArtifactError(f"{path} holds features {found}, this run needs {shape}. Remove the file.")
        return cls(tensors["features"], fingerprint)


def cache_shape(encoder: TargetEncoder, setup: Setup, side: int) -> tuple[int, ...]:
    """Shape of a run's cache."""
    return setup.count, 2 if setup.mirror else 1, encoder.dim, side, side


def precompute_targets(encoder: TargetEncoder, setup: Setup, side: int, path: Path | None = None) -> TargetCache:
    """Features of all images of a run, read from `path` when it is there and written to it otherwise.

    Every process of a run computes them, one writes.

    Raises:
        ArtifactError: `path` holds other features.
        DataError: the encoder gives values that are not finite.
    """
    shape = cache_shape(encoder, setup, side)
    if path is not None and path.is_file():
        return TargetCache.open(path, fingerprint=encoder.fingerprint, shape=shape)
    features = torch.empty(shape)
    for flip in range(shape[1]):
        for rows in torch.arange(setup.count).split(BATCH):
            images, _ = setup.load(rows, torch.full((len(rows),), bool(flip)))
            features[rows, flip] = encode(encoder, images.to(setup.runtime.device), side).cpu()
    cache = TargetCache(features, encoder.fingerprint)
    setup.runtime.barrier()
    if path is not None and setup.runtime.is_main:
        cache.save(path)
    setup.runtime.barrier()
    return cache


@torch.no_grad()
def encode(encoder: TargetEncoder, images: Tensor, side: int) -> Tensor:
    """Features (B, d, side, side) in float32 of clean images.

    Raises:
        DataError: values that are not finite.
    """
    features = match_grid(encoder(images, side).float(), side)
    if not torch.isfinite(features).all():
        raise DataError("the encoder gives features that are not finite; half precision may be too small for it.")
    return features
