"""Detail as strong as that of the images: the head of a new level is scaled at the end of its stage.

    gain = rms(x - up(x_below)) / rms(G(z) - up(G_below(z))),    z the latents of images x, up the enlargement of a level

A level that is trained by a distance to its images learns the mean of the detail that fits to the image below. A mean varies less than
what it is the mean of (the law of total variance), so grown images lose contrast and sharpness at every octave. The gain gives the
detail the strength back that it has in the images; where it lies is as it was learned. Reconstructions then lose some of their PSNR:
the mean is what minimises squared errors.

Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.networks import OneStepGenerator
from pagoda.networks.batches import images_at_once
from pagoda.networks.growth import enlarge_image
from pagoda.stages.context import StageContext
from pagoda.stages.encode import some_encoded
from pagoda.stages.guidance import stored_condition

COUNT = 512
"""Encoded images that the strength of detail is measured on, evenly over the data set."""
LARGEST_GAIN = 2.0
"""A level that has learned next to nothing is not blown up."""


@torch.no_grad()
def match_detail(
    context: StageContext, generator: OneStepGenerator, store: LatentStore, octaves: list[int]
) -> dict[int, float]:
    """Scale the heads of levels, the lowest first, so that the detail that each adds is as strong as that of the images.

    Args:
        generator: Changed in place.
        octaves: Numbers, from 0, of the levels; all with a head that adds to the enlarged lower image.

    Returns:
        The gain of each side in pixels, in [1, `LARGEST_GAIN`].
    """
    device, sizes = next(generator.parameters()).device, context.config.sizes
    was_training = generator.training
    generator.eval()
    indices = some_encoded(store, COUNT)
    parts = list(torch.arange(len(indices)).split(images_at_once(generator.size)))
    gains = {}
    for octave in octaves:
        side = sizes[octave + 1]
        true = made = 0.0
        for rows in parts:
            chosen, flips = indices[rows], torch.zeros(len(rows), dtype=torch.int64)
            images, lower = (context.load(s, chosen, flips.bool())[0] for s in (side, side // 2))
            true += _power(images - enlarge_image(lower))
            z = store.get(chosen, flips).to(device)
            told = stored_condition(store, context.condition, chosen, flips).to(device)
            small, large = (generator(z, told, resolution=s).float() for s in (side // 2, side))
            made += _power(large - enlarge_image(small))
        gain = min(max((true / made) ** 0.5, 1.0), LARGEST_GAIN) if made > 0 else 1.0
        head = generator.octaves[octave].conv_out
        head.weight.mul_(gain)
        head.bias.mul_(gain)
        gains[side] = gain
    generator.train(was_training)
    return gains


def _power(detail: Tensor) -> float:
    """Sum of the squares."""
    return float(detail.double().square().sum())
