"""Where do plans beat fewer steps? The U-Net of `acceleration_deviation` on drawn shapes, at weights of guidance from none to strong."""

from __future__ import annotations

from functools import cache, partial

from torch import Tensor

import pagoda
from benchmarks.acceleration_deviation import FEWER, STEPS, UNET_PLANS, draw, interpolated, teacher
from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.diffusion import GuidedDenoiser

WEIGHTS = (1.0, 3.0, 5.0, 8.0)
PLANS = tuple(f"deepcache-n{n}-b{b}" for b in (0, 1) for n in (2, 3, 5))


@cache
def guided(weight: float, train_steps: int) -> GuidedDenoiser:
    """The teacher of `acceleration_deviation` under another weight."""
    held = teacher("unet", train_steps)
    assert isinstance(held, GuidedDenoiser)
    return GuidedDenoiser(held.inner, weight)


@cache
def curve(weight: float, train_steps: int, seed: int, images: int) -> tuple[Tensor, tuple[tuple[float, float], ...]]:
    """The full run, and (cost, deviation) of the plain sampler with fewer steps."""
    denoiser = guided(weight, train_steps)
    full = draw("unet", denoiser, STEPS, seed, images)
    found = [(n / STEPS, draw("unet", denoiser, n, seed, images)) for n in FEWER]
    return full, tuple((cost, float((x - full).norm() / full.norm())) for cost, x in found)


def deviate(weight: float, train_steps: int, images: int, seed: int) -> dict[str, float]:
    """Every plan at one weight: its deviation, and that over the deviation of fewer steps at the same cost."""
    denoiser = guided(weight, train_steps)
    full, fewer = curve(weight, train_steps, seed, images)
    figures = {"half_of_the_steps": dict(fewer)[0.5]}
    for name in PLANS:
        with pagoda.accelerate(denoiser, UNET_PLANS[name]) as run:
            found = draw("unet", denoiser, STEPS, seed, images)
        deviation = float((found - full).norm() / full.norm())
        at_cost = interpolated(fewer, 1 - run.ledgers[0].facts()["multiply_adds_saved"])
        figures |= {f"{name}_deviation": deviation, f"{name}_against_fewer_steps": deviation / at_cost}
    return figures


@benchmark(
    "acceleration_region",
    question=(
        "At which weight of guidance does DeepCache deviate less from the full run of 40 DDIM steps than fewer steps at equal cost? "
        "`against_fewer_steps` < 1: there."
    ),
    passes=[
        PassLine(
            f"guidance {weight:g}: the best of six settings deviates less than fewer steps at equal cost",
            lambda r, weight=weight: min(r.median(f"w{weight:g}", f"{name}_against_fewer_steps") for name in PLANS),
            at_most=1.0,
        )
        for weight in WEIGHTS
    ],
)
def acceleration_region(budget: float) -> dict[str, Arm]:
    """One arm a weight; a smaller budget trains less and compares fewer images."""
    train_steps, images = max(20, round(1500 * budget)), max(4, round(32 * budget))
    return {f"w{weight:g}": partial(deviate, weight, train_steps, images) for weight in WEIGHTS}
