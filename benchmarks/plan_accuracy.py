"""How near `pagoda plan` comes to what a run of the same configuration then measures, on the same machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.stages.config import override
from pagoda.stages.plan_text import compare_with_run
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.stages.train import train


def measure(seed: int, *, base: int, size: int, preset: str, budget: float) -> dict[str, float]:
    """Estimate over measurement: seconds of each stage and of all, bytes on disk."""
    config = preset_config(preset, f"shapes:count=2000,seed={seed}", base=base, size=size)
    steps = {"teach.loop.steps": 400, "distill.loop.steps": 200, "distill.teacher_pairs.count": 1000}
    changes: dict[str, object] = {name: max(20, round(budget * value)) for name, value in steps.items()}
    changes |= {"grow.steps": [max(20, round(budget * 100))], "seed": seed}
    config = override(config, changes)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_run(config, folder=folder)
        run = train(config, str(Path(folder) / "run"), quiet=True)
        rows = compare_with_run(plan, run)
    return {row["what"]: row["ratio"] for row in rows}


@benchmark(
    "plan_accuracy",
    question="Does a plan tell before the first step what a run then takes?",
    passes=[
        PassLine(f"{arm}: {what} within {share:.0%}, {side}", value, **bound)  # type: ignore[arg-type]
        for arm in ("tiny 8 -> 32 px", "small 16 -> 32 px")
        for what, share in (("all seconds", 0.25), ("disk bytes", 0.05))
        for side, value, bound in (
            ("not above", lambda r, a=arm, w=what: r.median(a, w), {"at_most": 1 + share}),
            ("not below", lambda r, a=arm, w=what: r.median(a, w), {"at_least": 1 - share}),
        )
    ],
)
def plan_accuracy(budget: float) -> dict[str, Arm]:
    """Two presets: one without, one with an adversarial term."""
    return {
        "tiny 8 -> 32 px": lambda seed: measure(seed, base=8, size=32, preset="tiny", budget=budget),
        "small 16 -> 32 px": lambda seed: measure(seed, base=16, size=32, preset="small", budget=budget),
    }
