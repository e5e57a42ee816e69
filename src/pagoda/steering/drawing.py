"""Holes filled by a diffusion model: what is unknown is drawn, level by level, beside known pixels that are put back at every level.

Source: Lugmayr et al. 2022, RePaint, arXiv:2201.09865, section 4.2 (each level is repeated, so that both parts agree); known pixels take
the place of the estimate's own before noise is added, as in Wang et al. 2023, DDNM, arXiv:2212.00490, eq. 13. That drawing starts
at a low level and from a smooth continuation, and that one of several drawings is taken, is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pagoda.diffusion import UNCONDITIONAL, Condition, Denoiser, karras_sigmas
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import FeatureStack
from pagoda.training import seeded_generator

SIGMA, NODES, REPEATS = 2.0, 10, 3
"""Noise level of the start, levels, and estimates at each: what was best on emoji (docs/editing.md). Above a level of 2 nothing is won:
the colours that the surroundings continue are as good a guess as the model's own."""
_LOWEST = 0.02
"""Last noise level, where the model takes it: images of bytes hold nothing finer than 0.008."""


@torch.no_grad()
def draw_hole(
    denoiser: Denoiser,
    start: Tensor,
    known: Tensor,
    condition: Condition = UNCONDITIONAL,
    *,
    seeds: Sequence[int],
    sigma: float = SIGMA,
    nodes: int = NODES,
    repeats: int = REPEATS,
    clip: bool = True,
) -> Tensor:
    """Images whose unknown pixels are drawn by a diffusion model; `nodes * repeats` calls of it.

    Args:
        denoiser: Of images like these.
        start: (B, C, H, W); what lies in the hole is the guess that noise of level `sigma` is added to.
        known: bool (B, 1, H, W), True = known.
        condition: What the images show.
        seeds: One an image; the image of a seed does not depend on the others.
        sigma: Noise level of the start, in the units of the data; the model's highest where that is lower. The higher, the less of
            the guess is left.
        nodes: Noise levels, Karras' grid.
        repeats: Estimates at each level.
        clip: Keep estimates in [-1, 1]; not for latents.

    Returns:
        (B, C, H, W), known pixels bit for bit.

    Raises:
        ConfigError: not one seed an image, or settings out of range.
        ShapeError: a mask of another size.
    """
    if len(seeds) != len(start):
        raise ConfigError(f"a hole is drawn by a seed: {len(start)} images need one each, got {len(seeds)}.")
    if nodes < 2 or repeats < 1 or sigma <= 0:
        raise ConfigError(f"nodes must be >= 2, repeats >= 1 and sigma > 0, got {nodes}, {repeats}, {sigma}.")
    if known.shape != (len(start), 1, *start.shape[-2:]):
        raise ShapeError(f"a mask of images {tuple(start.shape)} is (B, 1, H, W), got {tuple(known.shape)}.")
    low, high = denoiser.sigma_range
    levels = [*karras_sigmas(nodes, sigma_min=max(_LOWEST, low), sigma_max=min(sigma, high)).tolist(), 0.0]
    streams = [seeded_generator("hole", seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(start.shape[1:], generator=stream) for stream in streams]).to(start)

    x = start + levels[0] * noise()
    for level, lower in pairwise(levels):
        for again in reversed(range(repeats)):
            denoised = denoiser(x, level, condition)
            if clip:
                denoised = denoised.clamp(-1, 1)
            filled = torch.where(known, start, denoised)
            x = filled + (level if again else lower) * noise()
    return filled


@torch.no_grad()
def most_typical(drawn: Tensor, stack: FeatureStack) -> Tensor:
    """Of several drawings of each image the one that is nearest to all others in features: the least likely to be far from the truth.

    The mean of the drawings would be nearer still, but shows none of them: it is blurred. Distances are those of the means over each
    feature map (what a picture shows, not where), so that an image's choice depends on no other image.

    Args:
        drawn: (D, B, C, H, W), D drawings of each of B images.
        stack: Looks at them.

    Returns:
        (B, C, H, W), each a drawing bit for bit; the first of equals.
    """
    drawings, count = drawn.shape[:2]
    apart = drawn.new_zeros(count, drawings, dtype=torch.float64)
    for features in stack(drawn.flatten(0, 1)):
        means = features.double().mean((2, 3)).unflatten(0, (drawings, count)).transpose(0, 1)  # (B, D, channels)
        apart += (means[:, :, None] - means[:, None]).square().mean(3).sum(2)
    return drawn[apart.argmin(1), torch.arange(count, device=drawn.device)]
