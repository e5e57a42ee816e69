"""What a stage spends before its first step: recorded over its starts, apart from its training, and held against the plan."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import tiny_config
from tests.stages.test_planning import PLENTY

from pagoda.stages import distill, grow, preparation
from pagoda.stages.plan_text import compare_with_run
from pagoda.stages.planning import plan_run
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import Trainer

PAUSE = 1000.0
"""Seconds by which the clock of these tests jumps: far more than a stage takes."""


class JumpingClock:
    """The time of the machine, and what was added to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def before(self, function: Any) -> Any:
        """The function, before which the clock jumps."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.ahead += PAUSE
            return function(*args, **kwargs)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> JumpingClock:
    found = JumpingClock()
    monkeypatch.setattr(preparation, "time", found)
    return found


def without(finished: RunFolder, path: Path, stage: str, made: str) -> str:
    """A copy of a finished run in which a stage was never started."""
    shutil.copytree(finished.path, path)
    (path / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(path / made)
    return str(path)


def results(run: RunFolder, stage: str) -> dict[str, Any]:
    return dict(run.require(stage, "")["results"])


def test_filling_the_cache_is_preparation_and_every_start_that_trains_adds_to_it(
    finished_run: RunFolder, tmp_path: Path, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = without(finished_run, tmp_path / "run", "grow-16", "generator-16"), Trainer.train_step
    monkeypatch.setattr(grow, "cache_inputs", clock.before(grow.cache_inputs))

    def stopped(self: Trainer[Any], parts: Any) -> Any:
        if self.step == 2:  # a checkpoint is there by then
            raise KeyboardInterrupt
        return step(self, parts)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), out, quiet=True)
    monkeypatch.setattr(Trainer, "train_step", step)
    run = train(tiny_config(), out, quiet=True)
    found = results(run, "grow-16")
    assert 2 * PAUSE < found["before_seconds"] < 3 * PAUSE
    assert found["seconds"] < PAUSE
    assert found["hash"] == results(finished_run, "grow-16")["hash"]
    assert "before_seconds" not in run.require("grow-16", ""), "it has moved to the results"
    assert 0 < results(run, "teach")["before_seconds"] < PAUSE, "stages that were done keep theirs"


def test_the_teachers_pairs_have_a_record_of_their_own(
    finished_run: RunFolder, tmp_path: Path, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = without(finished_run, tmp_path / "run", "distill", "generator-8")
    monkeypatch.setattr(distill, "make_teacher_pairs", clock.before(distill.make_teacher_pairs))
    monkeypatch.setattr(distill, "build_objective", clock.before(distill.build_objective))
    config = tiny_config(distill__mode="both", distill__teacher_pairs__count=8)
    run = train(config, out, quiet=True, until="distill")
    assert PAUSE < results(run, "distill")["before_seconds"] < 2 * PAUSE


def test_planned_preparation_stands_beside_the_recorded_one_where_both_are_known(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    counted = plan_run(tiny_config(), probe_seconds=0, limits=PLENTY)
    planned = {"grow-16": 2.0, "distill": 1.0}
    stages = tuple(dataclasses.replace(s, seconds=1.0, before_seconds=planned.get(s.name, 0.0)) for s in counted.stages)
    plan = dataclasses.replace(counted, stages=stages)
    for stage, seconds in (("grow-16", 4.0), ("distill", 8.0), ("teach", 16.0)):
        run.note(stage, {"before_seconds": seconds})

    def row() -> list[tuple[float, float, float]]:
        rows = compare_with_run(plan, run)
        return [(r["estimate"], r["measured"], r["ratio"]) for r in rows if r["what"] == "preparation seconds"]

    whole = next(r for r in compare_with_run(plan, run) if r["what"] == "all seconds")
    assert whole["estimate"] == len(stages), "training alone, as before"
    assert row() == [(3.0, 12.0, 0.25)]  # nothing was planned of the 16
    forget(run, "distill")
    assert row() == [(2.0, 4.0, 0.5)]
    forget(run, "grow-16")  # as an older version left it
    assert row() == []


def forget(run: RunFolder, stage: str) -> None:
    record = run.require(stage, "")
    del record["results"]["before_seconds"]
    run.write_record(stage, record)
