"""What bf16 saves on a CPU with hardware for it: seconds of every stage as a plan measures them, both precisions in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.stages.config import override
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config

ROUNDS = 3
SETS = {"tiny": (8, 32), "small": (16, 64)}
"""Of each preset: base and size."""


def measure(preset: str, budget: float, seed: int) -> dict[str, float]:
    """Minutes of each stage in float32 and in bf16, medians over rounds, and the ratio of all stages together."""
    base, size = SETS[preset]
    config = preset_config(preset, f"shapes:count=1637,seed={seed}", base=base, size=size)
    minutes: dict[str, dict[str, list[float]]] = {"float32": {}, "bf16": {}}
    for _ in range(ROUNDS):
        for precision, found in minutes.items():
            plan = plan_run(override(config, {"precision": precision, "device": "cpu"}), probe_seconds=4 * budget)
            for stage in plan.stages:
                assert stage.seconds is not None
                found.setdefault(stage.name, []).append(stage.seconds / 60)
    figures: dict[str, float] = {}
    for precision, found in minutes.items():
        figures |= {f"minutes_{stage}_{precision}": statistics.median(values) for stage, values in found.items()}
        figures[f"minutes_{precision}"] = statistics.median(map(sum, zip(*found.values(), strict=True)))
    return figures | {"ratio": figures["minutes_bf16"] / figures["minutes_float32"]}


def worst(preset: str) -> Callable[[Results], float]:
    """The largest share of the time of float32 over the repetitions."""
    return lambda r: r.max(preset, "ratio")


@benchmark(
    "mixed_precision",
    question=(
        "How much of the time in float32 do the stages of a run take in bf16, on a CPU with hardware for it? Planned minutes, timed "
        "step by step on this machine; the same settings in turn."
    ),
    passes=[
        PassLine("`small`, 16 -> 64 px: bf16 takes at most 0.8 of the time", worst("small"), at_most=0.8),
        PassLine("`tiny`, 8 -> 32 px: bf16 takes less time", worst("tiny"), at_most=1.0),
    ],
)
def mixed_precision(budget: float) -> dict[str, Arm]:
    """One arm a preset."""
    return {preset: partial(measure, preset, budget) for preset in SETS}
