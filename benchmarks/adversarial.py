"""Whether the adversarial term earns its place at 32 px: the last octave by reconstruction alone, and with a judge, from as many
multiply-adds.

All arms of a seed grow the same generator of 16 px, which was made by the demo's steps without a judge. `distance_enlarged` is that of its
samples, enlarged: what the octave starts from.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch.nn import functional as F

from benchmarks.equal_work import steps_for, work_by_stage
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import grown_figures, win_rates
from benchmarks.metrics import score_images
from benchmarks.shapes import judge, real_images
from benchmarks.theory.shapes_runs import begun, finished, samples, shapes_config
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig, override
from pagoda.stages.run_folder import RunFolder

BASE, BELOW, SIZE = 8, 16, 32
STEPS = 400
"""Of the last octave by reconstruction alone, as the demo has them. Every arm has as many multiply-adds; judged ones have fewer steps."""
SHARE = 1.0
"""Of the demo's steps, of everything below the last octave."""
ARMS: dict[str, Mapping[str, Any]] = {
    "reconstruction": {},
    "teacher, 0.05": {"adversarial": 0.05},
    "teacher, 0.3": {"adversarial": 0.3},
    "teacher, 0.3, every fourth step": {"adversarial": 0.3, "adversarial_every": 4},
    "teacher, 0.3, after a warm-up": {"adversarial": 0.3, "adversarial_from": 0.6, "judge_warmup": 0.2},
    "teacher, 0.3, from 60 % on": {"adversarial": 0.3, "adversarial_from": 0.6},
    "teacher mixed, 0.3": {"adversarial": 0.3, "judge": {"mixing": True}},
    "random, 0.3": {"adversarial": 0.3, "judge": {"networks": ["random"]}},
    "teacher, separate": {"adversarial": 0.3, "updates": "separate"},
    "teacher, 0.3, and of pairs": {"adversarial": 0.3, "reconstruction_judge": 0.3},
    "teacher, 0.3, a large pool": {"adversarial": 0.3},
    "teacher, 0.3, no augmentation": {"adversarial": 0.3, "augment": ()},
    "teacher, 0.3, heads of half the width": {"adversarial": 0.3, "judge_width": 32},
    "teacher, 0.3, heads of twice the width": {"adversarial": 0.3, "judge_width": 128},
}
"""Settings of the last octave's loss, beside the demo's: what the judge looks through, its weight, how often, from when, whether it learns
to tell the generator's images before the generator is told of it, updates, a second judge, augmentation, the judge's capacity."""
LARGE_POOL = "teacher, 0.3, a large pool"
"""The arm whose pool holds as many samples of the prior as its steps draw; the others draw from `grow.fakes` of them, 4096, time and again.
The pool is filled before the first step, which is not counted."""


def config_of(
    seed: int, budget: float, size: int, loss: Mapping[str, Any], steps: int, *, large_pool: bool = False
) -> RunConfig:
    """The demo's settings up to 16 px; of the last octave its own loss, number of steps and pool of samples."""
    config = shapes_config(seed, base=BASE, size=size, budget=SHARE * budget)
    config = override(
        config,
        {
            "evaluation.gap.count": 0,
            **{f"{stage}.loop.preview_every": 0 for stage in ("teach", "distill", "grow")},
            "grow.loop.log_every": 10,
        },
    )
    own = override(config, {f"grow.loss.{name}": value for name, value in loss.items()}).grow.loss
    below = config.grow.octave(0)["steps"]
    grow = dataclasses.replace(config.grow, octave_losses=(config.grow.loss, own), steps=(below, steps))
    if large_pool:
        grow = dataclasses.replace(grow, fakes=max(grow.fakes, steps * grow.octave(1)["batch_size"]))
    return dataclasses.replace(config, grow=grow)


def seconds_of(run: RunFolder) -> float:
    """Of the steps of the last octave."""
    return float(run.require(f"grow-{SIZE}", "pagoda train")["results"]["seconds"])


def compare(loss: Mapping[str, Any], large_pool: bool, budget: float, seed: int) -> dict[str, float]:
    """Grow for as many steps as fit into the work that all arms have, and score fresh samples."""
    shared = begun(config_of(seed, budget, BELOW, {}, 1), "grow")

    def work(loss: Mapping[str, Any], steps: int) -> int:
        return work_by_stage(config_of(seed, budget, SIZE, loss, steps))[f"grow-{SIZE}"]

    steps = max(2, steps_for(work({}, max(2, round(STEPS * budget))), lambda count: work(loss, count)))
    config = config_of(seed, budget, SIZE, loss, steps, large_pool=large_pool)
    with finished(shared, config, "grow") as run:
        count = max(200, round(2000 * budget))
        made, below = samples(run, SIZE, count), samples(run, SIZE, count, resolution=BELOW)
        figures = {"steps": float(steps), "seconds": seconds_of(run), **win_rates(run, f"grow-{SIZE}")}
        figures |= {"pool": float(config.grow.fakes), "work_e9": work(loss, steps) / 1e9}
    enlarged = F.interpolate(below, size=(SIZE, SIZE), mode="bicubic", antialias=False).clamp(-1, 1)
    found, start = (
        score_images(ClassifierFeatures(judge(SIZE)), *real_images(SIZE), images, seed) for images in (made, enlarged)
    )
    return figures | grown_figures(found, start)


def best(arms: Iterable[str], metric: str, choose: Callable[..., str]) -> Callable[[Results], float]:
    """The best arm with a judge over reconstruction alone: chosen by the first seed, and held against the median of the others.

    The best of a dozen medians would lie below 1 by chance. With one seed it is that seed's.
    """

    def value(results: Results) -> float:
        plain = results.values("reconstruction", metric)
        ratios = {
            arm: [a / b for a, b in zip(results.values(arm, metric), plain, strict=True)]
            for arm in arms
            if arm != "reconstruction"
        }
        chosen = ratios[choose(ratios, key=lambda arm: ratios[arm][0])]
        return statistics.median(chosen[1:] or chosen)

    return value


@benchmark(
    "adversarial",
    question=(
        "Does an adversarial term earn its work at 32 px over reconstruction alone, and through which features, with which weight and "
        "updates? Drawn shapes; the octave from 16 to 32 px, from as many multiply-adds each."
    ),
    passes=[
        PassLine("the judged arm that the first seed chooses is at most at 0.8 of the distance of reconstruction alone on the others",
                 best(ARMS, "distance", min), at_most=0.8),
        PassLine("and the sharpest is sharper than reconstruction alone", best(ARMS, "sharpness", max), at_least=1.0),
        PassLine("the arms took equal work within 5 %", lambda r: r.unequal(ARMS, "work_e9"), at_most=1.05),
    ],
)  # fmt: skip
def adversarial(budget: float) -> dict[str, Arm]:
    """Fourteen arms on top of one generator a seed."""
    return {name: partial(compare, loss, name == LARGE_POOL, budget) for name, loss in ARMS.items()}
