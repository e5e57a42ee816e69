"""Whether the adversarial term earns its place on drawn shapes: reconstruction alone against reconstruction with a judge, in equal time."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import FIRST_SEED
from benchmarks.metrics import score_images
from benchmarks.shapes import judge, real_images
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

COUNT = 2000
"""Samples that are scored at each size."""
ARMS: dict[str, Mapping[str, Any]] = {
    "reconstruction": {},
    "teacher, 0.05": {"adversarial": 0.05},
    "teacher, 0.2": {"adversarial": 0.2},
    "teacher mixed, 0.05": {"adversarial": 0.05, "judge": {"mixing": True}},
    "random, 0.05": {"adversarial": 0.05, "judge": {"networks": ["random"]}},
    "teacher, separate": {"adversarial": 0.05, "updates": "separate"},
    "teacher, 0.05, and of pairs": {"adversarial": 0.05, "reconstruction_judge": 0.05},
}
"""Settings of both losses; everything else is the preset `tiny`'s, with real images alone as targets."""


def config_of(seed: int, budget: float, loss: Mapping[str, Any]) -> RunConfig:
    """8 -> 16 px; images and the teacher's training are cut with the budget, the generator's training by the clock."""
    count = max(400, round(6000 * budget))
    config = preset_config("tiny", f"shapes:count={count}", base=8, size=16)
    settings: dict[str, Any] = {"seed": seed, "distill.mode": "rec"}
    settings["teach.loop.steps"] = max(20, round(1100 * budget))
    for stage in ("distill", "grow"):
        settings.update({f"{stage}.loss.{name}": value for name, value in loss.items()})
        settings[f"{stage}.loop.preview_every"] = 0
    return override(config, settings)


@lru_cache(maxsize=1)
def encoded(seed: int, budget: float) -> Path:
    """A run with its teacher and latents, which all arms of a seed share."""
    folder = Path(tempfile.mkdtemp(prefix="pagoda-adversarial-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(config_of(seed, budget, {}), str(folder / "run"), until="encode", quiet=True)
    return folder / "run"


def with_steps(config: RunConfig, distill: int, grow: int) -> RunConfig:
    """So many steps of each stage."""
    loop = dataclasses.replace(config.distill.loop, steps=distill)
    return dataclasses.replace(
        config,
        distill=dataclasses.replace(config.distill, loop=loop),
        grow=dataclasses.replace(config.grow, steps=(grow,)),
    )


def seconds_of(run: RunFolder, stage: str) -> float:
    """Of the steps of a stage."""
    return float(run.require(stage, "pagoda train")["results"]["seconds"])


def compare(seed: int, *, loss: Mapping[str, Any], budget: float) -> dict[str, float]:
    """Train for as many steps as fit into the time that all arms have, and score what comes out."""
    seconds = {"distill": 90 * budget, "grow-16": 60 * budget}
    shared, config = encoded(seed, budget), config_of(seed, budget, loss)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(shared, Path(folder) / "pilot")
        pilot = train(with_steps(config, 12, 12), f"{folder}/pilot", quiet=True)
        steps = {stage: max(2, round(12 * budgeted / seconds_of(pilot, stage))) for stage, budgeted in seconds.items()}
        shutil.copytree(shared, Path(folder) / "run")
        run = train(with_steps(config, steps["distill"], steps["grow-16"]), f"{folder}/run", quiet=True)
        figures: dict[str, float] = {}
        for stage, size in (("distill", 8), ("grow-16", 16)):
            images, labels = real_images(size)
            chosen = [k % 10 for k in range(COUNT)]
            made = sample_images(load_generator(run, size), range(FIRST_SEED, FIRST_SEED + COUNT), labels=chosen)
            found = score_images(ClassifierFeatures(judge(size)), images, labels, made, seed)
            figures |= {f"distance_{size}": found["distance"], f"sharpness_{size}": found["sharpness_ratio"]}
            figures |= {f"steps_{size}": float(steps[stage]), f"seconds_{size}": seconds_of(run, stage)}
    return figures


def best_gain(size: int) -> object:
    """The smallest median distance of an arm with a judge, over that of reconstruction alone."""

    def gain(results: Results) -> float:
        judged = [results.median(arm, f"distance_{size}") for arm in ARMS if arm != "reconstruction"]
        return min(judged) / results.median("reconstruction", f"distance_{size}")

    return gain


def unequal(results: Results) -> float:
    """The largest ratio of times between arms at one size."""
    times = {size: [results.median(arm, f"seconds_{size}") for arm in ARMS] for size in (8, 16)}
    return max(max(values) / min(values) for values in times.values())


@benchmark(
    "adversarial",
    question="Does an adversarial term earn its time over reconstruction alone, and through which features and with which weight?",
    passes=[
        PassLine(
            "some judged arm is at most at 0.95 of the distance of reconstruction alone, 8 px",
            best_gain(8),
            at_most=0.95,
        ),
        PassLine("the same at 16 px", best_gain(16), at_most=0.95),
        PassLine("arms differ by at most 15 % in time", unequal, at_most=1.15),
    ],
)
def adversarial(budget: float) -> dict[str, Arm]:
    """Seven arms with one teacher a seed."""

    def arm(loss: Mapping[str, Any]) -> Arm:
        return lambda seed: compare(seed, loss=loss, budget=budget)

    return {name: arm(loss) for name, loss in ARMS.items()}
