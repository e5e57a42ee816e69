"""Runs a benchmark: arms interleaved over seeds, the file written after each, and taken up again after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.harness import provenance
from benchmarks.harness.measuring import in_turn, side_by_side, threads_of
from benchmarks.harness.model import Benchmark, Results
from benchmarks.harness.report import render
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.files import write_text_atomic

FORMAT = 1
"""Version of the layout of the JSON file."""


def run(
    bench: Benchmark,
    *,
    seeds: int,
    json_path: Path,
    budget: float = 1.0,
    fresh: bool = False,
    jobs: int = 1,
    command: str = "",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is still missing of a benchmark, and write its JSON file and the Markdown table beside it.

    Args:
        bench: The benchmark.
        seeds: Number of seeds, 0 to seeds - 1; the file's own number when that is larger.
        json_path: Result file, ending in `.json`. When it holds results of the same code, machine, versions and budget,
            these are kept and only the rest is run.
        budget: Share of the full steps or samples, in (0, 1]; results at less than 1 are marked as not for publication.
        fresh: Start over, whatever the file holds.
        jobs: Arms that run at once, each in a process with its share of the cores; not for benchmarks of speed.
        command: The command line, for the record.
        report: Receives one line after each arm.

    Returns:
        The content of the JSON file.

    Raises:
        ConfigError: `seeds`, `budget`, `jobs` or the file's name is out of range.
        ArtifactError: the file holds results of another benchmark, commit, code, machine or budget, or is damaged.
        DataError: an arm returned something that is not a finite number; what was measured before is kept.
    """
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}.")
    if not 0 < budget <= 1:
        raise ConfigError(f"budget is a share of the full run in (0, 1], got {budget}.")
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}.")
    if json_path.suffix != ".json":
        raise ConfigError(f"the result file must end in .json, got `{json_path}`.")
    arms = bench.arms(budget)
    origin: dict[str, Any] = {
        "name": bench.name,
        "machine": provenance.machine() | ({"torch_threads": threads_of(jobs)} if jobs > 1 else {}),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "code": provenance.code_hash(),
        "budget": budget,
    }
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    if json_path.exists() and not fresh:
        runs |= _earlier_runs(json_path, origin, arms=list(arms))
    # Values that were paid for are never dropped: a file with more seeds keeps them, and they count as asked for.
    seeds = max([seeds, *(row["seed"] + 1 for rows in runs.values() for row in rows)])
    missing = []
    for pair in [(seed, name) for seed in range(seeds) for name in arms]:
        if any(row["seed"] == pair[0] for row in runs[pair[1]]):
            report(f"{bench.name}: {pair[1]}, seed {pair[0]}: kept from {json_path}")
        else:
            missing.append(pair)
    one_by_one = jobs == 1 or len(missing) < 2
    measured = in_turn(arms, missing) if one_by_one else side_by_side(bench, missing, budget=budget, jobs=jobs)
    for name, seed, found, wall_s in measured:
        metrics = _checked(found, f"{bench.name}: {name}, seed {seed}")
        runs[name] = sorted(
            [*runs[name], {"seed": seed, "wall_s": wall_s, "metrics": metrics}], key=lambda row: int(row["seed"])
        )
        _write(bench, origin, runs, seeds, command, json_path)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        report(f"{bench.name}: {name}, seed {seed}: {shown} ({wall_s:.1f} s)")
    return _write(bench, origin, runs, seeds, command, json_path)


def load_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ArtifactError: it is missing, damaged, or not a result of this harness.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"`{path}` is not a benchmark result ({type(error).__name__}: {error}). Run the benchmark again with --fresh."
        ) from error
    if not known:
        raise ArtifactError(
            f"`{path}` has format {record['format']}, this harness reads {FORMAT}. Run it again with --fresh."
        )
    return record


def _earlier_runs(path: Path, origin: dict[str, Any], *, arms: list[str]) -> dict[str, list[dict[str, Any]]]:
    record = load_result(path)
    for key, ours in origin.items():
        if record[key] != ours:
            raise ArtifactError(
                f"`{path}` holds results of another {key}: {record[key]} there, {ours} here. Values of both would be mixed "
                "in one table. Start over with --fresh, or choose another file."
            )
    return {name: record["arms"][name] for name in arms if name in record["arms"]}


def _checked(metrics: Any, what: str) -> dict[str, float]:
    checked = {str(key): float(value) for key, value in metrics.items()}
    bad = {key: value for key, value in checked.items() if not math.isfinite(value)}
    if bad or not checked:
        raise DataError(
            f"{what} returned {bad or 'nothing'}; finite numbers by name are needed. Arms measured before are kept: mend "
            "the arm and run the same command with --fresh, as the code has changed."
        )
    return checked


def _write(
    bench: Benchmark,
    origin: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    seeds: int,
    command: str,
    path: Path,
) -> dict[str, Any]:
    complete = all(len(rows) == seeds for rows in runs.values())
    results = Results({name: [row["metrics"] for row in rows] for name, rows in runs.items()})
    passes = []
    for line in bench.passes:
        # A line is judged when everything is there; half of the seeds could tell another story.
        judged: dict[str, Any] = {"text": line.text, "value": None, "at_least": line.at_least, "at_most": line.at_most}
        passes.append(judged | {"holds": None})
        if complete:
            try:
                value = float(line.value(results))
            except (ArithmeticError, LookupError, ValueError) as error:
                # What was measured is written all the same: hours of it do not depend on a line that divides by zero.
                passes[-1] |= {"holds": False, "error": f"{type(error).__name__}: {error}"}
            else:
                passes[-1] |= {"value": value if math.isfinite(value) else None, "holds": line.holds(value)}
    record = {
        "format": FORMAT,
        **origin,
        "question": bench.question,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seeds": list(range(seeds)),
        "complete": complete,
        "wall_s": sum(row["wall_s"] for rows in runs.values() for row in rows),
        "arms": runs,
        "passes": passes,
    }
    write_text_atomic(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_text_atomic(path.with_suffix(".md"), render(record))
    return record
