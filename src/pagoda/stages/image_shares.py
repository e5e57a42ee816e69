"""Which images get latents, and which of these the generator rebuilds: shares of each class, drawn once a run.

The discriminator and the teacher see all images whatever the shares are: only inversion and reconstruction can do with fewer.

Source: the official code of PaGoDA restricts the pairs in the same way (`data_proportion`), Kim et al. 2024, arXiv:2405.14822.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data import open_source
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import StageContext
from pagoda.stages.run_folder import RunFolder
from pagoda.training import seeded_generator

LEAST = 1000
"""Images that get latents at least, where there are so many and the number is left to the run: walks and scores need some."""


def settled(config: RunConfig, out: Path | str | None = None, *, images: int | None = None) -> RunConfig:
    """The configuration with a number for `encode.share`: as many images as the steps after it draw, with repetition.

    With tens of thousands of images the steps of a preset draw only part of them, and inverting the others would take longer than all
    training. A run keeps the share that it began with, also when its steps are made more.

    Args:
        out: The run folder, which need not exist.
        images: How many there are; counted when None.

    Raises:
        As `open_source`; ArtifactError: the run's configuration cannot be read.
    """
    if config.encode.share is not None:
        return config
    run = None if out is None else RunFolder(Path(out))
    begun = run.config().encode.share if run is not None and run.config_path.is_file() else None
    return override(config, {"encode.share": share_drawn(config, images) if begun is None else begun})


def share_drawn(config: RunConfig, images: int | None = None) -> float:
    """The share of the images that the steps of `distill` and `grow` draw, in whole hundredths; see `settled`. No less than a loss asks
    for by its own `pairs`."""
    count = len(open_source(config.data, options=config.source)) if images is None else images
    rows = count * (2 if config.mirror else 1)
    wanted = max(num_drawn(config) / rows, LEAST / count)
    losses = [config.distill.loss, *(config.grow.loss_of(octave) for octave in range(len(config.sizes) - 1))]
    asked = [loss.pairs for loss in losses if loss.pairs < 1]
    return max([min(1.0, math.ceil(100 * wanted) / 100), *asked])


def encoded_share(config: RunConfig) -> float:
    """`encode.share` of a run, which has settled it."""
    assert config.encode.share is not None, "settled before the first stage"
    return config.encode.share


def encoded_images(context: StageContext) -> Tensor | None:
    """Indices of the images that get latents (`encode.share`); None for all."""
    return share_of_images(context, encoded_share(context.config))


def rebuilt_images(context: StageContext, pairs: float) -> Tensor | None:
    """Indices of the images that are rebuilt where a loss asks for the share `pairs` of all: none without a latent; None for all."""
    return share_of_images(context, min(pairs, encoded_share(context.config)))


def num_drawn(config: RunConfig) -> int:
    """How many (latent, image) pairs the steps of `distill` and `grow` draw in all, with repetition."""
    distill, grow = config.distill, config.grow
    steps = distill.loop.steps
    encoded = {"rec": 1.0, "dstl": 0.0, "both": 1 - distill.teacher_pairs.share}[distill.mode] * steps
    if distill.mode == "both" and distill.matching.weight > 0:  # matched steps leave the teacher's pairs out
        matched = steps - min(steps, round(distill.matching.start * steps))
        encoded += distill.teacher_pairs.share * matched
    drawn = encoded * distill.loop.batch_size
    for size in config.growth:
        octave = grow.octave(config.sizes.index(size) - 1)
        drawn += octave["steps"] * octave["batch_size"]
    return round(drawn)


def share_of_images(context: StageContext, share: float) -> Tensor | None:
    """Rising indices (N,) of some images, of each class as large a share; None for all.

    Smaller shares are part of larger ones, and every class keeps one image at least.
    """
    if share == 1:
        return None
    count = len(context.data)
    labels = context.data.labels(torch.arange(count))
    order = torch.randperm(count, generator=seeded_generator(context.config.seed, "kept pairs"))
    if labels is None:
        return order[: math.ceil(share * count)].sort().values
    shuffled = labels[order]
    parts = []
    for label in shuffled.unique():
        own = order[shuffled == label]
        parts.append(own[: math.ceil(share * len(own))])
    return torch.cat(parts).sort().values
