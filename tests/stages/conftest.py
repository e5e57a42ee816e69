"""Fixtures that the tests of stages share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import tiny_config

from pagoda.stages.context import StageContext, open_context
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime


@pytest.fixture
def open_as(finished_run: RunFolder, tmp_path: Path) -> Callable[..., StageContext]:
    """A copy of a finished run in which the distillation has not begun, opened for another configuration of it."""

    def open_(**changes: object) -> StageContext:
        folder = tmp_path / "run"
        if not folder.exists():
            shutil.copytree(finished_run.path, folder)
            for name in ("critics", "generator-8", "generator-16"):
                shutil.rmtree(folder / name)
            for stage in ("distill", "grow-16"):
                (folder / "stages" / f"{stage}.json").unlink()
        return open_context(RunFolder.open(folder), tiny_config(**changes), Runtime("cpu"), quiet=True)

    return open_
