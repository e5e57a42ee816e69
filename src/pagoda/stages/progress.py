"""How far a run is, from what its folder says: for whoever watches a training from outside of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.stages.report import stage_names
from pagoda.stages.report_cost import planned_steps
from pagoda.stages.report_curves import read_log
from pagoda.stages.run_folder import RunFolder

QUIET_FACTOR = 10.0
"""A training that has logged nothing for this many of its usual intervals (and a minute) is called quiet."""
WIN_RATE_LIMIT = 0.995
"""As `HealthGuard` has it."""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """How far a run is.

    Attributes:
        stages: Names of all stages, in order.
        done: Those that have finished.
        stage: The one under way, or None when all are done or none was begun.
        step: Last logged step of it; 0 before the first.
        steps: Steps that it was started for; None for one without steps.
        images_per_second: Last logged; None before that.
        seconds_left: Of this stage, at the pace so far; None when it is not known.
        seconds_since: Since the last line of the log was written; None without a log.
        warnings: What wants looking at.
    """

    stages: tuple[str, ...]
    done: tuple[str, ...]
    stage: str | None = None
    step: int = 0
    steps: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    seconds_since: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the stage under way, 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0


def read_progress(run: RunFolder, log: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> RunProgress:
    """Look at a run.

    Args:
        log: What `read_log` gives, when it is there already.

    Raises:
        ArtifactError: a record or the log is damaged.
        ConfigError: its configuration is not one of this version.
    """
    log = read_log(run.metrics) if log is None else log
    stages = tuple(stage_names(run.config()))
    records = {stage: run.record(stage) for stage in stages}
    done = tuple(stage for stage, record in records.items() if record is not None and record["done"])
    since = max(0.0, time.time() - run.metrics.stat().st_mtime) if run.metrics.is_file() else None
    begun = [stage for stage, record in records.items() if record is not None and not record["done"]]
    if not begun:
        return RunProgress(stages=stages, done=done, seconds_since=since)
    stage = begun[-1]
    lines = [line for line in log.get(stage, []) if line["step"] > 0]
    steps = planned_steps(stage, records[stage])
    timed = [line for line in lines if "seconds" in line]
    step = int(lines[-1]["step"]) if lines else 0
    left = None
    if timed and steps:
        left = timed[-1]["seconds"] / timed[-1]["step"] * max(0, steps - int(timed[-1]["step"]))
    return RunProgress(
        stages=stages,
        done=done,
        stage=stage,
        step=step,
        steps=steps,
        images_per_second=timed[-1].get("images_per_second") if timed else None,
        seconds_left=left,
        seconds_since=since,
        warnings=tuple(_warnings(lines, timed, since)),
    )


def _warnings(lines: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]], since: float | None) -> list[str]:
    """What wants looking at in the last tenth of the log, at least ten lines."""
    found = []
    recent = lines[-max(10, len(lines) // 10) :]
    broken = [
        (name, line["step"])
        for line in recent
        for name, value in line.items()
        if name.endswith(("/loss", "/gradient_norm")) and not math.isfinite(float(value))
    ]
    if broken:
        name, step = broken[-1]
        found.append(f"{name} was not finite at step {step}: such steps are skipped; several in a row stop the run.")
    for name in sorted({name for line in recent for name in line if name.endswith("/win_rate")}):
        rates = [float(line[name]) for line in recent if name in line]
        if len(rates) >= 10 and sum(rates) / len(rates) > WIN_RATE_LIMIT:
            found.append("the discriminator has won: the generator learns little from it now.")
    if len(timed) > 1 and since is not None:
        pause = (timed[-1]["seconds"] - timed[0]["seconds"]) / (len(timed) - 1)
        if since > max(60.0, QUIET_FACTOR * pause):
            found.append("nothing was logged for a while: the training has been stopped, or is evaluating itself.")
    return found
