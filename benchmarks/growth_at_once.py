"""Two octaves in one go against one after the other, from 8 to 32 px in equal time, on top of one generator a seed.

One after the other, the second octave learns on an image that is done. In one go it learns while the first moves, every step pays for both
levels, and the head between learns beside it. `distance_8` is that of the samples of the generator below: what both start from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.metrics import score_images
from benchmarks.shapes import judge, real_images
from benchmarks.theory.shapes_runs import begun, finished, samples, shapes_config
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig
from pagoda.stages.run_folder import RunFolder

BASE, SIZES = 8, (16, 32)
SECONDS = 150.0
"""Of the steps of both octaves, the same for every arm."""
TRIED = 30
"""Steps that tell how long a step takes."""
ARMS = {"one after the other": 1, "in one go": 2}
"""Octaves that are grown together."""
FIGURES = {"distance": "distance", "floor": "floor", "sharpness": "sharpness_ratio", "contrast": "contrast_ratio"}
"""Of every size, and what the score calls them."""


def config_of(seed: int, budget: float, size: int, at_once: int, steps: tuple[int, ...]) -> RunConfig:
    """The demo's settings; of the octaves the given steps, and how many are grown together."""
    return shapes_config(
        seed,
        base=BASE,
        size=size,
        budget=budget,
        grow__at_once=at_once,
        grow__steps=list(steps),
        grow__loop__log_every=10,
    )


def seconds_of(run: RunFolder, config: RunConfig) -> list[float]:
    """Of the steps of each stage of growth."""
    return [float(run.require(f"grow-{size}", "pagoda train")["results"]["seconds"]) for size in config.growth]


def compare(at_once: int, budget: float, seed: int) -> dict[str, float]:
    """Grow for as many steps as fit into the time that both arms have, and score fresh samples of every size."""
    shared = begun(config_of(seed, budget, BASE, 1, (1,)), "distill")
    tried_config = config_of(seed, budget, SIZES[-1], at_once, (TRIED,))
    with finished(shared, tried_config, "grow") as tried:
        taken = seconds_of(tried, tried_config)
    share = SECONDS * budget / len(taken)  # one after the other, each octave has half of the time
    steps = tuple(max(2, round(TRIED * share / seconds)) for seconds in taken)
    config = config_of(seed, budget, SIZES[-1], at_once, steps)
    with finished(shared, config, "grow") as run:
        count = max(200, round(2000 * budget))
        figures = {"seconds": sum(seconds_of(run, config)), "steps": float(sum(steps))}
        made = {size: samples(run, SIZES[-1], count, resolution=size) for size in (BASE, *SIZES)}
    for size, images in made.items():
        found = score_images(ClassifierFeatures(judge(size)), *real_images(size), images, seed)
        figures |= {f"{name}_{size}": found[key] for name, key in FIGURES.items()}
    return figures


def over(metric: str) -> Callable[[Results], float]:
    """The largest ratio over the seeds of one go over one after the other."""

    def value(results: Results) -> float:
        together, apart = (results.values(arm, metric) for arm in ("in one go", "one after the other"))
        return max(a / b for a, b in zip(together, apart, strict=True))

    return value


@benchmark(
    "growth_at_once",
    question=(
        "Are two octaves better grown in one go or one after the other, in equal time? Drawn shapes, from 8 to 32 px, 150 seconds "
        "each, on top of one generator a seed."
    ),
    passes=[
        PassLine("one after the other is no further from the data at 32 px: one go at 0.95 of its distance or more",
                 lambda r: r.median("in one go", "distance_32") / r.median("one after the other", "distance_32"), at_least=0.95),
        PassLine("in one go, the size between is usable: at most 1.5 x the distance of an octave of its own, on every seed",
                 over("distance_16"), at_most=1.5),
        PassLine("arms differ by at most 15 % in time", lambda r: r.unequal(ARMS, "seconds"), at_most=1.15),
    ],
)  # fmt: skip
def growth_at_once(budget: float) -> dict[str, Arm]:
    """Two arms on top of one generator a seed."""
    return {name: partial(compare, at_once, budget) for name, at_once in ARMS.items()}
