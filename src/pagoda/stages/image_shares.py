"""Which images get latents, and which of these the generator rebuilds: shares of each class, drawn once a run.

The discriminator and the teacher see all images whatever the shares are: only inversion and reconstruction can do with fewer.

Source: the official code of PaGoDA restricts the pairs in the same way (`data_proportion`), Kim et al. 2024, arXiv:2405.14822.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext
from pagoda.training import seeded_generator


def encoded_images(context: StageContext) -> Tensor | None:
    """Indices of the images that get latents (`encode.share`); None for all."""
    return share_of_images(context, context.config.encode.share)


def rebuilt_images(context: StageContext, pairs: float) -> Tensor | None:
    """Indices of the images that are rebuilt where a loss asks for the share `pairs` of all: none without a latent; None for all."""
    return share_of_images(context, min(pairs, context.config.encode.share))


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
