"""How much worse is one step at fresh noise than at training latents, and what closes the gap, with 500 images?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.equal_work import steps_for, work_by_stage
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import win_rates
from benchmarks.theory.shapes_runs import begun
from pagoda.data import Downsampler, ShapesSource
from pagoda.errors import ConfigError
from pagoda.evaluation import SmallClassifier, train_classifier
from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train

SIZE, CLASSES = 8, 10
FEW = 500
"""Images; `prior_gap_many` asks of more."""
JUDGE_SEED, UNSEEN_SEED = 1001, 1000
REC_STEPS = 1500
"""Of the arm `rec`. What its latents and these steps take in multiply-adds is what every arm has for inversion, teacher's pairs, the
encoder in one call and distillation together; `pagoda plan` counts them. Seconds would go by what else the machine does."""
ENCODER_STEPS = 300
"""Of the encoder in one call, of batches of 64."""
WHOLE = 0.25
"""Budgets from here up cut the time of the arms alone: sets, teachers and what is measured are those of the full run."""
ALONE = {"distill.matching.weight": 0.0}
"""Without distribution matching, which the preset has."""
MODES: dict[str, dict[str, Any]] = {
    "rec": {"distill.mode": "rec", **ALONE},
    "both": {"distill.mode": "both", **ALONE},
    "matched": {"distill.mode": "rec"},
    "both, matched": {"distill.mode": "both"},
    "views": {"distill.mode": "rec", "source.views": 4, **ALONE},
    "views, both": {"distill.mode": "both", "source.views": 4, **ALONE},
    "amortised": {"distill.mode": "rec", "distill.latents": "amortised", **ALONE},
    "mixtures": {"distill.mode": "both", "distill.teacher_pairs.latents": "mixed", **ALONE},
    "clean": {"distill.mode": "rec", "encode.add_noise": False, **ALONE},
    "renormalised": {"distill.mode": "rec", "encode.renormalise": True, **ALONE},
    "dense": {"distill.mode": "rec", "encode.num_nodes": 40, "encode.rho": 10.0, **ALONE},
    "decayed": {
        "distill.mode": "rec",
        "distill.optimizer.name": "adamw",
        "distill.optimizer.weight_decay": 0.1,
        **ALONE,
    },
    "longer teacher": {"distill.mode": "rec", "teach.loop.steps": 2, **ALONE},
    "judged": {"distill.mode": "rec", "distill.loss.adversarial": 0.1, **ALONE},
    "judged, warmed up": {
        "distill.mode": "rec",
        "distill.loss.adversarial": 0.1,
        "distill.loss.adversarial_from": 0.6,
        "distill.loss.judge_warmup": 0.2,
        **ALONE,
    },
}
"""`matched` compares the distribution of samples with the teacher's in the last third of the steps, as the demo does. `amortised` learns
from latents that one call makes anew in every step, each time with another draw of the noise: a cloud of latents an image. `views` encodes
three further views of each drawing, a little moved and zoomed; its teacher sees them too. `mixtures` learns what the teacher makes of
mixtures of encoded latents. `clean`, `renormalised` and `dense` change where latents end: no noise added before the inversion, each brought
to a root mean square of 1, and twice the nodes, more of them near the image. `decayed` holds the generator's weights small. `longer
teacher` trains the teacher for twice as long (the number stands for that), beside the work of the arm. `judged` has a discriminator of
samples of the prior from the first step on; `warmed up` lets it learn to tell them in a fifth of the steps, while the generator is not told
of it, so that it can separate them when it is. Arms with a judge say how often it ranks a real image above a sample (0.5 is chance)."""
WITH_TEACHER = "work of a longer teacher"
"""Stands among settings for so much more work than other arms have as a teacher of twice the steps takes more than one of the usual."""
LONGER: dict[str, dict[str, Any]] = {
    "both, matched, longer teacher": {"distill.mode": "both", "teach.loop.steps": 2},
    "both, matched, longer": {"distill.mode": "both", WITH_TEACHER: 1},
}
"""What is better given more time, the teacher or the student: both take as much. For `prior_gap_many`."""
ENCODED = 3000
"""Images that are inverted at most, as in the demo: of 20,000 a share, and the teacher learns from all. Inverting them all would take
longer than an arm may."""


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn shapes (count, 3, SIZE, SIZE) uint8 and their classes."""
    source, reduce = ShapesSource(count=count, size=32, seed=seed), Downsampler()
    images = np.stack([reduce(source.image(i), SIZE) for i in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % CLASSES


@lru_cache(maxsize=1)
def judge() -> SmallClassifier:
    """The classifier whose features are compared; trained on images that no run sees and nothing is measured on."""
    images, labels = draw(4000, JUDGE_SEED)
    return train_classifier(images, labels, num_classes=CLASSES, input_size=SIZE, steps=600)


def config_of(count: int, mode: str, seed: int, budget: float, judge_folder: str) -> RunConfig:
    """The demo's settings at base size, whose gap is judged by the independent classifier against drawings that no run sees."""
    cut = 1.0 if budget >= WHOLE else budget
    settings: dict[str, Any] = {
        "seed": seed,
        "threads": 1,
        "device": "cpu",
        "mirror": False,
        "teach.loop.steps": max(20, round(1100 * cut)),
        "teach.loop.preview_every": 0,
        "distill.loop.preview_every": 0,
        "distill.loop.log_every": 10,
        "distill.loop.checkpoint_every": 100_000,
        "amortise.loop.steps": max(4, round(ENCODER_STEPS * budget)),
        "amortise.loop.batch_size": 64,
        "amortise.loop.preview_every": 0,
        "amortise.loop.checkpoint_every": 100_000,
        "distill.teacher_pairs.count": max(64, round(5000 * budget)),
        "encode.share": min(1.0, ENCODED / count),
        "evaluation.data": f"shapes:count={4000 if cut == 1 else 200},seed={UNSEEN_SEED}",
        "evaluation.gap.count": 250 if cut == 1 else 64,  # as many as half of 500, so that all sets compare
        "evaluation.gap.features": f"classifier:{judge_folder}" if judge_folder else "random",
    }
    changes = dict((MODES | LONGER)[mode])
    settings["teach.loop.steps"] *= changes.pop("teach.loop.steps", 1)
    changes.pop(WITH_TEACHER, None)
    data = f"shapes:count={max(40, round(count * cut))}"
    return override(preset_config("tiny", data, base=SIZE, size=SIZE), {**settings, **changes})


def work_of(config: RunConfig) -> tuple[int, int]:
    """Multiply-adds of the teacher, and of all that follows it."""
    every = work_by_stage(config)
    teacher = every.pop("teach")
    return teacher, sum(every.values())


def work_after_teacher(config: RunConfig) -> int:
    """Multiply-adds of all that follows the teacher."""
    return work_of(config)[1]


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Distilled in so many steps."""
    return override(config, {"distill.loop.steps": steps})


def with_room(config: RunConfig, target: int) -> RunConfig:
    """`config` with as many steps of distillation as inversion, pairs and encoder leave room for in `target` multiply-adds.

    Raises:
        ConfigError: they leave none.
    """
    steps = steps_for(target, lambda count: work_after_teacher(with_steps(config, count)))
    if steps < 1:
        raise ConfigError(
            f"inversion, pairs and encoder take more than the {target / 1e9:.0f} G multiply-adds of an arm."
        )
    return with_steps(config, steps)


def arm(count: int, mode: str, budget: float) -> Arm:
    """One set and one way of training on it, for every seed."""

    def measure(seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            judge().save(folder / "judge")
            config = config_of(count, mode, seed, budget, str(folder / "judge"))
            plain = config_of(FEW, "rec", seed, budget, str(folder / "judge"))
            # What does not change the teacher shares it: all ways but those with views, whose teacher sees these too, and a longer one.
            alike = config_of(count, "views" if config.source.views > 1 else "rec", seed, budget, "")
            alike = override(alike, {"teach.loop.steps": config.teach.loop.steps})
            taught, target = work_of(with_steps(plain, max(40, round(REC_STEPS * budget))))
            if WITH_TEACHER in (MODES | LONGER)[mode]:
                target += taught  # a teacher of twice the steps takes as much again
            config = with_room(config, target)
            run = RunFolder.open(shutil.copytree(begun(alike, "teach"), folder / "run"))
            run.write_config(config)
            run = train(config, str(run.path), until="distill", quiet=True)
            facts, rates = load_gaps(run)[SIZE], win_rates(run, "distill")
        points = {p["name"] if p["name"] != "mixture" else f"mixture_{p['fraction']:g}": p for p in facts["points"]}
        figures: dict[str, float] = {
            "steps": config.distill.loop.steps,
            "work_e9": work_after_teacher(config) / 1e9,
            "teacher_work_e9": work_of(config)[0] / 1e9,
            **rates,
        }
        for point, found in points.items():
            figures |= {f"fd_{point}": found["fd"], f"kd_{point}": found["kd"]}
        noise = points["noise"]
        return figures | {
            "floor": noise["floor_fd"],
            "kd_floor": noise["floor_kd"],
            "contrast": noise["contrast_ratio"],
        }

    return measure


def gap(results: Results, name: str) -> float:
    """Median over the seeds of how much further away samples of fresh noise are than reconstructions of training images.

    By the kernel distance: it has no bias at 250 images, where Fréchet distances of 96 features have a floor as large as the gap."""
    pairs = zip(results.values(name, "kd_noise"), results.values(name, "kd_training"), strict=True)
    return float(np.median([noise - training for noise, training in pairs]))


def gaps(above: str, below: str) -> Callable[[Results], float]:
    """The gap of one arm over that of another."""
    return lambda results: gap(results, above) / max(gap(results, below), 1e-12)


@benchmark(
    "prior_gap",
    question=(
        "How large is the prior gap with 500 images, and do teacher's pairs, distribution matching, more views, latents made anew in every "
        "step, or other ways close it, from as many multiply-adds?"
    ),
    passes=[
        PassLine("there is one: noise 1.5 x further than training latents",
                 lambda r: r.median("rec", "fd_noise") / r.median("rec", "fd_training"), at_least=1.5),
        PassLine("the teacher's pairs leave at most 0.8 of it", gaps("both", "rec"), at_most=0.8),
        PassLine("matching leaves at most half of it", gaps("matched", "rec"), at_most=0.5),
        PassLine("matching after the pairs leaves at most 0.8 of the gap of the pairs alone",
                 gaps("both, matched", "both"), at_most=0.8),
        PassLine("latents made anew leave at most 0.9 of it", gaps("amortised", "rec"), at_most=0.9),
        *(
            PassLine(f"{mode} leaves at most 0.9 of it", gaps(mode, "rec"), at_most=0.9)
            for mode in (
                "mixtures", "clean", "renormalised", "dense", "decayed", "longer teacher", "judged", "judged, warmed up",
            )
        ),
        PassLine("more views leave at most 0.9 of it", gaps("views", "rec"), at_most=0.9),
        PassLine("more views beside the teacher's pairs leave at most 0.9 of the gap of the pairs alone",
                 gaps("views, both", "both"), at_most=0.9),
        PassLine("the arms took equal work within 5 %", lambda r: r.unequal(MODES, "work_e9"), at_most=1.05),
    ],
)  # fmt: skip
def prior_gap(budget: float) -> dict[str, Arm]:
    """Every way of training on few images."""
    return {mode: arm(FEW, mode, budget) for mode in MODES}
