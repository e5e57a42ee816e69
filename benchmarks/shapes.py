"""The demo, three times: from drawn shapes at 8 px to a one-step generator at 32 px on two cores."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import fit_classifier, score_run
from benchmarks.metrics import measure_command
from pagoda.data import Downsampler, ShapesSource
from pagoda.evaluation import SmallClassifier

SIZES = (8, 16, 32)
HELD_OUT_SEED = 1000
"""Of the drawn images that train the judges and are compared with: the demo draws with seed 0."""


@lru_cache(maxsize=len(SIZES))
def real_images(size: int) -> tuple[Tensor, Tensor]:
    """4,000 drawn images that the demo never sees, and their classes."""
    source, reduce = ShapesSource(count=4000, size=32, seed=HELD_OUT_SEED), Downsampler()
    images = np.stack([reduce(source.image(i), size) for i in range(len(source))])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([i % 10 for i in range(len(source))])


@lru_cache(maxsize=len(SIZES))
def judge(size: int) -> SmallClassifier:
    """The classifier whose features are compared."""
    source, reduce = ShapesSource(count=4000, size=32, seed=HELD_OUT_SEED + 1), Downsampler()
    images = np.stack([reduce(source.image(i), size) for i in range(len(source))])
    labels = torch.tensor([i % 10 for i in range(len(source))])
    return fit_classifier((torch.from_numpy(images).permute(0, 3, 1, 2), labels), num_classes=10, steps=600)


def demo(seed: int) -> dict[str, float]:
    """Run the demo's command in a folder of its own and measure what comes out; the run is then kept in PAGODA_RUNS."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"shapes-seed{seed}"
        command = [sys.executable, "-m", "recipes.demo", "--out", str(out), "--seed", str(seed)]
        cost = measure_command(command, log=Path(folder) / "log.txt")
        grids = Path("docs/results/images") if seed == 0 else None
        figures = score_run(
            out, real_images, {size: judge(size) for size in SIZES}, count=2000, split_seed=seed, grids=grids
        )
        if "PAGODA_RUNS" in os.environ:
            shutil.copytree(out, Path(os.environ["PAGODA_RUNS"]) / out.name, dirs_exist_ok=True)
    return {"minutes": cost["seconds"] / 60, "peak_mib": cost["peak_mib"], **figures}


def worst(metric: str) -> object:
    """The largest value over the seeds."""
    return lambda results: results.max("demo", metric)


def ratio(above: str, below: str) -> object:
    """The largest ratio of two metrics over the seeds."""
    return lambda r: max(a / b for a, b in zip(r.values("demo", above), r.values("demo", below), strict=True))


def contrast_error(results: Results) -> float:
    """How far the contrast is from the data's, over seeds and sizes."""
    return max(abs(value - 1) for size in SIZES for value in results.values("demo", f"contrast_{size}"))


@benchmark(
    "shapes",
    question="Does the demo meet its limits of time, memory and quality, with every seed?",
    passes=[
        PassLine("the demo takes at most 6 minutes", worst("minutes"), at_most=6.0),
        PassLine("in at most 2.5 GiB", worst("peak_mib"), at_most=2560),
        PassLine("1,000 one-step images of 32 px take at most 5 s (ms an image)", worst("ms_one_step_32"), at_most=5.0),
        PassLine(
            "one step at 8 px: at most 1.2 x the teacher's distance",
            ratio("distance_one_step_8", "distance_teacher_8"),
            at_most=1.2,
        ),
        PassLine(
            "grown to 32 px: at most half the distance of enlarged 8 px",
            ratio("distance_one_step_32", "distance_enlarged_32"),
            at_most=0.5,
        ),
        PassLine("contrast within 5 % of the data's at every size", contrast_error, at_most=0.05),
        PassLine("encoder round trip of at least 33 dB", lambda r: r.min("demo", "psnr"), at_least=33.0),
        PassLine("std of the latents at least 0.93", lambda r: r.min("demo", "latent_std"), at_least=0.93),
        PassLine("std of the latents at most 1.03", worst("latent_std"), at_most=1.03),
        PassLine(
            "one step at least 30 x cheaper than the teacher with Heun 18",
            lambda r: r.min("demo", "speedup"),
            at_least=30.0,
        ),
    ],
)
def shapes(budget: float) -> dict[str, Arm]:
    """One arm; the budget does not shorten it, since its limits are those of the whole demo."""
    return {"demo": demo}
