"""How near `pagoda plan` comes to what a run of the same configuration then measures, on the same machine.

The run has a process of its own, as `pagoda train` has: memory is what that process took beyond what it held before.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.metrics import measure_command
from pagoda.stages.config import RunConfig, override
from pagoda.stages.plan_text import compare_with_run
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder

RUNS = {"tiny 8 -> 32 px": ("tiny", 8, 32), "small 16 -> 32 px": ("small", 16, 32)}
"""Preset, base and size of each arm: one without, one with an adversarial term."""
WITHIN = {"all seconds": 0.25, "memory bytes": 0.25, "disk bytes": 0.05}
STAGE_WITHIN = 0.25
"""Of the seconds of each stage."""


def config_of(seed: int, *, preset: str, base: int, size: int, budget: float) -> RunConfig:
    """A shortened run of a preset."""
    config = preset_config(preset, f"shapes:count=2000,seed={seed}", base=base, size=size)
    steps = {"teach.loop.steps": 400, "distill.loop.steps": 200, "distill.teacher_pairs.count": 1000}
    changes: dict[str, object] = {name: max(20, round(budget * value)) for name, value in steps.items()}
    return override(config, changes | {"grow.steps": [max(20, round(budget * 100))], "seed": seed})


def stages_of(config: RunConfig) -> list[str]:
    """What a plan has a row of: both presets learn the teacher's pairs."""
    return ["teach", "encode", "teacher-pairs", "distill", *(f"grow-{size}" for size in config.growth)]


def measure(seed: int, *, preset: str, base: int, size: int, budget: float) -> dict[str, float]:
    """Estimate over measurement: seconds of each stage and of all, those before the first steps of octaves, memory, bytes on disk."""
    config = config_of(seed, preset=preset, base=base, size=size, budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_run(config, folder=folder)
        run = RunFolder.create(Path(folder) / "run", config)
        command = [sys.executable, "-m", "pagoda.cli.main", "grow", str(run.path), "--quiet"]
        measure_command(command, log=Path(folder) / "run.log")
        rows = compare_with_run(plan, run)
    return {row["what"]: row["ratio"] for row in rows}


def lines() -> Iterator[PassLine]:
    """Each figure of each arm, from both sides, and of the seeds the one that is furthest off: a median would hide a bad one."""
    for arm, (preset, base, size) in RUNS.items():
        config = config_of(0, preset=preset, base=base, size=size, budget=1.0)
        shares = {**{f"{stage} seconds": STAGE_WITHIN for stage in stages_of(config)}, **WITHIN}
        for what, share in shares.items():
            text = f"{arm}: {what} within {share:.0%}"
            yield PassLine(f"{text} on every seed, not above", lambda r, a=arm, w=what: r.max(a, w), at_most=1 + share)  # type: ignore[misc]
            yield PassLine(f"{text} on every seed, not below", lambda r, a=arm, w=what: r.min(a, w), at_least=1 - share)  # type: ignore[misc]


@benchmark(
    "plan_accuracy",
    question="Does a plan tell before the first step what a run then takes?",
    passes=list(lines()),
)
def plan_accuracy(budget: float) -> dict[str, Arm]:
    """Two presets: one without, one with an adversarial term."""

    def arm(preset: str, base: int, size: int) -> Arm:
        return lambda seed: measure(seed, preset=preset, base=base, size=size, budget=budget)

    return {name: arm(*of) for name, of in RUNS.items()}
