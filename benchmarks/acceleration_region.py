"""Where do plans beat fewer steps? The models of `acceleration_deviation`, at weights of guidance from none to strong."""

from __future__ import annotations

from functools import cache, partial

from torch import Tensor

import pagoda
from benchmarks.acceleration_deviation import (
    DIT_PLANS,
    EMOJI_PLANS,
    STEPS,
    UNET_PLANS,
    draw,
    interpolated,
    teacher,
)
from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.acceleration import Plan
from pagoda.diffusion import GuidedDenoiser

WEIGHTS = {"unet": (1.0, 3.0, 5.0, 8.0), "dit": (1.0, 5.0, 8.0), "emoji": (1.0, 5.0)}
IMAGES = {"unet": 32, "dit": 32, "emoji": 8}
FEWER = (33, 24, 20, 16, 13, 10)
"""Steps of the plain sampler, around the costs of all plans."""
PLANS: dict[str, dict[str, Plan]] = {
    "unet": {name: UNET_PLANS[name] for name in (f"deepcache-n{n}-b{b}" for b in (0, 1) for n in (2, 3, 5))},
    "dit": {name: DIT_PLANS[name] for name in ("ras-75", "ras-50", "ras-25", "faster-dit-2", "faster-dit-3")},
    "emoji": {name: EMOJI_PLANS[name] for name in ("deepcache-n2-b0", "deepcache-n3-b0", "deepcache-n3-b1", "deepcache-n5-b3")},
}  # fmt: skip


@cache
def guided(kind: str, weight: float, train_steps: int) -> GuidedDenoiser:
    """A teacher of `acceleration_deviation` under another weight."""
    held = teacher(kind, train_steps)
    assert isinstance(held, GuidedDenoiser)
    return GuidedDenoiser(held.inner, weight)


@cache
def curve(
    kind: str, weight: float, train_steps: int, seed: int, images: int
) -> tuple[Tensor, tuple[tuple[float, float], ...]]:
    """The full run, and (cost, deviation) of the plain sampler with fewer steps."""
    denoiser = guided(kind, weight, train_steps)
    full = draw(kind, denoiser, STEPS, seed, images)
    found = [(n / STEPS, draw(kind, denoiser, n, seed, images)) for n in FEWER]
    return full, tuple((cost, float((x - full).norm() / full.norm())) for cost, x in found)


def deviate(kind: str, weight: float, train_steps: int, images: int, seed: int) -> dict[str, float]:
    """Every plan at one weight: its deviation, and that over the deviation of fewer steps at the same cost."""
    denoiser = guided(kind, weight, train_steps)
    full, fewer = curve(kind, weight, train_steps, seed, images)
    figures = {"half_of_the_steps": dict(fewer)[0.5]}
    for name, plan in PLANS[kind].items():
        with pagoda.accelerate(denoiser, plan) as run:
            found = draw(kind, denoiser, STEPS, seed, images)
        deviation = float((found - full).norm() / full.norm())
        at_cost = interpolated(fewer, 1 - run.ledgers[0].facts()["multiply_adds_saved"])
        figures |= {f"{name}_deviation": deviation, f"{name}_against_fewer_steps": deviation / at_cost}
    return figures


@benchmark(
    "acceleration_region",
    question=(
        "At which weight of guidance do plans deviate less from the full run of 40 DDIM steps than fewer steps at equal cost? "
        "`against_fewer_steps` < 1: there. A U-Net and a DiT on drawn shapes of 16 px, a U-Net on emoji of 64 px."
    ),
    passes=[
        PassLine(
            f"{kind}, guidance {weight:g}: the best of {len(PLANS[kind])} plans deviates less than fewer steps at equal cost",
            lambda r, kind=kind, weight=weight: min(
                r.median(f"{kind} w{weight:g}", f"{name}_against_fewer_steps") for name in PLANS[kind]
            ),
            at_most=1.0,
        )
        for kind, weights in WEIGHTS.items()
        for weight in weights
    ],
)
def acceleration_region(budget: float) -> dict[str, Arm]:
    """One arm a model and weight; a smaller budget trains less and compares fewer images."""
    train_steps = max(20, round(1500 * budget))
    return {
        f"{kind} w{weight:g}": partial(deviate, kind, weight, train_steps, max(4, round(IMAGES[kind] * budget)))
        for kind, weights in WEIGHTS.items()
        for weight in weights
    }
