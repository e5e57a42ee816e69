"""Robustness to a weak teacher on drawn shapes: the same comparison as `theory.ring`, with a teacher that was trained too shortly.

Both teachers are distilled at 8 px, without growth, from the same weights and with the same steps; what differs is whether real
images at their own latents or the teacher's images of noise are learnt, and whether there is a discriminator. The discriminator reads the
teacher's own encoder, so that a weak teacher weakens it too: unlike on the ring.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, theorem 3.1.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.theory.shapes_runs import begun, distance, finished, latent_std, num_scored, samples, shapes_config
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher
from pagoda.stages.making import teacher_images
from pagoda.stages.run_folder import RunFolder

TEACHERS = {"weak": 0.12, "trained": 1.0}
"""Share of the demo's steps."""
LOSSES = {
    "dstl": {"distill.mode": "dstl", "distill.loss.adversarial": 0.0},
    "rec": {"distill.mode": "rec", "distill.loss.adversarial": 0.0},
    "dstl+adv": {"distill.mode": "dstl", "distill.loss.adversarial": 0.1},
    "rec+adv": {"distill.mode": "rec", "distill.loss.adversarial": 0.1},
}


def _config(teacher: str, budget: float, seed: int) -> RunConfig:
    # The losses of the paper alone: matching would pull every student towards the weak teacher.
    config = shapes_config(seed, base=8, size=8, budget=budget, distill__matching__weight=0.0)
    return override(config, {"teach.loop.steps": max(20, round(TEACHERS[teacher] * config.teach.loop.steps))})


def _student(loss: str, teacher: str, budget: float, seed: int) -> dict[str, float]:
    config = _config(teacher, budget, seed)
    with finished(begun(config, "encode"), override(config, LOSSES[loss]), "distill") as run:
        return distance(samples(run, 8, num_scored(budget)), seed)


def _teacher(teacher: str, budget: float, seed: int) -> dict[str, float]:
    run = RunFolder.open(begun(_config(teacher, budget, seed), "encode"))
    denoiser, _ = load_teacher(run.teacher)
    count = num_scored(budget)
    seeds = list(range(1_000_000, 1_000_000 + count))
    images = teacher_images(denoiser, seeds, [s % 10 for s in seeds], (3, 8, 8)).clamp(-1, 1)
    return {**distance(images, seed), "latent_std": latent_std(run)}


def worst_ratio(above: str, below: str) -> object:
    """The largest ratio of distances over the seeds."""
    return lambda r: max(a / b for a, b in zip(r.values(above, "distance"), r.values(below, "distance"), strict=True))


@benchmark(
    "theory.weak_teacher",
    question=(
        "Does L_rec + L_adv suffer less from a teacher that was trained for an eighth of the steps than L_dstl + L_adv? Drawn shapes at "
        "8 px, Fréchet distance in the features of an independent classifier."
    ),
    passes=[
        PassLine(
            "weak teacher: rec+adv below dstl+adv, on every seed",
            worst_ratio("weak: rec+adv", "weak: dstl+adv"),  # type: ignore[arg-type]
            at_most=1.0,
        ),
        PassLine(
            "weak teacher: rec+adv at most 0.6 x dstl+adv in the median",
            lambda r: r.median("weak: rec+adv", "distance") / r.median("weak: dstl+adv", "distance"),
            at_most=0.6,
        ),
        PassLine(
            "trained teacher: rec+adv at most 1.5 x dstl+adv in the median",
            lambda r: r.median("trained: rec+adv", "distance") / r.median("trained: dstl+adv", "distance"),
            at_most=1.5,
        ),
        PassLine(
            "the weak teacher's latents are further from unit scale (ratio of what is missing, median)",
            lambda r: (
                abs(r.median("weak: teacher", "latent_std") - 1) / abs(r.median("trained: teacher", "latent_std") - 1)
            ),
            at_least=1.5,
        ),
    ],
)
def weak_teacher(budget: float) -> dict[str, Arm]:
    """Each teacher alone and with each sum of losses."""
    arms: dict[str, Arm] = {}
    for teacher in TEACHERS:
        arms[f"{teacher}: teacher"] = partial(_teacher, teacher, budget)
        arms |= {f"{teacher}: {loss}": partial(_student, loss, teacher, budget) for loss in LOSSES}
    return arms
