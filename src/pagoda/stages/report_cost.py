"""What a run took, stage by stage, beside what its plan and its first steps foretold."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.evaluation.page import table
from pagoda.stages.config import RunConfig
from pagoda.stages.kept_plan import changed_since, kept_plan
from pagoda.stages.plan_model import gib
from pagoda.stages.plan_text import duration
from pagoda.stages.report_curves import throughput
from pagoda.stages.report_parts import results_of
from pagoda.stages.run_folder import RunFolder
from pagoda.training import clock

_SHOWN_CHANGES = 4


def cost_table(
    run: RunFolder,
    config: RunConfig,
    stages: Sequence[str],
    records: Mapping[str, Mapping[str, Any] | None],
    log: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Cost planned, promised and measured.

    Raises:
        ArtifactError: the plan in the folder is damaged.
    """
    kept = kept_plan(run)
    planned = {} if kept is None else {str(stage["name"]): stage for stage in kept["plan"]["stages"]}
    rows, promised_all, taken_all = [], 0.0, 0.0
    compared: list[tuple[float, float]] = []
    peak = 0.0
    for stage in [*stages, *(name for name in planned if name not in stages)]:
        record, lines = records.get(stage), log.get(stage, [])
        found = results_of(record)
        state = "not started" if record is None else "done" if record["done"] else "under way"
        timed = [line for line in lines if "seconds" in line and line["step"] > 0]
        steps = found.get("steps") or planned_steps(stage, record)
        promised = timed[0]["seconds"] / timed[0]["step"] * steps if timed and steps else None
        taken = found.get("seconds") or (timed[-1]["seconds"] if timed else None)
        if promised is not None and taken is not None and state == "done":
            promised_all, taken_all = promised_all + promised, taken_all + taken
        rates = sorted(line["images_per_second"] for line in lines if "images_per_second" in line)
        memory = [line["memory_mib"] for line in lines if "memory_mib" in line]
        peak = max([peak, *memory])
        foreseen = planned.get(stage)
        seconds = None if foreseen is None else foreseen["seconds"]
        if seconds is not None and taken is not None and state == "done":
            compared.append((seconds, taken))
        cells = [
            html.escape(stage),
            f'<span class="state {state.split()[0]}">{state}</span>' if stage in stages else "",
            "" if steps is None else f"{steps:,}",
            *([] if kept is None else ["" if seconds is None else duration(seconds)]),
            "" if promised is None else clock(promised),
            "" if taken is None else clock(taken),
            *(
                []
                if kept is None
                else ["" if seconds is None or not taken or state != "done" else f"{taken / seconds:.2f}"]
            ),
            f"{rates[len(rates) // 2]:.0f}" if rates else "",
            *([] if foreseen is None else [f"{foreseen['memory_bytes'] / 2**20:.0f}"]),
            *([""] if kept is not None and foreseen is None else []),
            f"{max(memory):.0f}" if memory else "",
        ]
        rows.append(cells)
    heads = ["stage", "", ">~steps", ">~promised", ">taken", ">~images/s", ">~MiB"]
    if kept is not None:
        heads = ["stage", "", ">~steps", ">planned", ">~promised", ">taken", ">~taken / planned", ">~images/s"]
        heads += [">~MiB planned", ">~MiB"]
    disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    notes = [f"The folder takes {disk / 2**20:,.0f} MiB."]
    if taken_all:
        told = f"Stages that log steps: promised {clock(promised_all)}, taken {clock(taken_all)}."
        notes.insert(0, told)
    notes += _of_plan(run, config, kept, compared, disk, peak)
    shown = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f'<div class="card">{table(heads, rows)}{shown}</div>{throughput(log, stages)}'


def _of_plan(
    run: RunFolder,
    config: RunConfig,
    kept: Mapping[str, Any] | None,
    compared: Sequence[tuple[float, float]],
    disk: int,
    peak: float,
) -> list[str]:
    """Sentences on the plan as a whole."""
    if kept is None:
        return [
            f"No plan is kept in this folder; pagoda plan --run {run.path} makes one and puts it beside these figures."
        ]
    plan, notes = kept["plan"], []
    total, price = plan["total"], plan["price"]
    if compared:
        before, after = (sum(column) for column in zip(*compared, strict=True))
        notes.append(
            f"Plan over measurement, stages that are done: {duration(before)} planned, {duration(after)} taken, "
            f"{after / before:.2f} times the plan."
        )
    elif total["seconds"] is None:
        notes.append("The plan timed nothing: it counted only.")
    notes.append(
        f"Planned at most {gib(total['memory_bytes'])} of memory besides PyTorch itself"
        + (f"; the process held {peak / 1024:.2f} GiB with it" if peak else "")
        + f". Planned {gib(total['kept_bytes'])} of disk in the end; {gib(disk)} are taken, pictures, logs and checkpoints among them."
    )
    instead = ""
    if price is not None:  # there is none where the teacher is brought
        times = f"{price['total_multiply_adds']:.2f} times the multiply-adds of all stages"
        instead = f"; a diffusion model of {plan['size']} px would take {times}"
    precision = plan.get("gpu_precision", "16-bit floats")  # which plans that do not say rested on
    notes.append(
        f"Planned {total['multiply_adds']:.3g} multiply-adds, {total['gpu_hours']:.3g} hours of {plan['gpu']['name']} at "
        f"{plan['utilisation']:.0%} of its peak in {precision}{instead}. Planned on {plan['device']}."
    )
    if kept["done"]:
        notes.append(f"The plan was made when {', '.join(kept['done'])} had been done: there it foretold nothing.")
    changes = changed_since(kept["config"], config)
    if changes:
        more = len(changes) - _SHOWN_CHANGES
        notes.append(
            f"The plan was made for other settings: {'; '.join(changes[:_SHOWN_CHANGES])}"
            + (f"; and {more} more." if more > 0 else ".")
        )
    return notes


def planned_steps(stage: str, record: Mapping[str, Any] | None) -> int | None:
    """Steps that a stage was started for; None for one without steps."""
    settings = (record or {}).get("settings", {}).get(stage.partition("-")[0], {})
    steps = settings.get("steps") or settings.get("loop", {}).get("steps")
    return steps if isinstance(steps, int) else None
