"""Whether the adversarial term earns its place on real images: the last octave of the emoji, 32 to 64 px, from as many
multiply-adds.

The runs are those of `emoji_text` that are told groups, as they lie in PAGODA_RUNS; their last octave is grown anew, from the same
generator of 32 px, by reconstruction alone and with judges. `distance_enlarged` is that of its samples, enlarged.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.adversarial import best
from benchmarks.emoji_text import SIZE, classifier, made_run, real_images
from benchmarks.equal_work import steps_for, work_by_stage
from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.heart import FIRST_SEED, grown_figures, win_rates
from benchmarks.metrics import score_images
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig, override
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

BELOW, STAGE = SIZE // 2, f"grow-{SIZE}"
STEPS = 700
"""Of the octave by reconstruction alone, as the preset has them. Every arm has as many multiply-adds; judged ones have fewer steps."""
SCORED = 800
ARMS: dict[str, Mapping[str, Any]] = {
    "reconstruction": {"adversarial": 0.0},
    "teacher, 0.05": {"adversarial": 0.05},
    "teacher, 0.3": {"adversarial": 0.3},
    "teacher, 0.3, no augmentation": {"adversarial": 0.3, "augment": ()},
    "random, 0.3": {"adversarial": 0.3, "judge": {"networks": ["random"]}},
    "teacher, 0.3, heads of twice the width": {"adversarial": 0.3, "judge_width": 128},
}
"""Settings of the octave's loss beside the run's own."""


def config_of(config: RunConfig, loss: Mapping[str, Any], steps: int) -> RunConfig:
    """A run's configuration with another loss and number of steps in its last octave, judged, if at all, from the first step on."""
    plain = {"adversarial_from": 0.0, "adversarial_every": 1, "judge_warmup": 0.0}
    changes = {"grow.loop.preview_every": 0, "grow.loop.log_every": 10, "evaluation.gap.count": 0, "threads": 1}
    config = override(config, changes)
    octaves = len(config.sizes) - 1
    own = override(config, {f"grow.loss.{name}": value for name, value in {**plain, **loss}.items()}).grow.loss
    losses = tuple(config.grow.loss_of(octave) for octave in range(octaves - 1))
    taken = [config.grow.octave(octave)["steps"] for octave in range(octaves - 1)]
    grow = dataclasses.replace(config.grow, octave_losses=(*losses, own), steps=(*taken, steps))
    return dataclasses.replace(config, grow=grow)


def without_last(run: RunFolder, folder: Path) -> Path:
    """A copy of a run that has not grown to `SIZE` yet."""
    left_out = shutil.ignore_patterns(
        f"generator-{SIZE}", f"{STAGE}*", "checkpoints", "samples", "metrics.jsonl", "report.html"
    )
    return Path(shutil.copytree(run.path, folder / "run", ignore=left_out))


def grown(run: RunFolder, config: RunConfig, folder: Path) -> RunFolder:
    """A copy of the run, grown anew under a configuration."""
    return train(config, str(without_last(run, folder)), quiet=True)


@cache
def wanted() -> tuple[list[int], list[int]]:
    """Seeds of the scored samples, and their groups, as often as among the training emoji."""
    labels = real_images()[1]
    rows = torch.linspace(0, len(labels) - 1, SCORED).long()
    return list(range(FIRST_SEED, FIRST_SEED + SCORED)), labels[rows].tolist()


def score(images: Tensor, budget: float, seed: int) -> dict[str, float]:
    """Distance to the training emoji, its floor, sharpness and contrast."""
    extractor = ClassifierFeatures(classifier(max(20, round(600 * budget))))
    return dict(score_images(extractor, *real_images(), images, seed))


def compare(loss: Mapping[str, Any], budget: float, seed: int) -> dict[str, float]:
    """Grow for as many steps as fit into the work that all arms have, and score fresh samples."""
    run, _ = made_run("label", seed, budget)

    def work(loss: Mapping[str, Any], steps: int) -> int:
        return work_by_stage(config_of(run.config(), loss, steps))[STAGE]

    plain = work(ARMS["reconstruction"], max(2, round(STEPS * budget)))
    steps = max(2, steps_for(plain, lambda count: work(loss, count)))
    with tempfile.TemporaryDirectory() as name:
        made = grown(run, config_of(run.config(), loss, steps), Path(name))
        generator, (seeds, labels) = load_generator(made), wanted()
        large, small = (sample_images(generator, seeds, labels=labels, resolution=side) for side in (SIZE, BELOW))
        figures = {"steps": float(steps), "seconds": float(made.require(STAGE, "")["results"]["seconds"])}
        figures |= {"work_e9": work(loss, steps) / 1e9, **win_rates(made, STAGE)}
    enlarged = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic", antialias=False).clamp(-1, 1)
    found, start = score(large, budget, seed), score(enlarged, budget, seed)
    return figures | grown_figures(found, start)


@benchmark(
    "adversarial_emoji",
    question=(
        "Does an adversarial term earn its work on real images? The octave of the emoji from 32 to 64 px, as many multiply-adds each, on "
        "top of one generator a seed."
    ),
    passes=[
        PassLine(
            "the judged arm that the first seed chooses is at most at 0.8 of the distance of reconstruction alone on the others",
            best(ARMS, "distance", min),
            at_most=0.8,
        ),
        PassLine("the arms took equal work within 5 %", lambda r: r.unequal(ARMS, "work_e9"), at_most=1.05),
    ],
)
def adversarial_emoji(budget: float) -> dict[str, Arm]:
    """One arm a loss."""
    return {name: partial(compare, loss, budget) for name, loss in ARMS.items()}
