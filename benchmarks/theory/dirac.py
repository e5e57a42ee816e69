"""Stability: the smallest game of a generator and a discriminator, in closed form and simulated.

Dirac-GAN (Mescheder et al. 2018, arXiv:1801.04406): data at 0, the generator puts a point at theta, the discriminator is psi x,
and both play f(theta psi) with f(t) = -ln(1 + exp(-t)). A reconstruction term adds l theta^2 / 2 to what the generator descends.
At the equilibrium

    J = [[-l, -1/2], [1/2, 0]],   eigenvalues (-l +- sqrt(l^2 - 1)) / 2

so that without the term nothing damps the rotation, and steps of any length spiral outwards. With several directions the game
adds a skew-symmetric block, and reconstruction -H to the generator's: what H does not touch stays undamped. The arm `untouched`
has a second direction like that.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, on the stability of L_rec + L_adv; restated here.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.training import seeded_generator

WEIGHTS = (0.0, 0.05, 0.2, 1.0)
"""l: weight of the reconstruction."""
STEP, STEPS = 0.1, 2_000
NEAR = 1e-3
"""Distance at which the linearisation is measured."""


def simulate(H: Tensor, theta: Tensor, psi: Tensor, steps: int) -> Tensor:
    """Simultaneous gradient steps of the whole, non-linear game: theta and psi of each direction after each step, (steps + 1, 2, d).

    Args:
        H: (d,) curvature of the reconstruction in each direction.
        theta, psi: (d,) where generator and discriminator start; f sees their product, theta . psi.
    """
    states = [torch.stack([theta, psi])]
    for _ in range(steps):
        slope = torch.sigmoid(-(theta * psi).sum())  # f'
        theta, psi = theta - STEP * (slope * psi + H * theta), psi + STEP * slope * theta
        states.append(torch.stack([theta, psi]))
    return torch.stack(states)


def rate(states: Tensor) -> float:
    """ln of the larger |eigenvalue| of the matrix that carries one state to the next, by least squares over (steps + 1, 2) states."""
    scale = states[:-1].norm(dim=1, keepdim=True)
    carried = torch.linalg.lstsq(states[:-1] / scale, states[1:] / scale).solution
    return float(torch.linalg.eigvals(carried).abs().max().log())


def closed_rate(weight: float) -> float:
    """ln of the larger |1 + h lambda| over the two eigenvalues of J."""
    root = complex(weight**2 - 1) ** 0.5
    return max(math.log(abs(1 + STEP * (-weight + sign * root) / 2)) for sign in (1, -1))


def _start(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """A start at distance 1 from the equilibrium in each direction, at a random angle."""
    angle = 2 * math.pi * torch.rand(count, generator=seeded_generator("dirac", seed), dtype=torch.float64)
    return angle.cos(), angle.sin()


def _single(weight: float, steps: int, seed: int) -> dict[str, float]:
    H, (theta, psi) = torch.tensor([weight], dtype=torch.float64), _start(seed, 1)
    end = simulate(H, theta, psi, steps)[-1, :, 0]
    near = simulate(H, NEAR * theta, NEAR * psi, 200)[:, :, 0]
    return {"distance": float(end.norm()), "rate": rate(near), "closed_rate": closed_rate(weight)}


def _untouched(steps: int, seed: int) -> dict[str, float]:
    H, (theta, psi) = torch.tensor([0.2, 0.0], dtype=torch.float64), _start(seed, 2)
    states = simulate(
        H, 0.05 * theta, 0.05 * psi, steps
    )  # near the equilibrium, where directions do not disturb each other
    touched, untouched = (states[-1, :, k].norm() / 0.05 for k in (0, 1))
    near = simulate(H, NEAR * theta, NEAR * psi, 200)[:, :, 0]
    figures = {"distance": float(touched), "rate": rate(near), "closed_rate": closed_rate(0.2)}
    return {**figures, "distance_untouched": float(untouched)}


def name(weight: float) -> str:
    """Of an arm."""
    return f"l = {weight:g}"


def monotone(r: Results) -> float:
    """The largest ratio of the distance at one weight and at the next smaller one, over seeds."""
    pairs = zip(WEIGHTS[1:], WEIGHTS[:-1], strict=True)
    return max(
        a / b
        for more, less in pairs
        for a, b in zip(r.values(name(more), "distance"), r.values(name(less), "distance"), strict=True)
    )


def rate_error(r: Results) -> float:
    """The largest relative difference of simulated and closed rates."""
    arms = [name(weight) for weight in WEIGHTS]
    return max(
        abs(a / b - 1) for arm in arms for a, b in zip(r.values(arm, "rate"), r.values(arm, "closed_rate"), strict=True)
    )


@benchmark(
    "theory.dirac",
    question=(
        "Does a reconstruction term make the game of generator and discriminator converge? Distance from the equilibrium after 2,000 "
        "simultaneous steps from distance 1, and ln of its change a step, simulated and in closed form."
    ),
    passes=[
        PassLine("without reconstruction it does not converge", lambda r: r.min(name(0.0), "distance"), at_least=1.0),
        PassLine("with it, it does (largest distance, l = 0.05)", lambda r: r.max(name(0.05), "distance"), at_most=0.2),
        PassLine("the more, the nearer (largest ratio of neighbouring weights)", monotone, at_most=0.5),
        PassLine("simulated rates are those of the eigenvalues (relative error)", rate_error, at_most=0.05),
        PassLine(
            "a direction without it stays undamped", lambda r: r.min("untouched", "distance_untouched"), at_least=1.0
        ),
        PassLine("beside one with it that converges", lambda r: r.max("untouched", "distance"), at_most=0.01),
    ],
)
def dirac_gan(budget: float) -> dict[str, Arm]:
    """One arm a weight, and one with a direction that the reconstruction does not see."""
    steps = max(200, round(STEPS * budget))
    arms: dict[str, Arm] = {name(weight): partial(_single, weight, steps) for weight in WEIGHTS}
    return arms | {"untouched": partial(_untouched, steps)}
