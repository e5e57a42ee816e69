"""The curves of a report: what `metrics.jsonl` holds, a card for each kind of figure of each stage."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError
from pagoda.evaluation.charts import Line, legend, line_chart
from pagoda.evaluation.page import card

_NAMES = {
    "reconstruction": "reconstruction",
    "feature": "feature distance",
    "denoising": "denoising",
    "win_rate": "win rate of the discriminator",
    "matching": "how far samples are pulled",
}
_HIDDEN = ("seconds", "memory_mib", "images_per_second", "step")


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of `metrics.jsonl` by stage, in the order of steps. A last line that is still being written is left out.

    Raises:
        ArtifactError: a line in the middle cannot be read.
    """
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                continue
            raise ArtifactError(f"line {number} of {path} cannot be read ({error}). Remove that line.") from error
        found.setdefault(str(entry["stage"]), []).append(entry)
    return {stage: sorted(entries, key=lambda entry: entry["step"]) for stage, entries in found.items()}


def curves(log: Mapping[str, Sequence[Mapping[str, Any]]], stages: Sequence[str]) -> str:
    """Cards for every stage that has logged steps."""
    parts = []
    for stage in stages:
        entries = [entry for entry in log.get(stage, []) if entry["step"] > 0]
        cards = _stage_cards(entries)
        if cards:
            parts.append(f'<h3>{html.escape(stage)}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _stage_cards(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in _HIDDEN))
    groups: dict[str, list[str]] = {
        "Losses": [
            n for n in names if n.split("/")[-1] in ("loss", "reconstruction", "feature", "denoising") and "/" in n
        ],
        "Discriminator": [n for n in names if n.endswith("/win_rate")],
        "Distribution matching": [n for n in names if n.endswith("/matching")],
        "Gradient norms": [n for n in names if n.endswith("/gradient_norm")],
    }
    groups["Losses"] = [n for n in groups["Losses"] if not n.startswith(("evaluation/", "validation/"))]
    groups["Losses"] = _without_twins(groups["Losses"], entries)
    cards = [_card(title, chosen, entries, log=title != "Discriminator") for title, chosen in groups.items() if chosen]
    scores = [n for n in names if n.startswith("evaluation/") and not n.endswith(" real")]
    for name in scores:
        pair = [name, *([f"{name} real"] if f"{name} real" in names else [])]
        cards.insert(0, _card(name.removeprefix("evaluation/"), pair, entries, log=False))
    validation = [n for n in names if n.startswith("validation/")]
    if validation:
        cards.insert(len(scores), _card("Validation loss by noise level", validation, entries, log=True))
    # teacher/<technique>/<figure>: alignment, loads of experts, ...
    figures = [n for n in names if n.count("/") == 2 and not n.startswith(("evaluation/", "validation/"))]
    for technique in dict.fromkeys(n.split("/")[1] for n in figures):
        chosen = [n for n in figures if n.split("/")[1] == technique]
        cards.append(_card(f"Technique {technique}", chosen, entries, log=False))
    return cards


def throughput(log: Mapping[str, Sequence[Mapping[str, Any]]], stages: Sequence[str]) -> str:
    """One card: images a second of each stage over its own progress, so that stages of any length share an axis."""
    lines: list[Line] = []
    for stage in stages:
        entries = [entry for entry in log.get(stage, []) if "images_per_second" in entry and entry["step"] > 0]
        if entries:
            points = [(100 * e["step"] / entries[-1]["step"], float(e["images_per_second"])) for e in entries]
            lines.append(Line(stage, points, style=len(lines) % 6))
    if not lines:
        return ""
    chart = line_chart(lines, label="images a second", x_label="% of the stage", log=False)
    return f'<div class="half" style="margin-top:1rem">{card("Images a second", legend(lines) + chart)}</div>'


def _without_twins(names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A loss of one term is logged twice, as the loss and as its term: one line is enough."""
    kept: list[str] = []
    for name in sorted(names, key=lambda n: not n.endswith("/loss")):
        values = [entry.get(name) for entry in entries]
        if not any([entry.get(other) for entry in entries] == values for other in kept):
            kept.append(name)
    return kept


def _card(title: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]], *, log: bool) -> str:
    lines: list[Line] = []
    for index, name in enumerate(names):
        points = [(float(e["step"]), float(e[name])) for e in entries if name in e and math.isfinite(float(e[name]))]
        real = name.endswith(" real")
        lines.append(Line("real images" if real else _told(name), points, style=5 if real else index % 6, flat=real))
    log = log and all(y > 0 for line in lines for _, y in line.points)
    shown = legend(lines) if len(lines) > 1 else ""
    return card(title, shown + line_chart(lines, label=f"{title} by step", x_label="step", log=log))


def _told(name: str) -> str:
    who, _, what = name.rpartition("/")
    if who in ("evaluation", "validation") or not who:
        return what.replace("_", " ")
    return f"{who} {_NAMES.get(what, what.replace('_', ' '))}"
