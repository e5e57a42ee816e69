"""The harness on a toy benchmark: order, interruption, refusals, pass lines that fail, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness import REGISTRY, Arm, Benchmark, PassLine, Results, benchmark, provenance, render, run

from pagoda.errors import ArtifactError, ConfigError, DataError

PASSES = (
    PassLine(
        "fast takes at most half of slow",
        lambda r: r.median("fast", "seconds") / r.median("slow", "seconds"),
        at_most=0.5,
    ),
    PassLine("slow takes at most 1 s", lambda r: r.max("slow", "seconds"), at_most=1.0),  # planted: it takes 4 to 6
)


class Toy:
    """Two arms that note the order of their calls; one call can be made to fail."""

    def __init__(self, *, fail_at: tuple[str, int] | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def _arm(self, name: str, seconds: float) -> Arm:
        def arm(seed: int) -> dict[str, float]:
            self.calls.append((name, seed))
            if self.fail_at == (name, seed):
                raise KeyboardInterrupt
            return {"seconds": seconds + seed} | ({"extra": 7.0} if name == "slow" else {})

        return arm

    def benchmark(self, passes: tuple[PassLine, ...] = PASSES) -> Benchmark:
        arms = {"fast": self._arm("fast", 1.0), "slow": self._arm("slow", 4.0)}
        return Benchmark("toy", "Is fast faster than slow?", passes, lambda budget: arms)


def silent(line: str) -> None:
    """Swallow progress lines."""


def run_toy(toy: Toy, path: Path, *, seeds: int = 3, **options: Any) -> dict[str, Any]:
    return run(toy.benchmark(), seeds=seeds, json_path=path, report=silent, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "toy.json"


def test_arms_run_interleaved_over_seeds(path: Path) -> None:
    toy = Toy()
    run_toy(toy, path)
    assert toy.calls == [("fast", 0), ("slow", 0), ("fast", 1), ("slow", 1), ("fast", 2), ("slow", 2)]


def test_file_holds_every_value_and_where_it_came_from(path: Path) -> None:
    returned = run_toy(Toy(), path, command="python -m benchmarks run toy")
    record = json.loads(path.read_text())
    assert record == returned
    assert [row["metrics"] for row in record["arms"]["slow"]] == [{"seconds": 4.0 + s, "extra": 7.0} for s in range(3)]
    assert record["seeds"] == [0, 1, 2]
    assert record["complete"] is True
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["torch_threads"] >= 1
    assert {"python", "torch", "diffusers", "pagoda"} <= record["versions"].keys()
    assert record["commit"].keys() == {"hash", "dirty"}
    assert record["command"] == "python -m benchmarks run toy"


def test_pass_lines_are_judged_and_a_planted_failure_shows(path: Path) -> None:
    record = run_toy(Toy(), path)
    assert [line["holds"] for line in record["passes"]] == [True, False]
    assert [line["value"] for line in record["passes"]] == [2 / 5, 6.0]
    page = path.with_suffix(".md").read_text()
    assert "| ✓ | fast takes at most half of slow | ≤ 0.5 | 0.4 |" in page
    assert "| ✗ | slow takes at most 1 s | ≤ 1 | 6 |" in page


def test_page_shows_median_and_range_of_every_arm(path: Path) -> None:
    page = render(run_toy(Toy(), path))
    assert "| arm | seconds | extra |" in page
    assert "| fast | 2 [1, 3] | |" in page
    assert "| slow | 5 [4, 6] | 7 |" in page
    assert page == path.with_suffix(".md").read_text()


def test_interrupted_run_keeps_what_it_has_and_goes_on(path: Path) -> None:
    first = Toy(fail_at=("slow", 1))
    with pytest.raises(KeyboardInterrupt):
        run_toy(first, path)
    kept = json.loads(path.read_text())
    assert kept["complete"] is False
    assert [line["holds"] for line in kept["passes"]] == [None, None]
    page = path.with_suffix(".md").read_text()
    assert "**Unfinished:**" in page
    assert "| … | fast takes at most half of slow | ≤ 0.5 | not yet |" in page
    second = Toy()
    record = run_toy(second, path)
    assert second.calls == [("slow", 1), ("fast", 2), ("slow", 2)]
    assert record["complete"] is True
    assert record["arms"]["fast"][:2] == kept["arms"]["fast"]


def test_finished_run_is_not_run_again_and_more_seeds_only_add(path: Path) -> None:
    record = run_toy(Toy(), path, seeds=2)
    again = Toy()
    assert run_toy(again, path, seeds=2)["arms"] == record["arms"]
    assert again.calls == []
    more = Toy()
    run_toy(more, path, seeds=3)
    assert more.calls == [("fast", 2), ("slow", 2)]
    fewer = Toy()
    assert run_toy(fewer, path, seeds=1)["seeds"] == [0, 1, 2]  # values that were paid for are kept
    assert fewer.calls == []


def test_fresh_starts_over(path: Path) -> None:
    run_toy(Toy(), path, seeds=1)
    toy = Toy()
    run_toy(toy, path, seeds=1, fresh=True)
    assert toy.calls == [("fast", 0), ("slow", 0)]


def test_results_of_other_code_are_not_mixed_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(Toy(), path, seeds=1)
    before = path.read_bytes()
    monkeypatch.setattr(provenance, "code_hash", lambda: "f" * 16)
    with pytest.raises(ArtifactError, match=r"another code: .* there, ffffffffffffffff here"):
        run_toy(Toy(), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["commit", "machine", "budget", "name", "versions"])
def test_results_of_another_origin_are_refused_by_name(path: Path, key: str) -> None:
    run_toy(Toy(), path, seeds=1)
    record = json.loads(path.read_text())
    record[key] = "something else"
    path.write_text(json.dumps(record))
    toy = Toy()
    with pytest.raises(ArtifactError, match=f"another {key}"):
        run_toy(toy, path)
    assert toy.calls == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"arms": {}}', '{"format": 99}'])
def test_damaged_result_files_are_refused(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ArtifactError, match="--fresh"):
        run_toy(Toy(), path)


@pytest.mark.parametrize("returned", [{"seconds": float("nan")}, {"seconds": float("inf")}, {}])
def test_arms_must_return_finite_numbers(path: Path, returned: dict[str, float]) -> None:
    bench = Benchmark("toy", "?", (), lambda budget: {"good": lambda seed: {"a": 1.0}, "bad": lambda seed: returned})
    with pytest.raises(DataError, match="toy: bad, seed 0"):
        run(bench, seeds=1, json_path=path, report=silent)
    assert json.loads(path.read_text())["arms"]["good"][0]["metrics"] == {"a": 1.0}


def test_small_budgets_reach_the_benchmark_and_mark_the_page(path: Path) -> None:
    seen: list[float] = []

    def arms(budget: float) -> dict[str, Arm]:
        seen.append(budget)
        return {"a": lambda seed: {"value": 1.0}}

    record = run(Benchmark("toy", "?", (), arms), seeds=1, json_path=path, budget=0.25, report=silent)
    assert seen == [0.25]
    assert "**Not a result:** run at 0.25" in render(record)
    assert "**At 0.5 of the full budget:**" in render({**record, "budget": 0.5})
    assert "full budget" not in render({**record, "budget": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": 0}, "seeds"), ({"budget": 0.0}, "budget"), ({"budget": 2.0}, "budget")],
)
def test_options_out_of_range_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_toy(Toy(), path, **options)


def test_results_must_go_to_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end in \.json"):
        run_toy(Toy(), tmp_path / "toy.txt")


@pytest.mark.parametrize(
    ("value", "holds"), [(0.9, False), (1.0, True), (1.5, True), (2.0, True), (2.1, False), (float("nan"), False)]
)
def test_bounds_are_included_and_nan_lies_nowhere(value: float, holds: bool) -> None:
    assert PassLine("between", lambda r: 0.0, at_least=1.0, at_most=2.0).holds(value) is holds


def test_a_pass_line_that_could_not_fail_is_refused() -> None:
    with pytest.raises(ConfigError, match="could not fail"):
        PassLine("anything goes", lambda r: 0.0)


def test_a_pass_line_whose_value_is_not_finite_fails_and_says_so(path: Path) -> None:
    line = PassLine("never", lambda r: float("nan"), at_most=1.0)
    record = run(Toy().benchmark((line,)), seeds=1, json_path=path, report=silent)
    assert record["passes"][0]["holds"] is False
    assert "| ✗ | never | ≤ 1 | not finite |" in render(record)


def test_misspelt_arms_and_metrics_are_refused_with_the_nearest_name() -> None:
    results = Results({"slow": [{"seconds": 1.0}, {"seconds": 3.0}]})
    assert (results.median("slow", "seconds"), results.min("slow", "seconds"), results.max("slow", "seconds")) == (
        2,
        1,
        3,
    )
    with pytest.raises(ConfigError, match="Did you mean `slow`"):
        results.median("slaw", "seconds")
    with pytest.raises(ConfigError, match="Did you mean `seconds`"):
        results.median("slow", "second")


def test_a_benchmark_registers_once_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(REGISTRY, "toy", raising=False)
    register: Callable[[Any], Any] = benchmark("toy", question="?", passes=[])

    def toy(budget: float) -> dict[str, Arm]:
        return {}

    assert register(toy) is toy
    assert REGISTRY["toy"].arms is toy
    with pytest.raises(ConfigError, match="two benchmarks called `toy`"):
        register(toy)
    monkeypatch.delitem(REGISTRY, "toy")


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def test_commit_says_whether_anything_but_results_has_changed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = provenance.commit(tmp_path)
    assert clean["dirty"] is False
    assert len(clean["hash"]) == 40
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "toy.json").write_text("{}")
    assert provenance.commit(tmp_path) == clean
    code = provenance.code_hash(tmp_path)
    (tmp_path / "src" / "a.py").write_text("a = 2\n")
    assert provenance.commit(tmp_path) == {"hash": clean["hash"], "dirty": True}
    assert provenance.code_hash(tmp_path) != code


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit(tmp_path) == {"hash": None, "dirty": None}


@benchmark("side_by_side", question="Do processes of their own find the same?", passes=[])
def side_by_side(budget: float) -> dict[str, Arm]:
    """For `test_arms_side_by_side...`, whose processes import this module by its name."""
    return {"half": lambda seed: {"value": seed * budget / 2}, "late": late}


def late(seed: int) -> dict[str, float]:
    """Ends last for the first seed; fails for the fourth."""
    if seed == 3:
        raise ValueError("planted")
    time.sleep(0.5 if seed == 0 else 0.0)
    return {"value": -float(seed)}


def test_arms_side_by_side_give_the_same_file_and_one_that_fails_loses_no_other(path: Path) -> None:
    bench = REGISTRY["side_by_side"]
    alone = run(bench, seeds=3, json_path=path, report=silent, budget=0.5)
    together = run(bench, seeds=3, json_path=path.with_name("both.json"), report=silent, budget=0.5, jobs=2)
    values = [
        {name: [(row["seed"], row["metrics"]) for row in rows] for name, rows in record["arms"].items()}
        for record in (alone, together)
    ]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match="planted"):
        run(bench, seeds=5, json_path=path.with_name("both.json"), report=silent, budget=0.5, jobs=2)
    kept = json.loads(path.with_name("both.json").read_text(encoding="utf-8"))["arms"]
    assert [row["seed"] for row in kept["half"]][:4] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        run(bench, seeds=1, json_path=path, report=silent, jobs=0)


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    worker = (
        "import os, pathlib, sys, time; from benchmarks.harness.measuring import end_with; end_with(os.getppid()); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(120)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    root = str(Path(__file__).parents[2])
    started = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": root}, cwd=root)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    started.kill()
    started.wait()
    wait_for(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc").is_dir() else "R"
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # what has ended and was not yet asked for


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something has happened, and fail where it does not."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"waited for {seconds} s"
        time.sleep(0.1)


def test_unequal_arms_are_compared_by_their_medians() -> None:
    results = Results({"a": [{"s": 1.0}, {"s": 9.0}, {"s": 2.0}], "b": [{"s": 3.0}] * 3, "c": [{"s": 100.0}] * 3})
    assert results.unequal(["a", "b"], "s") == 1.5
    assert results.unequal(["b"], "s") == 1.0
