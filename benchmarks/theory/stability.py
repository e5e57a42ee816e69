"""Stability of a real run: how far images of fixed noise wander while a generator plays against a discriminator, with and without L_rec.

`theory.dirac` says that without L_rec nothing damps the turning of the two players. Here they are networks: all arms of a seed start
from the same teacher's copy and the same latents, at the same constant rate, so that nothing but a loss can bring them to rest.

`moved` is the mean square change of the images of fixed noise from one look to the next, of `EVERY` steps, over the second half of the
steps, as a share of what two different images differ by. Looks are the grids that a run draws, of the weights, not of their average.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, on the stability of L_rec + L_adv.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.theory.shapes_runs import begun, distance, finished, num_scored, samples, shapes_config
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import PREVIEWS

BASE, STEPS, EVERY = 8, 400, 20
TEACHER = 0.5
"""Share of the demo's steps that the teacher of all arms is trained for."""
ALONE = {"distill.loss.pixel": 0.0, "distill.loss.feature": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "rec": {"distill.loss.adversarial": 0.0},
    "adv": {"distill.loss.adversarial": 1.0, "distill.loss.adaptive": False, **ALONE},
    "rec+adv": {"distill.loss.adversarial": 1.0, "distill.loss.adaptive": False},
    "rec+adv, adaptive": {"distill.loss.adversarial": 0.1},
}
"""`adv` and `rec+adv` descend the same adversarial term at the same weight. The last is what runs do: its weight goes by the gradients."""


def config_of(loss: str, budget: float, seed: int) -> RunConfig:
    """A distillation at base size from the images' own latents, whose rate does not fall."""
    config = shapes_config(
        seed,
        base=BASE,
        size=BASE,
        budget=TEACHER * budget,
        distill__mode="rec",
        distill__matching__weight=0.0,
        distill__loop__steps=max(4 * EVERY, round(STEPS * budget)),
        distill__loop__preview_every=EVERY,
        distill__optimizer__rate="constant",
    )
    return override(config, LOSSES[loss])


def tiles(grid: Image.Image, side: int, columns: int = 8) -> np.ndarray:
    """The images of a grid of a run, (`PREVIEWS`, side, side, 3) in [0, 1]: whole pixels of its scale, white lines left out."""
    scale = grid.width // (columns * (side + 1) + 1)
    pixels = np.asarray(grid.convert("RGB"), dtype=np.float64)[::scale, ::scale] / 255
    starts = [(1 + i // columns * (side + 1), 1 + i % columns * (side + 1)) for i in range(PREVIEWS)]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in starts])


def moved(looks: list[np.ndarray]) -> float:
    """Median over successive looks (N, S, S, 3) of their mean square difference, over that of two different images of the last."""
    last = looks[-1]
    apart = 2 * float(last.var(axis=0, ddof=1).mean())
    return statistics.median(float(np.square(a - b).mean()) for a, b in pairwise(looks)) / apart


def looks_of(folder: Path, side: int) -> list[np.ndarray]:
    """The grids of the second half of the steps."""
    paths = sorted(folder.glob("raw-*.png"))
    return [tiles(Image.open(path), side) for path in paths[len(paths) // 2 :]]


def _trained(loss: str, budget: float, seed: int) -> dict[str, float]:
    shared = begun(config_of("rec", budget, seed), "encode")
    with finished(shared, config_of(loss, budget, seed), "distill") as run:
        wandered = moved(looks_of(run.samples("distill"), BASE))
        return {"moved": wandered, **distance(samples(run, BASE, num_scored(budget)), seed)}


def worst(metric: str, above: str, below: str) -> object:
    """The largest ratio of two arms over the seeds."""

    def value(results: Results) -> float:
        return max(a / b for a, b in zip(results.values(above, metric), results.values(below, metric), strict=True))

    return value


@benchmark(
    "theory.stability",
    question=(
        "Does L_rec bring a generator to rest that plays against a discriminator? Drawn shapes at 8 px, a constant rate, the same "
        "adversarial term with and without it."
    ),
    passes=[
        PassLine("images of fixed noise move at most half as far with L_rec, on every seed", worst("moved", "rec+adv", "adv"), at_most=0.5),  # type: ignore[arg-type]
        PassLine("and end at most half as far from the data, on every seed", worst("distance", "rec+adv", "adv"), at_most=0.5),  # type: ignore[arg-type]
        PassLine("with the adaptive weight they move at most twice as far as without a discriminator, on every seed",
                 worst("moved", "rec+adv, adaptive", "rec"), at_most=2.0),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def stability(budget: float) -> dict[str, Arm]:
    """One arm a sum of losses."""
    return {loss: partial(_trained, loss, budget) for loss in LOSSES}
