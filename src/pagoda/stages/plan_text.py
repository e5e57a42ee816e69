"""A plan, and a plan beside what a run measured, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagoda.stages.plan_model import RunPlan, StagePlan, gib
from pagoda.stages.run_folder import BEFORE_SECONDS, RunFolder


def plan_text(plan: RunPlan) -> str:
    """The table of a plan, and its price."""
    gpu = plan.gpu
    rows = [["stage", "parameters", "trained", "M mult-adds/image", "images", "memory", "disk", "here", gpu.name]]
    rows += [_row(stage, plan) for stage in plan.stages]
    seconds, hours = plan.seconds, sum(map(plan.gpu_hours, plan.stages))
    here = "-" if seconds is None else duration(seconds)
    total = [gib(plan.memory_bytes), gib(plan.kept_bytes), here, duration(3600 * hours)]
    rows.append(["all", "", "", "", "", *total])
    measured = any(stage.memory_measured for stage in plan.stages)
    kind = "as a step of each stage that trains took it" if measured else "tensors alone, counted"
    spent = [
        f"{plan.images} images, {plan.base} -> {plan.size} {_unit(plan)}, on {plan.device}",
        "",
        *align(rows),
        "",
        f"memory: besides PyTorch itself, {kind}; {gib(plan.limits.memory_bytes)} are free.",
        f"disk: what stays; small copies of the images take {gib(plan.data_bytes)} more, and the largest checkpoints bring it to "
        f"{gib(plan.disk_bytes)} meanwhile; {gib(plan.limits.disk_bytes)} are free.",
        f"{gpu.name}: {_rates(plan)}. Not measured. {_room(plan)}",
        "",
        *_price(plan),
    ]
    return "\n".join(spent)


def _price(plan: RunPlan) -> list[str]:
    """What training at the target size would take, over what is planned."""
    gpu, price = plan.gpu, plan.price
    if price is None:
        return [
            "No price: the teacher is brought, so that no training of a diffusion model is planned to compare with."
        ]
    direct, unit = price.direct, "px" if plan.factor == 1 else "(side of latents)"
    return [
        f"A diffusion model of the same family trained at {plan.size} {unit} on as many images as `teach`:",
        f"  {direct.parameters / 1e6:.2f} M parameters, {direct.multiply_adds / 1e6:,.1f} M multiply-adds an image, "
        f"{gib(direct.memory_bytes)} of memory, "
        f"{'-' if direct.seconds is None else duration(direct.seconds)} here, "
        f"{duration(3600 * plan.gpu_hours(direct))} on {gpu.name}",
        f"  of one image, over the teacher's:  pixels {price.pixels:.1f} x   multiply-adds {price.multiply_adds:.2f} x   "
        f"measured time {_ratio(price.seconds)}",
        f"  of all, over all stages:           multiply-adds {price.total_multiply_adds:.2f} x   "
        f"measured time {_ratio(price.total_seconds)}",
    ]


def _rates(plan: RunPlan) -> str:
    """What the hours on the named GPU rest on: its rate in the run's precision, and in float32 where a stage stays in that."""
    gpu, precision = plan.gpu, plan.gpu_precision
    told = f"assumed at {plan.utilisation:.0%} of {gpu.teraflops(precision):g} TFLOP/s, its peak in {precision}"
    if precision == "bf16" and not gpu.has_bf16:
        told += " (that of float32: it has no units for bf16)"
    others = [stage.name for stage in plan.stages if plan.precision_on_gpu(stage) != precision]
    if others:
        told += f"; {', '.join(others)} at {plan.utilisation:.0%} of {gpu.teraflops('float32'):g}, in float32"
    return told


def _room(plan: RunPlan) -> str:
    """Whether the run has room in the memory of the named GPU, and which stages have not."""
    has = f"its {plan.gpu.memory_gib:g} GiB"
    if not plan.too_large:
        return f"All stages fit in {has}: the largest takes {gib(max(map(plan.gpu_bytes, plan.stages)))} there."
    needs = ", ".join(f"{stage.name} ({gib(plan.gpu_bytes(stage))})" for stage in plan.too_large)
    return f"DOES NOT FIT in {has}: {needs}."


def _row(stage: StagePlan, plan: RunPlan) -> list[str]:
    seconds = "-" if stage.seconds is None else duration(stage.seconds + stage.before_seconds)
    return [
        stage.name,
        f"{stage.parameters / 1e6:.2f} M",
        f"{stage.trained / 1e6:.2f} M",
        f"{stage.multiply_adds / 1e6:,.1f}",
        f"{stage.images:,}",
        gib(stage.memory_bytes),
        gib(stage.disk_bytes),
        seconds,
        duration(3600 * plan.gpu_hours(stage)),
    ]


def _unit(plan: RunPlan) -> str:
    if plan.factor == 1:
        return "px"
    return f"(latents of images of {plan.base * plan.factor} -> {plan.size * plan.factor} px)"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, to two or three digits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def compare_with_run(plan: RunPlan, run: RunFolder) -> list[dict[str, Any]]:
    """Estimate and record of each stage of a run that has finished, of the memory that it took, and of its artefacts on disk.

    Returns:
        Rows with `what`, `estimate`, `measured` (seconds or bytes) and `ratio`, their quotient; stages that are not done are left out,
        and so is the memory where it could not be told from what the process had held before. "preparation seconds" are those before the
        first steps, of the stages that have both a plan and a record of them: runs of older versions have none.
    """
    rows, names = [], [stage.name for stage in plan.stages]
    prepared: list[tuple[float, float]] = []
    for stage in plan.stages:
        record = run.record(stage.name)
        if record is None or not record["done"] or stage.seconds is None:
            continue
        results = record["results"]
        rows.append(_compared(f"{stage.name} seconds", stage.seconds, float(results["seconds"])))
        if stage.before_seconds > 0 and BEFORE_SECONDS in results:
            prepared.append((stage.before_seconds, float(results[BEFORE_SECONDS])))
    if rows:
        estimate, measured = (sum(row[key] for row in rows) for key in ("estimate", "measured"))
        rows.append(_compared("all seconds", estimate, measured))
    if prepared:
        rows.append(_compared("preparation seconds", *map(sum, zip(*prepared, strict=True))))
    memory = [
        record["results"].get("memory_mib", 0.0) for record in map(run.record, names) if record and record["done"]
    ]
    if any(memory):
        rows.append(_compared("memory bytes", plan.memory_bytes, 2**20 * max(memory)))
    folders = [run.images, run.path / "text", run.teacher, run.latents, run.encoder, run.teacher_pairs]
    folders += map(run.generator, run.generator_sizes())
    if (
        all(run.record(s.name) is None or run.is_done(s.name) for s in plan.stages)
        and run.generator(plan.size).is_dir()
    ):
        taken = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        rows.append(_compared("disk bytes", plan.kept_bytes, taken))
    return rows


def _compared(what: str, estimate: float, measured: float) -> dict[str, Any]:
    ratio = estimate / measured if measured else float("inf")
    return {"what": what, "estimate": estimate, "measured": measured, "ratio": ratio}


def comparison_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `compare_with_run`."""
    lines = [["", "estimate", "measured", "estimate / measured"]]
    for row in rows:
        show = gib if row["what"].endswith("bytes") else duration
        lines.append([row["what"], show(row["estimate"]), show(row["measured"]), f"{row['ratio']:.2f}"])
    return "\n".join(align(lines))
