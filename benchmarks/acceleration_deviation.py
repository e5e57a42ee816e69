"""Deviation against cost of every plan on trained models, against simply taking fewer steps.

A U-Net and a small DiT are trained on drawn shapes of 16 px, and a U-Net of four levels on emoji of 64 px (`pagoda teach`, minutes
each, emoji a quarter of an hour); they are kept in PAGODA_RUNS. Samples of the same seeds are compared to those of the full run by
relative L2. The cost is the share of the full run's multiply-adds. For a
plan, `against_fewer_steps` is its deviation over that of the plain sampler at the same cost, interpolated between numbers of steps on
a logarithmic scale: below 1 the plan is the better way to save.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import pagoda
from benchmarks.emoji import archive
from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.acceleration import RAS, DeepCache, FasterDiffusion, Plan
from pagoda.diffusion import Condition, Denoiser, Euler, GuidedDenoiser, karras_sigmas, sample
from pagoda.stages.context import load_teacher
from pagoda.training import noise_of_seeds

STEPS = 40
SIZES = {"unet": 16, "dit": 16, "emoji": 64}
FEWER = (39, 36, 33, 30, 24, 20, 16, 13, 10, 8, 6, 5, 4)
UNET_PLANS: dict[str, Plan] = {
    **{f"deepcache-n{n}-b{b}": DeepCache(interval=n, branch=b) for b in (0, 1, 2) for n in (2, 3, 5, 10)},
    "deepcache-center-n5-b1": DeepCache(interval=5, branch=1, schedule="center_power"),
    "faster-early-9": FasterDiffusion(keys=[0, 1, 2, 3, 4, 8, 12, 20, 28], parallel=False, inject_scale=0.0),
    "faster-uniform-9": FasterDiffusion(keys=[0, 4, 9, 13, 18, 22, 27, 31, 36], parallel=False, inject_scale=0.0),
    "faster-late-9": FasterDiffusion(keys=[0, 12, 20, 27, 32, 36, 37, 38, 39], parallel=False, inject_scale=0.0),
    "faster-uniform-20": FasterDiffusion(keys=2, parallel=False, inject_scale=0.0),
    "faster-output-9": FasterDiffusion(keys=[0, 1, 2, 3, 4, 8, 12, 20, 28], propagate="output", inject_scale=0.0),
}
DIT_PLANS: dict[str, Plan] = {
    **{f"ras-{int(100 * r)}": RAS(sample_ratio=r, reset_steps=(16, 28)) for r in (0.75, 0.5, 0.25)},
    "ras-50-high": RAS(reset_steps=(16, 28), focus="high_std"),
    "ras-50-random": RAS(reset_steps=(16, 28), focus="random"),
    "ras-50-no-cache": RAS(reset_steps=(16, 28), kv_cache=False),
    "ras-50-no-reset": RAS(reset_steps=()),
    "ras-50-official": RAS(reset_steps=(16, 28), official_compat=True),
    "faster-dit-2": FasterDiffusion(keys=2, parallel=False, inject_scale=0.0),
    "faster-dit-3": FasterDiffusion(keys=3, parallel=False, inject_scale=0.0),
}


EMOJI_PLANS: dict[str, Plan] = {
    **{f"deepcache-n{n}-b1": DeepCache(interval=n, branch=1) for n in (2, 3, 5, 10)},
    **{f"deepcache-n{n}-b0": DeepCache(interval=n, branch=0) for n in (2, 3, 5)},
    "deepcache-n5-b3": DeepCache(interval=5, branch=3),
    "deepcache-center-n5-b1": DeepCache(interval=5, branch=1, schedule="center_power"),
    "faster-uniform-9": UNET_PLANS["faster-uniform-9"],
    "faster-uniform-20": UNET_PLANS["faster-uniform-20"],
}


@cache
def teacher(kind: str, train_steps: int) -> Denoiser:
    """Trained once, then read from its run folder."""
    runs = Path(os.environ.get("PAGODA_RUNS", "runs"))
    runs.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {"teach.loop.steps": train_steps}
    data = "shapes"
    if kind == "dit":
        settings["backbone"] = "dit_nano"
    if kind == "emoji":
        data = str(archive())
        settings |= {"source.filter": "skin_tone=", "backbone.channels": [16, 32, 64, 64], "teach.loop.batch_size": 16}
    out = runs / f"acceleration-{kind}-{train_steps}"
    run = pagoda.teach(data, size=SIZES[kind], out=out, preset="tiny", settings=settings, quiet=True).run
    return GuidedDenoiser(load_teacher(run.teacher)[0], 1.5)


def draw(kind: str, denoiser: Denoiser, steps: int, seed: int, images: int) -> Tensor:
    """Images of one class after another, by Euler (DDIM)."""
    z = noise_of_seeds(range(1000 * seed, 1000 * seed + images), (3, SIZES[kind], SIZES[kind]))
    sigmas = torch.cat([karras_sigmas(steps), torch.zeros(1, dtype=torch.float64)])
    condition = Condition.of_labels([k % (9 if kind == "emoji" else 10) for k in range(images)])
    with torch.no_grad():
        return sample(denoiser, z, sigmas=sigmas, condition=condition, solver=Euler())


@cache
def full_run(kind: str, train_steps: int, seed: int, images: int) -> Tensor:
    """What every plan is held against."""
    return draw(kind, teacher(kind, train_steps), STEPS, seed, images)


@cache
def fewer_steps(kind: str, train_steps: int, seed: int, images: int) -> tuple[tuple[float, float], ...]:
    """(cost, deviation) of the plain sampler with fewer steps."""
    denoiser = teacher(kind, train_steps)
    full = full_run(kind, train_steps, seed, images)
    found = [(n / STEPS, draw(kind, denoiser, n, seed, images)) for n in FEWER]
    return tuple((cost, float((x - full).norm() / full.norm())) for cost, x in found)


def interpolated(curve: tuple[tuple[float, float], ...], cost: float) -> float:
    """Deviation at a cost, linear in both logarithms; NaN outside of the curve."""
    ordered = sorted(curve)
    for (low, a), (high, b) in itertools.pairwise(ordered):
        if low <= cost <= high:
            share = (math.log(cost) - math.log(low)) / (math.log(high) - math.log(low))
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return float("nan")


def deviate(kind: str, plan: Plan, train_steps: int, images: int, seed: int) -> dict[str, float]:
    """One plan on one model."""
    denoiser = teacher(kind, train_steps)
    plain = full_run(kind, train_steps, seed, images)
    with pagoda.accelerate(denoiser, plan) as run:
        found = draw(kind, denoiser, STEPS, seed, images)
    facts = run.ledgers[0].facts()
    cost = 1 - facts["multiply_adds_saved"]
    deviation = float((found - plain).norm() / plain.norm())
    plain_at_cost = interpolated(fewer_steps(kind, train_steps, seed, images), cost)
    return {
        "cost": cost,
        "deviation": deviation,
        "fewer_steps_at_cost": plain_at_cost,
        "against_fewer_steps": deviation / plain_at_cost,
        "seconds_share": 1 - facts["seconds_saved"],
    }


def fewer(kind: str, steps: int, train_steps: int, images: int, seed: int) -> dict[str, float]:
    """One point of the plain sampler's curve."""
    cost, deviation = fewer_steps(kind, train_steps, seed, images)[FEWER.index(steps)]
    same = {"fewer_steps_at_cost": deviation, "against_fewer_steps": 1.0, "seconds_share": cost}
    return {"cost": cost, "deviation": deviation, **same}


