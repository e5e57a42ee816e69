"""As many multiply-adds for every arm, by the number of steps: seconds would go by what else the machine does."""

from __future__ import annotations

from collections.abc import Callable

from pagoda.stages.config import RunConfig
from pagoda.stages.plan_hardware import Limits
from pagoda.stages.planning import plan_run

PLENTY = Limits(disk_bytes=1 << 50, memory_bytes=1 << 50)
"""For plans that only count."""
FEW, MANY = 100, 1100
"""Steps of the two plans that the work of all others lies on a straight line with."""


def work_by_stage(config: RunConfig) -> dict[str, int]:
    """Multiply-adds of each stage of a run, as `pagoda plan` counts them."""
    plan = plan_run(config, probe_seconds=0, limits=PLENTY)
    return {stage.name: stage.total_multiply_adds for stage in plan.stages}


def steps_for(target: int, work: Callable[[int], int]) -> int:
    """How many steps take `target` multiply-adds.

    Args:
        work: Multiply-adds of so many steps and of whatever belongs to them: a straight line.
    """
    first, second = work(FEW), work(MANY)
    return FEW + round((MANY - FEW) * (target - first) / (second - first))
