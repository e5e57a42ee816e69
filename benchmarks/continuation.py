"""How long the smooth continuation of a square hole takes, with and without the preconditioner, and how many steps.

A hole in one image of 400 px whose colours vary smoothly; the seed draws them. Both solve to the same tolerance.
"""

from __future__ import annotations

import time
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.steering import fill_hole, holes
from pagoda.training import seeded_generator

SIDE, HOLES = 400, (60, 120, 250, 380)


def picture(seed: int) -> Tensor:
    """(1, 3, SIDE, SIDE), smooth."""
    coarse = torch.randn(1, 3, 12, 12, generator=seeded_generator("continuation", seed))
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")


def timed(image: Tensor, known: Tensor, above: int) -> tuple[Tensor, float]:
    """The image with its hole filled, preconditioned where the hole is larger than `above`; and the seconds."""
    with patch.object(holes, "_LARGE", above):
        started = time.perf_counter()
        filled = fill_hole(image, known)
        return filled, time.perf_counter() - started


def measure(side: int, seed: int) -> dict[str, float]:
    """Both ways in turn, three times; the fastest of each."""
    image, known = picture(seed), torch.ones(SIDE, SIDE, dtype=torch.bool)
    known[10 : 10 + side, 10 : 10 + side] = False
    found = [(timed(image, known, holes._LARGE), timed(image, known, SIDE)) for _ in range(3)]
    seconds, plain = (min(run[which][1] for run in found) for which in (0, 1))
    (as_shipped, _), (without, _) = found[0]
    return {
        "seconds": seconds,
        "seconds_plain": plain,
        "plain_over": plain / seconds,
        "difference": float((as_shipped - without).abs().max()),
    }


@benchmark(
    "continuation",
    question="What does the smooth continuation of a hole take, and how much less than conjugate gradients by themselves?",
    passes=[
        PassLine("a hole of 60 px is solved as before: no difference", lambda r: r.max("60 px", "difference"), at_most=0),
        PassLine("250 px: at least 4 x faster", lambda r: r.min("250 px", "plain_over"), at_least=4),
        PassLine("380 px within 2 s of one core", lambda r: r.max("380 px", "seconds"), at_most=2),
        PassLine("the same image to a tenth of a byte",
                 lambda r: max(r.max(f"{side} px", "difference") for side in HOLES), at_most=0.1 * 2 / 255),
    ],
)  # fmt: skip
def continuation(budget: float) -> dict[str, Arm]:
    """One arm a side; the budget does not shorten it."""
    return {f"{side} px": partial(measure, side) for side in HOLES}
