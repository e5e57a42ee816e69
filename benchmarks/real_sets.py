"""What the benchmarks on real data share: where the files are, and one arm that runs the command and measures the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results
from benchmarks.heart import fit_classifier, score_run
from benchmarks.metrics import measure_command
from pagoda.data import Downsampler, ImageSource
from pagoda.errors import DataError
from pagoda.evaluation import SmallClassifier


def data_file(name: str) -> Path:
    """A file or folder of the shared data.

    Raises:
        DataError: the variable PAGODA_DATA does not name a folder that holds it.
    """
    root = os.environ.get("PAGODA_DATA", "")
    path = Path(root) / name
    if not root or not path.exists():
        raise DataError(f"PAGODA_DATA={root!r} does not hold {name}; set it to the folder of the data sets.")
    return path


def reduced(source: ImageSource, size: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images of some rows at a size, uint8 (N, C, size, size), and their labels."""
    reduce = Downsampler()
    images = np.stack([reduce(source.image(i), size) for i in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([source.label(i) for i in rows])


def real_set(
    name: str,
    *,
    data: Callable[[], Path],
    sizes: tuple[int, ...],
    options: Sequence[str],
    judged_on: Callable[[int], tuple[Tensor, Tensor]],
    compared_with: Callable[[int], tuple[Tensor, Tensor]],
    num_classes: int,
    count: int,
    classifier_steps: int,
) -> Callable[[float], dict[str, Arm]]:
    """The benchmark function of a real set: `pagoda train` once a seed, then every figure of the run.

    A run folder that is kept in PAGODA_RUNS is continued, so that a run that was made before is only measured.
    """

    @cache
    def judge(size: int) -> SmallClassifier:
        return fit_classifier(judged_on(size), num_classes=num_classes, steps=classifier_steps)

    def arm(seed: int) -> dict[str, float]:
        runs = Path(os.environ.get("PAGODA_RUNS", "runs"))
        runs.mkdir(parents=True, exist_ok=True)
        out = runs / f"{name}-seed{seed}"
        command = [sys.executable, "-m", "pagoda.cli.main", "train", str(data()), "--out", str(out)]
        command += [
            "--base",
            str(sizes[0]),
            "--size",
            str(sizes[-1]),
            "--preset",
            "small",
            "--seed",
            str(seed),
            *options,
        ]
        cost = measure_command(command, log=runs / f"{name}-seed{seed}.log")
        grids = Path("docs/results/images") if seed == 0 else None
        judges = {size: judge(size) for size in sizes}
        figures = score_run(out, compared_with, judges, count=count, split_seed=seed, grids=grids)
        # The stages' own clocks, so that a continued run counts its whole time.
        stages = sum(value for metric, value in figures.items() if metric.startswith("minutes_"))
        return {"minutes": stages, "peak_mib": cost["peak_mib"], **figures}

    return lambda budget: {"pagoda": arm}


def common_lines(sizes: tuple[int, ...]) -> list[PassLine]:
    """Pass lines of every real set."""
    base, top = sizes[0], sizes[-1]

    def over(above: str, below: str) -> Callable[[Results], float]:
        return lambda r: max(a / b for a, b in zip(r.values("pagoda", above), r.values("pagoda", below), strict=True))

    return [
        PassLine("the whole run within 60 minutes", lambda r: r.max("pagoda", "minutes"), at_most=60),
        PassLine(
            f"one step at {base} px: at most 1.2 x the teacher's distance",
            over(f"distance_one_step_{base}", f"distance_teacher_{base}"),
            at_most=1.2,
        ),
        PassLine(
            f"one step at {base} px: at or below the teacher's distance, as the paper's student",
            over(f"distance_one_step_{base}", f"distance_teacher_{base}"),
            at_most=1.0,
        ),
        PassLine(
            f"grown to {top} px: at most half the distance of enlarged {base} px",
            over(f"distance_one_step_{top}", f"distance_enlarged_{top}"),
            at_most=0.5,
        ),
        PassLine(
            "contrast within 5 % of the data's at every size",
            lambda r: max(abs(v - 1) for s in sizes for v in r.values("pagoda", f"contrast_{s}")),
            at_most=0.05,
        ),
        PassLine("encoder round trip of at least 33 dB", lambda r: r.min("pagoda", "psnr"), at_least=33),
        PassLine("std of the latents at least 0.93", lambda r: r.min("pagoda", "latent_std"), at_least=0.93),
        PassLine("std of the latents at most 1.03", lambda r: r.max("pagoda", "latent_std"), at_most=1.03),
        PassLine("one step at least 30 x cheaper than the teacher", lambda r: r.min("pagoda", "speedup"), at_least=30),
    ]
