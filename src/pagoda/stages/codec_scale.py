"""The scale of a codec that came without one, or with one for other images: measured on a data set and written beside its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data import (
    Downsampler,
    ImageDataset,
    SourceConfig,
    check_source,
    open_source,
    prepare_images,
    without_views,
)
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import AutoencoderCodec, open_codec
from pagoda.networks.autoencoders import in_pipeline
from pagoda.networks.codecs import LATENT_STD
from pagoda.stages.codec import MEASURED
from pagoda.stages.run_codec import find_codec
from pagoda.training import Runtime

_AT_ONCE = 1 << 20
"""Pixels of all images that are encoded in one call, at most."""


def scale_codec(
    path: Path | str,
    data: str,
    *,
    size: int,
    std: float = LATENT_STD,
    source: SourceConfig | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> AutoencoderCodec:
    """Measure scale and shift on up to `MEASURED` images and write them to `codec.json` in the codec's folder; its other files stay.

    Args:
        path: What `find_codec` finds an autoencoder in.
        data: Images, as for a run.
        size: Side that they are reduced to, in pixels.
        std: Standard deviation that their latents get.

    Returns:
        The codec, with its new scale and shift.

    Raises:
        ArtifactError: no autoencoder there, a damaged one, that of a run, whose latents are made already, or that of a pipeline, whose
            network knows its latents as they are.
        ConfigError: `std` that is not above 0.
        DataError: images that cannot be read or are smaller than `size`, or whose latents have no spread.
        ShapeError: a size that the codec's factor does not divide, or images of other channels.
    """
    if not std > 0:
        raise ConfigError(f"the standard deviation of latents must be > 0, got {std}.")
    folder = find_codec(path)
    if (folder.parent / "config.yaml").is_file():
        raise ArtifactError(
            f"{folder} is the codec of the run {folder.parent}, whose networks know its latents as they are. Scale a copy of it, and "
            "start another run with it (`--codec`)."
        )
    if in_pipeline(folder):
        raise ArtifactError(
            f"{folder} is the codec of the pipeline {folder.absolute().parent}, whose network knows its latents with the scale that the "
            "pipeline uses; with the pipeline as a teacher nothing needs to be measured. For a run that trains its own teacher on its "
            "latents, copy the folder, scale the copy, and name that (`--codec`)."
        )
    codec = open_codec(folder, scale=1.0, shift=0.0)
    codec.latent_shape(size)  # refuses sizes that do not fit, before images are read
    images = open_source(data, options=source)
    check_source(without_views(images), size=size, progress=not quiet).raise_if_bad()
    small = prepare_images(images, sizes=(size,), downsampler=Downsampler(), cache_dir=None, progress=not quiet)
    if small.channels != codec.image_channels:
        raise ShapeError(
            f"the codec is for images of {codec.image_channels} channels, the data have {small.channels}; give other images."
        )
    place = Runtime(device).device
    torch.nn.Module.to(codec, place)
    codec.fit_scale(_batches(small, size, place), std=std)
    torch.nn.Module.to(codec, "cpu")
    codec.save_facts(folder)
    return codec


def _batches(data: ImageDataset, size: int, device: torch.device) -> Iterator[Tensor]:
    rows = torch.linspace(0, len(data) - 1, min(MEASURED, len(data))).long()
    for part in rows.split(max(1, _AT_ONCE // size**2)):
        yield data.images(part, size).to(device)
