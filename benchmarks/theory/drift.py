"""Where objects go when the generator grows: the same latent at 8 px and at 32 px, with and without L_rec in the octaves.

Drawn shapes have one object each, at a known place. An object is what differs from the colour of the border; its place is its centre of
mass, as a fraction of the side. `drawn` measures the measure: the same scenes drawn at both sizes, and against their centre at 128 px.

Without L_rec the weights of pixels and of features are 0, and the adversarial term alone decides.

An octave of the presets starts from the enlarged image of the level below, and trains nothing below itself: little could move an object,
whatever the loss. The arms `free` grow as the official code does: new heads start at zero, see no enlarged image, and the decoder of the
base is trained on. The place at 8 px is always that of the base as it was before.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822: with L_rec in stage 3 objects stay in place over the resolutions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.theory.shapes_runs import begun, distance, finished, num_scored, samples, shapes_config
from pagoda.data import Downsampler, ShapesSource
from pagoda.stages.config import override

BASE, SIZE = 8, 32
GROWTH: dict[str, dict[str, Any]] = {
    "rec+adv": {"grow.loss.adversarial": 0.1},
    "adv alone": {
        "grow.loss.adversarial": 0.1,
        "grow.loss.adaptive": False,  # there is nothing to be scaled to
        "grow.loss.pixel": 0.0,
        "grow.loss.feature": 0.0,
    },
    "rec alone": {"grow.loss.adversarial": 0.0},
}
FREE: dict[str, Any] = {
    "grow.train_from": "decoder.0",
    "grow.targets": "images",
    "grow.use_rgb": False,
    "grow.head_init": "zero",
    "grow.match_detail": False,
}
GROWTH |= {f"{name}, free": {**GROWTH[name], **FREE} for name in ("rec+adv", "adv alone")}
_QUIET = 0.4
"""Difference from the border's colour, summed over channels of [-1, 1], that is still background."""


def places(images: Tensor) -> Tensor:
    """Centre of mass of the object in each image (N, 3, S, S) in [-1, 1]: x and y (N, 2) as fractions of the side.

    NaN where nothing differs from the border.
    """
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], dim=2)
    background = border.median(dim=2).values[:, :, None, None]
    weight = ((images - background).abs().sum(1) - _QUIET).clamp(min=0).double()  # (N, S, S)
    centres = (torch.arange(images.shape[-1], dtype=torch.float64) + 0.5) / images.shape[-1]
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(1) * centres).sum(1) / total, (weight.sum(2) * centres).sum(1) / total], dim=1)


def drift(small: Tensor, large: Tensor) -> dict[str, float]:
    """Mean distance of the places of the same objects at two sizes, in pixels of the larger one, and the share that was lost."""
    moved = large.shape[-1] * (places(small) - places(large)).norm(dim=1)
    found = moved.isfinite()
    return {"drift_px": float(moved[found].mean()), "lost": 1 - float(found.double().mean())}


def _grown(growth: str, budget: float, seed: int) -> dict[str, float]:
    config = shapes_config(seed, base=BASE, size=SIZE, budget=budget, grow__targets="images")  # the paper's L_rec
    count = num_scored(budget)
    with finished(begun(config, "distill"), override(config, GROWTH[growth]), "grow") as run:
        small, large = (samples(run, side, count) for side in (BASE, SIZE))
    return {**drift(small, large), **distance(large, seed)}


def drawn(count: int, size: int, seed: int) -> Tensor:
    """The same scenes at any size, (count, 3, size, size) in [-1, 1]."""
    source, reduce = ShapesSource(count=count, size=128, seed=2000 + seed), Downsampler()
    images = np.stack([reduce(source.image(i), size) for i in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _drawn(budget: float, seed: int) -> dict[str, float]:
    count = max(100, round(500 * budget))
    small, large, truth = (drawn(count, size, seed) for size in (BASE, SIZE, 128))
    exact = places(truth)
    return {
        **drift(small, large),
        "error_8_px": 32 * float((places(small) - exact).norm(dim=1).mean()),
        "error_32_px": 32 * float((places(large) - exact).norm(dim=1).mean()),
    }


def ratios(r: Results, growth: str = "") -> list[float]:
    """Drift with L_rec over drift without, by seed."""
    pairs = zip(r.values(f"rec+adv{growth}", "drift_px"), r.values(f"adv alone{growth}", "drift_px"), strict=True)
    return [a / b for a, b in pairs]


@benchmark(
    "theory.drift",
    question=(
        "Do objects stay in place over two octaves (8 -> 32 px) with L_rec, and drift without? Distance of an object's centre at 8 px "
        "and at 32 px for the same latent, in pixels of 32 px."
    ),
    passes=[
        PassLine(
            "with L_rec at most half the drift, in the median",
            lambda r: float(np.median(ratios(r))),
            at_most=0.5,
        ),
        PassLine("and less on every seed", lambda r: max(ratios(r)), at_most=1.0),
        PassLine(
            "free growth: with L_rec at most half the drift, in the median",
            lambda r: float(np.median(ratios(r, ", free"))),
            at_most=0.5,
        ),
        PassLine("free growth: and less on every seed", lambda r: max(ratios(r, ", free")), at_most=1.0),
        PassLine(
            "the measure itself is off by at most half a pixel", lambda r: r.max("drawn", "drift_px"), at_most=0.5
        ),
        PassLine("few objects are lost with L_rec", lambda r: r.max("rec+adv", "lost"), at_most=0.02),
        PassLine(
            "free growth: few objects are lost with L_rec", lambda r: r.max("rec+adv, free", "lost"), at_most=0.02
        ),
    ],
)
def position_drift(budget: float) -> dict[str, Arm]:
    """Growth with both terms and with each alone, from the same generator of 8 px; and the drawn images."""
    arms: dict[str, Arm] = {name: partial(_grown, name, budget) for name in GROWTH}
    return arms | {"drawn": partial(_drawn, budget)}
