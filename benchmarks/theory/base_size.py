"""Base 8 against base 16, both grown to 32 px, at equal work: the steps of base 16 are cut to the multiply-adds of base 8.

The work is counted by `pagoda plan` before the run: inversion, teacher's pairs, distillation and growth are in it.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, the ablation of the base resolution (there 32 against 64, up to 512 px).
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.equal_work import work_by_stage
from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.theory.shapes_runs import distance, latent_std, num_scored, samples, seconds, shapes_config
from pagoda.networks import num_parameters
from pagoda.stages.config import RunConfig, override
from pagoda.stages.image_shares import encoded_share
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

SIZE = 32


def work(config: RunConfig) -> int:
    """Multiply-adds of a whole run."""
    return sum(work_by_stage(config).values())


def with_work(config: RunConfig, target: int) -> RunConfig:
    """`config` with all its steps and pairs, and the share of the images that is encoded, multiplied alike, so that it takes `target`
    multiply-adds."""

    def shortened(share: float) -> RunConfig:
        pairs = config.distill.teacher_pairs.count
        return override(
            config,
            {
                "encode.share": min(1.0, share * encoded_share(config)),
                "teach.loop.steps": max(1, round(share * config.teach.loop.steps)),
                "distill.loop.steps": max(1, round(share * config.distill.loop.steps)),
                "distill.teacher_pairs.count": max(1, round(share * pairs)),
                "grow.steps": [max(1, round(share * steps)) for steps in config.grow.steps],
            },
        )

    whole, half = work(config), work(shortened(0.5))
    slope = 2 * (whole - half)  # the work is a straight line over the share
    return shortened(max(0.02, 1 + (target - whole) / slope))


def _run(base: int, budget: float, seed: int) -> dict[str, float]:
    config = shapes_config(seed, base=base, size=SIZE, budget=budget)
    if base != 8:
        config = with_work(config, work(shapes_config(seed, base=8, size=SIZE, budget=budget)))
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, str(Path(folder) / "run"), quiet=True)
        generator = load_generator(run)
        made = samples(run, SIZE, num_scored(budget))
        started, timed = time.perf_counter(), 256
        sample_images(generator, list(range(timed)), labels=[i % 10 for i in range(timed)], batch_size=64)
        ms = 1e3 * (time.perf_counter() - started) / timed
        return {
            **distance(made, seed),
            "gigamultiply_adds": work(config) / 1e9,
            "minutes": seconds(run) / 60,
            "ms_an_image": ms,
            "parameters_m": num_parameters([generator]) / 1e6,
            "latent_std": latent_std(run),
        }


@benchmark(
    "theory.base_size",
    question="Is a base of 8 px as good as one of 16 px for images of 32 px, when both runs take as many multiply-adds?",
    passes=[
        PassLine(
            "base 8: at most 1.25 x the distance of base 16, median",
            lambda r: r.median("base 8", "distance") / r.median("base 16", "distance"),
            at_most=1.25,
        ),
        PassLine(
            "base 8 makes an image in at most the time of base 16",
            lambda r: r.median("base 8", "ms_an_image") / r.median("base 16", "ms_an_image"),
            at_most=1.0,
        ),
        PassLine(
            "the runs took equal work within 5 % (larger over smaller)",
            lambda r: max(
                r.median("base 8", "gigamultiply_adds") / r.median("base 16", "gigamultiply_adds"),
                r.median("base 16", "gigamultiply_adds") / r.median("base 8", "gigamultiply_adds"),
            ),
            at_most=1.05,
        ),
    ],
)
def base_size(budget: float) -> dict[str, Arm]:
    """One arm a base."""
    return {f"base {base}": partial(_run, base, budget) for base in (8, 16)}
