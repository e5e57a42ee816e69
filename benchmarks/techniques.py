"""All techniques and four compositions on the same data, network, steps and metric."""

from __future__ import annotations

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.technique_runs import named, ratio

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


@benchmark(
    "techniques",
    question="What does each technique, and four compositions, do to a small DiT on few shapes at equal steps?",
    passes=[
        PassLine("repa: distance at most the plain run's (median of ratios)", ratio("repa"), at_most=1.0),
        PassLine("dtr: distance at most the plain run's", ratio("dtr"), at_most=1.0),
        PassLine("switch_dit: distance at most the plain run's", ratio("switch_dit"), at_most=1.0),
        PassLine("dit_moe: distance at most the plain run's", ratio("dit_moe"), at_most=1.0),
        PassLine("cep: distance at most the plain run's", ratio("cep"), at_most=1.0),
        PassLine("ddae_plus: distance at most 1.02 x the plain run's", ratio("ddae_plus"), at_most=1.02),
        PassLine("repa+cep: distance at most the plain run's", ratio("repa+cep"), at_most=1.0),
        PassLine("repa+dtr: distance at most the plain run's", ratio("repa+dtr"), at_most=1.0),
        PassLine("switch_dit+cep: distance at most the plain run's", ratio("switch_dit+cep"), at_most=1.0),
        PassLine(
            "repa+dit_moe+ddae_plus: distance at most the plain run's", ratio("repa+dit_moe+ddae_plus"), at_most=1.0
        ),
    ],
)
def techniques(budget: float) -> dict[str, Arm]:
    """Default options everywhere."""
    return named(ARMS, budget)
