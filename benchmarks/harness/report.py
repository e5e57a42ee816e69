"""The Markdown page of a result: a table of arms and metrics, the pass lines, and where it all came from."""

from __future__ import annotations

import statistics
from typing import Any


def render(record: dict[str, Any]) -> str:
    """The page of one result file; the same record always gives the same text."""
    parts = [f"# {record['name']}", record["question"], *_warnings(record), _table(record)]
    if record["passes"]:
        parts += ["## Pass lines", _pass_lines(record)]
    parts += ["## Made by", _origin(record)]
    return "\n\n".join(parts) + "\n"


def number(value: float) -> str:
    """Four significant digits, without an exponent where the number is of everyday size."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = f"{value:.4g}"
        return f"{float(digits):,.0f}" if "e" in digits or abs(value) >= 1000 else digits
    return f"{value:.3e}"


_SMALLEST_RESULT = 0.5
"""Share of the budget below which a page says that it is a trial."""


def _warnings(record: dict[str, Any]) -> list[str]:
    warnings = []
    if not record["complete"]:
        warnings.append("**Unfinished:** some arms have not run for every seed; the pass lines are not judged yet.")
    if _SMALLEST_RESULT <= record["budget"] < 1:
        warnings.append(
            f"**At {record['budget']:g} of the full budget:** steps and counts are that share of the benchmark's own."
        )
    elif record["budget"] < 1:
        warnings.append(f"**Not a result:** run at {record['budget']:g} of the full budget.")
    if record["commit"]["dirty"]:
        warnings.append("**Working tree:** the code differed from the commit named below.")
    return warnings


def _table(record: dict[str, Any]) -> str:
    metrics: list[str] = []  # columns, in the order in which arms first name them
    for rows in record["arms"].values():
        for row in rows:
            metrics += [name for name in row["metrics"] if name not in metrics]
    lines = ["| arm | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for arm, rows in record["arms"].items():
        cells = [_cell([row["metrics"][name] for row in rows if name in row["metrics"]]) for name in metrics]
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in [arm, *cells]) + "|")
    seeds = len(record["seeds"])
    note = f"Median [min, max] over {seeds} seeds." if seeds > 1 else "One seed."
    return "\n".join(lines) + f"\n\n{note}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    if min(values) == max(values):
        return number(values[0])
    return f"{number(statistics.median(values))} [{number(min(values))}, {number(max(values))}]"


def _pass_lines(record: dict[str, Any]) -> str:
    lines = ["| | line | asked | measured |", "|---|---|---:|---:|"]
    for line in record["passes"]:
        mark = {True: "✓", False: "✗", None: "…"}[line["holds"]]
        bounds = [f"≥ {number(line['at_least'])}"] if line["at_least"] is not None else []
        bounds += [f"≤ {number(line['at_most'])}"] if line["at_most"] is not None else []
        missing = "not yet" if line["holds"] is None else line.get("error", "not finite")
        measured = missing if line["value"] is None else number(line["value"])
        lines.append(f"| {mark} | {line['text']} | {' and '.join(bounds)} | {measured} |")
    return "\n".join(lines)


def _origin(record: dict[str, Any]) -> str:
    machine, commit = record["machine"], record["commit"]
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] is not None else ""
    accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    tree = " with changes" if commit["dirty"] else ""
    return "\n".join(
        [
            f"- command: `{record['command']}`",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads{memory}"
            f"{accelerator}, {machine['system']}",
            f"- versions: {versions}",
            f"- commit: {commit['hash'] or 'none'}{tree}, code {record['code']}",
            f"- date: {record['date']}, {number(record['wall_s'])} s in the arms",
        ]
    )
