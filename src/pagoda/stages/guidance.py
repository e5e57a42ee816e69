"""Guidance weights of a run: the law that they are drawn from, the weight of each pair, and the denoiser that follows them.

Convention: w = 1 is no guidance, D_w = D_null + w (D - D_null). Weights are drawn from U[1, guidance.scale_max].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.data.moments import MomentSums
from pagoda.diffusion import Condition, Denoiser, GuidedDenoiser
from pagoda.errors import ConfigError
from pagoda.stages.config import RunConfig
from pagoda.training import seeded_generator


def drawn_weights(scale_max: float, uniform: Tensor) -> Tensor:
    """Uniform draws in [0, 1) (B,) as weights of the law U[1, scale_max]."""
    return 1 + (scale_max - 1) * uniform


def pair_weights(config: RunConfig, indices: Tensor, flips: Tensor) -> Tensor:
    """The weight of each (image, mirror) (B,), a function of these and of the run's seed alone."""
    pairs = zip(indices.tolist(), flips.tolist(), strict=True)
    draws = [torch.rand((), generator=seeded_generator(config.seed, "guidance", i, int(f))) for i, f in pairs]
    return drawn_weights(config.guidance.scale_max, torch.stack(draws))


def guided(denoiser: Denoiser, condition: Condition) -> Denoiser:
    """The denoiser that follows the weights of a condition; itself where there are none."""
    return denoiser if condition.guidance is None else GuidedDenoiser(denoiser, None)


def stored_condition(
    store: LatentStore, condition: Callable[[Tensor], Condition], indices: Tensor, flips: Tensor | None = None
) -> Condition:
    """What stored latents were made under: what their images are conditioned on (`condition`), and their guidance weight."""
    return replace(condition(indices), guidance=store.guidance(indices, flips))


def std_by_weight(store: LatentStore, parts: int = 3) -> list[dict[str, float]]:
    """Standard deviation of the latents in each of `parts` equal ranges of their weights; empty ranges are left out.

    Strong guidance carries latents off the shell of unit noise: this says from which weight on.
    """
    rows = store.images
    flips = [torch.zeros_like(rows), torch.ones_like(rows)][: 2 if store.flips else 1]
    found = [store.guidance(rows, flip) for flip in flips]
    weights = torch.cat([w for w in found if w is not None])
    if not len(weights):
        return []
    rows, flip = rows.repeat(len(flips)), torch.cat(flips)
    edges = torch.linspace(float(weights.min()), float(weights.max()), parts + 1)[1:-1]
    number, told = torch.bucketize(weights, edges), []
    for part in range(parts):
        chosen = number == part
        if bool(chosen.any()):
            sums = MomentSums(store.shape[0])
            for some in chosen.nonzero().flatten().split(1024):
                sums.add(store.get(rows[some], flip[some]))
            told.append(
                {
                    "from": float(weights[chosen].min()),
                    "to": float(weights[chosen].max()),
                    "std": sums.result().std,
                }
            )
    return told


def check_guidance(config: RunConfig, num_classes: int) -> None:
    """Refuse guidance where there is nothing to be guided by.

    Raises:
        ConfigError: images without labels in a run of labels.
    """
    if config.guidance.active and config.condition == "label" and num_classes == 0:
        raise ConfigError(
            f"guidance.scale_max is {config.guidance.scale_max:g}, and {config.data} has no labels to be guided by. "
            "Set guidance.scale_max=1, or give labels, or captions and condition=text."
        )
