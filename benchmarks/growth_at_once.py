"""Two octaves in one go against one after the other, from 8 to 32 px, from as many multiply-adds, on top of one generator a seed.

One after the other, the second octave learns on an image that is done. In one go it learns while the first moves, every step pays for both
levels, and the head between learns beside it. `distance_8` is that of the samples of the generator below: what both start from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.equal_work import steps_for, work_by_stage
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.metrics import score_images
from benchmarks.shapes import judge, real_images
from benchmarks.theory.shapes_runs import begun, finished, samples, shapes_config
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig
from pagoda.stages.presets import preset_config

BASE, SIZES = 8, (16, 32)
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


def work(config: RunConfig) -> int:
    """Multiply-adds of growth, with what is prepared for it."""
    return sum(each for stage, each in work_by_stage(config).items() if stage.startswith("grow"))


def with_work(seed: int, budget: float, at_once: int) -> RunConfig:
    """As many steps in one go as take the work of the demo's steps, one octave after the other."""
    steps = tuple(
        max(2, round(budget * each)) for each in preset_config("tiny", "shapes", base=BASE, size=SIZES[-1]).grow.steps
    )
    apart = config_of(seed, budget, SIZES[-1], 1, steps)
    if at_once == 1:
        return apart

    def of(count: int) -> RunConfig:
        return config_of(seed, budget, SIZES[-1], at_once, (count,))

    return of(max(2, steps_for(work(apart), lambda count: work(of(count)))))


def compare(at_once: int, budget: float, seed: int) -> dict[str, float]:
    """Grow, and score fresh samples of every size."""
    shared = begun(config_of(seed, budget, BASE, 1, (1,)), "distill")
    config = with_work(seed, budget, at_once)
    with finished(shared, config, "grow") as run:
        count = max(200, round(2000 * budget))
        seconds = sum(
            float(run.require(f"grow-{size}", "pagoda train")["results"]["seconds"]) for size in config.growth
        )
        figures = {
            "work_e9": work(config) / 1e9,
            "seconds": seconds,
            "steps": float(sum(config.grow.steps[: len(config.growth)])),
        }
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
        "Are two octaves better grown in one go or one after the other, from as many multiply-adds? Drawn shapes, from 8 to 32 px, on "
        "top of one generator a seed."
    ),
    passes=[
        PassLine("one after the other is no further from the data at 32 px: one go at 0.95 of its distance or more",
                 lambda r: r.median("in one go", "distance_32") / r.median("one after the other", "distance_32"), at_least=0.95),
        PassLine("in one go, the size between is usable: at most 1.5 x the distance of an octave of its own, on every seed",
                 over("distance_16"), at_most=1.5),
        PassLine("the arms took equal work within 5 %", lambda r: r.unequal(ARMS, "work_e9"), at_most=1.05),
    ],
)  # fmt: skip
def growth_at_once(budget: float) -> dict[str, Arm]:
    """Two arms on top of one generator a seed."""
    return {name: partial(compare, at_once, budget) for name, at_once in ARMS.items()}
