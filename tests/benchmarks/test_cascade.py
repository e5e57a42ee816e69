"""What PaGoDA is compared with: as many steps as the work allows, and a model that is told the image below."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.cascade import train_for

from pagoda.stages.context import open_context
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime


@pytest.mark.parametrize("lower", [None, 8])
def test_a_model_takes_as_many_steps_as_the_work_allows(
    finished_run: RunFolder, tmp_path: Path, lower: int | None
) -> None:
    context = open_context(finished_run, finished_run.config(), Runtime("cpu"), quiet=True)

    def trained(multiply_adds: float, name: str) -> tuple[int, float]:
        model = train_for(context, 16, preset="tiny", multiply_adds=multiply_adds, lower=lower, folder=tmp_path / name)
        return model.steps, model.multiply_adds

    steps, least = trained(1, "least")
    assert steps == 2  # a schedule needs two
    one = least / 2
    assert one > 0
    assert trained(3.3 * one, "more") == (3, 3 * one)