@benchmark(
    "acceleration_deviation",
    question=(
        "How far do accelerated samples lie from those of the full run of 40 DDIM steps, at which share of its multiply-adds, and is "
        "that better than taking fewer steps? `against_fewer_steps` < 1: yes."
    ),
    passes=[
        *(
            PassLine(
                f"DeepCache, interval {n}, branch 1, deviates less than fewer steps at equal cost",
                lambda r, n=n: r.median(f"deepcache-n{n}-b1", "against_fewer_steps"),
                at_most=1.0,
            )
            for n in (2, 3, 5)
        ),
        *(
            PassLine(
                f"emoji of 64 px: DeepCache, interval {n}, branch 1, deviates less than fewer steps at equal cost",
                lambda r, n=n: r.median(f"emoji: deepcache-n{n}-b1", "against_fewer_steps"),
                at_most=1.0,
            )
            for n in (2, 3, 5)
        ),
        PassLine(
            "DeepCache: deviation grows from interval 2 to 10 (branch 1)",
            lambda r: r.median("deepcache-n10-b1", "deviation") / r.median("deepcache-n2-b1", "deviation"),
            at_least=1.0,
        ),
        PassLine(
            "DeepCache: a deeper branch deviates less (2 against 0, interval 5)",
            lambda r: r.median("deepcache-n5-b2", "deviation") / r.median("deepcache-n5-b0", "deviation"),
            at_most=1.0,
        ),
        PassLine(
            "Faster Diffusion: early keys deviate less than late ones",
            lambda r: r.median("faster-early-9", "deviation") / r.median("faster-late-9", "deviation"),
            at_most=1.0,
        ),
        PassLine(
            "Faster Diffusion: keeping the encoder deviates less than keeping the output",
            lambda r: r.median("faster-early-9", "deviation") / r.median("faster-output-9", "deviation"),
            at_most=1.0,
        ),
        PassLine(
            "Faster Diffusion, every second step: less than fewer steps at equal cost",
            lambda r: r.median("faster-uniform-20", "against_fewer_steps"),
            at_most=1.0,
        ),
        PassLine(
            "RAS at 50 %: less than fewer steps at equal cost",
            lambda r: r.median("ras-50", "against_fewer_steps"),
            at_most=1.0,
        ),
        PassLine(
            "RAS at 50 %: tokens chosen by score deviate less than random ones",
            lambda r: (
                min(r.median("ras-50", "deviation"), r.median("ras-50-high", "deviation"))
                / r.median("ras-50-random", "deviation")
            ),
            at_most=1.0,
        ),
        PassLine(
            "RAS at 50 %: kept keys and values deviate less than none",
            lambda r: r.median("ras-50", "deviation") / r.median("ras-50-no-cache", "deviation"),
            at_most=1.0,
        ),
    ],
)
def acceleration_deviation(budget: float) -> dict[str, Arm]:
    """Plans and fewer steps on the three models; a smaller budget trains less and compares fewer images."""
    train_steps, images = max(20, round(1500 * budget)), max(4, round(64 * budget))
    arms: dict[str, Arm] = {}
    for kind, plans in (("unet", UNET_PLANS), ("dit", DIT_PLANS), ("emoji", EMOJI_PLANS)):
        count = max(4, images // 4) if kind == "emoji" else images  # each has 16 times the pixels
        for name, plan in plans.items():
            prefix = "emoji: " if kind == "emoji" else ""  # of plans that other models have too
            arms[prefix + name] = partial(deviate, kind, plan, train_steps, count)
        for steps in FEWER:
            arms[f"{kind}-{steps}-steps"] = partial(fewer, kind, steps, train_steps, count)
    return arms
