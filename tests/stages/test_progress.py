"""How far a run is, from its folder alone; and the report of its images."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import tiny_config

from pagoda.errors import ArtifactError
from pagoda.stages.data_report import read_data_report
from pagoda.stages.progress import read_progress
from pagoda.stages.run_folder import RunFolder


@pytest.fixture
def under_way(tmp_path: Path) -> Callable[[list[dict[str, Any]]], RunFolder]:
    """A run whose stage `teach` was started for 6 steps and has logged these lines."""

    def make(lines: list[dict[str, Any]]) -> RunFolder:
        run = RunFolder.create(tmp_path / "run", tiny_config())
        settings = {"teach": {"loop": {"steps": 6}}}
        run.write_record("teach", {"settings": settings, "inputs": {}, "done": False, "version": "0"})
        run.metrics.write_text("".join(json.dumps({"stage": "teach", **line}) + "\n" for line in lines))
        return run

    return make


def test_a_finished_run_has_nothing_under_way(finished_run: RunFolder) -> None:
    progress = read_progress(finished_run)
    assert progress.done == progress.stages == ("teach", "encode", "distill", "grow-16")
    assert progress.stage is None
    assert progress.seconds_left is None
    assert progress.warnings == ()


def test_a_run_that_has_not_begun_knows_its_stages(tmp_path: Path) -> None:
    progress = read_progress(RunFolder.create(tmp_path / "run", tiny_config()))
    assert (progress.done, progress.stage, progress.seconds_since) == ((), None, None)
    assert len(progress.stages) == 4


def test_time_left_is_the_pace_so_far_times_the_steps_that_are_missing(under_way: Any) -> None:
    run = under_way([{"step": s, "seconds": 2.0 * s, "images_per_second": 7.0, "teacher/loss": 1.0} for s in (2, 4)])
    progress = read_progress(run)
    assert (progress.stage, progress.step, progress.steps) == ("teach", 4, 6)
    assert progress.seconds_left == pytest.approx(4.0)
    assert progress.share == pytest.approx(4 / 6)
    assert progress.images_per_second == 7.0
    assert progress.warnings == ()


def test_a_stage_before_its_first_line_has_no_time_left(under_way: Any) -> None:
    progress = read_progress(under_way([]))
    assert (progress.stage, progress.step, progress.seconds_left, progress.share) == ("teach", 0, None, 0.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"teacher/loss": float("nan")}, "teacher/loss was not finite at step 12"),
        ({"generator/win_rate": 1.0}, "has won"),
    ],
)
def test_what_is_unhealthy_is_said(under_way: Any, line: dict[str, float], message: str) -> None:
    run = under_way([{"step": s, "seconds": float(s), **line} for s in range(1, 13)])
    assert any(message in text for text in read_progress(run).warnings)


def test_a_log_that_has_gone_quiet_is_said(under_way: Any) -> None:
    run = under_way([{"step": s, "seconds": float(s), "teacher/loss": 1.0} for s in (1, 2)])
    long_ago = time.time() - 3600
    os.utime(run.metrics, (long_ago, long_ago))
    progress = read_progress(run)
    assert progress.seconds_since == pytest.approx(3600, abs=60)
    assert any("nothing was logged" in text for text in progress.warnings)


def test_a_run_keeps_what_the_check_of_its_images_found(finished_run: RunFolder) -> None:
    report = read_data_report(finished_run)
    assert report is not None
    assert (report["total"], report["usable"], report["bad"]) == (40, 40, [])
    assert sum(report["classes"].values()) == 40


def test_a_run_without_a_report_has_none_and_a_damaged_one_is_named(finished_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny_config())
    assert read_data_report(run) is None
    (run.path / "data").mkdir()
    shutil.copy(finished_run.images / "check.json", run.images / "check.json")
    assert read_data_report(run) == read_data_report(finished_run)
    for text in ("{half", "[]", '{"total": 3}', '{"total": "many", "usable": 1}'):
        (run.images / "check.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"check\.json is no report"):
            read_data_report(run)
