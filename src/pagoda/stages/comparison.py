"""Scores of runs as text: those of one run, and `compare`, several runs side by side with what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation import Score, load_scores, score_table
from pagoda.stages.run_folder import RunFolder


def run_scores(run: RunFolder) -> dict[str, list[Score]]:
    """All scores in a run's folder, by `<model>-<size>`, sizes ascending.

    Raises:
        ArtifactError: a file of scores is damaged.
    """
    found = [path for path in run.evaluation.glob("*.json") if path.stem.rpartition("-")[2].isdigit()]
    found.sort(key=lambda path: (int(path.stem.rpartition("-")[2]), path.stem))
    return {path.stem: load_scores(path) for path in found}


def compare_runs(paths: Sequence[str | Path]) -> str:
    """Markdown: what runs cost, and the scores that all of them have, one table for each model and size.

    Raises:
        ArtifactError: not run folders, or no scores in one of them.
        DataError: scores that do not compare; what differs is named.
        ConfigError: fewer than two runs.
    """
    if len(paths) < 2:
        raise ConfigError(f"a comparison needs two runs or more, got {len(paths)}.")
    runs = {str(path): RunFolder.open(path) for path in paths}
    scores = {name: run_scores(run) for name, run in runs.items()}
    for name, found in scores.items():
        if not found:
            raise ArtifactError(f"{name} has no scores yet. Run `pagoda evaluate {name}` first.")
    shared = [key for key in next(iter(scores.values())) if all(key in found for found in scores.values())]
    if not shared:
        have = "; ".join(f"{name}: {', '.join(found)}" for name, found in scores.items())
        raise ArtifactError(
            f"these runs were not scored at a size that they share ({have}). Use `pagoda evaluate --size`."
        )
    parts = []
    for key in shared:
        model, _, side = key.rpartition("-")
        parts += [f"## {model}, {side} px", score_table({name: found[key] for name, found in scores.items()})]
    parts += ["## Cost", _cost_table(runs)]
    return "\n\n".join(parts) + "\n"


def _cost_table(runs: Mapping[str, RunFolder]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        records = {path.stem: run.record(path.stem) for path in sorted((run.path / "stages").glob("*.json"))}
        results = {stage: record.get("results", {}) for stage, record in records.items() if record}
        rows[name] = {stage: found["seconds"] / 60 for stage, found in results.items() if "seconds" in found}
    stages = list(dict.fromkeys(stage for costs in rows.values() for stage in costs))
    lines = ["| minutes | " + " | ".join(stages) + " | in all |", "|---|" + "---:|" * (len(stages) + 1)]
    for name, costs in rows.items():
        cells = [f"{costs[stage]:.1f}" if stage in costs else "" for stage in stages]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{sum(costs.values()):.1f}"]) + " |")
    return "\n".join(lines)


def describe_scores(scores: Sequence[Score]) -> str:
    """Lines for people: what was compared, then value, interval, floor, and what to know."""
    lines, told = [], ""
    for score in scores:
        what = (
            f"{score.count_fake} images of {score.image_size} px against {score.count_real} real ones, "
            f"features {score.extractor} ({score.extractor_fingerprint})"
        )
        if what != told:
            lines.append(what)
            told = what
        arrow = "↓" if score.better == "lower" else "↑"
        spread = "" if score.low is None or score.high is None else f" [{score.low:.4g}, {score.high:.4g}]"
        floor = "" if score.floor is None else f"   real against real {score.floor:.4g}"
        lines.append(f"{score.metric} {arrow} {score.value:.5g}{spread}{floor}")
        lines += [f"  {note}" for note in score.notes]
    return "\n".join(lines)
