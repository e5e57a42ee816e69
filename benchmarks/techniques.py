"""All techniques and four compositions on the same data, network, steps and metric: drawn shapes, Fashion-MNIST, emoji."""

from __future__ import annotations

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.technique_runs import named, ratio

SETS = ("shapes", "fashion", "emoji")
ARMS = {
    "plain": [],
    "repa": ["repa"],
    "dtr": ["dtr"],
    "switch_dit": ["switch_dit"],
    "dit_moe": ["dit_moe"],
    "cep": ["cep"],
    "ddae_plus": ["ddae_plus"],
    "repa+cep": ["repa", "cep"],
    "repa+dtr": ["repa", "dtr"],
    "switch_dit+cep": ["switch_dit", "cep"],
    "repa+dit_moe+ddae_plus": ["repa", "dit_moe", "ddae_plus"],
}


def lines(data: str) -> list[PassLine]:
    """Of every technique: no worse than the plain run of the same seed; self-conditioning may cost two per cent."""
    allowed = {name: 1.02 if name == "ddae_plus" else 1.0 for name in ARMS if name != "plain"}
    return [
        PassLine(
            f"{data}: {name}: distance at most {limit:g} x the plain run's (median of ratios)",
            ratio(f"{data}: {name}", below=f"{data}: plain"),
            at_most=limit,
        )
        for name, limit in allowed.items()
    ]


@benchmark(
    "techniques",
    question=(
        "What does each technique, and four compositions, do to a small DiT (16 px, 500 steps) on few images: 600 drawn shapes, 2,000 of "
        "Fashion-MNIST, 1,129 emoji? Distances are to held-out images in the features of a classifier that saw neither."
    ),
    passes=[line for data in SETS for line in lines(data)],
)
def techniques(budget: float) -> dict[str, Arm]:
    """Default options everywhere."""
    return named(ARMS, budget, data=SETS)
