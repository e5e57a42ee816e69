"""Passes without gradients take few large images at once: what a run holds while it measures does not grow with the size of its images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_config
from torch import Tensor

from pagoda.networks import OneStepGenerator, batches
from pagoda.networks.batches import images_at_once
from pagoda.stages.config import override
from pagoda.stages.context import open_context
from pagoda.stages.evaluate import evaluate_run
from pagoda.stages.prior_gap import load_gaps, measure_gap
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import Runtime

BOUND = 4 * 16**2
"""Pixels of a call in these tests: 4 images of 16 px."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of every pass without gradients through a generator, under a small bound."""
    found: list[int] = []

    def watched(name: str, side: Callable[..., int]) -> None:
        original = getattr(OneStepGenerator, name)

        def call(self: OneStepGenerator, z: Tensor, *args: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                found.append(len(z) * side(self, *args, **options) ** 2)
            return original(self, z, *args, **options)

        monkeypatch.setattr(OneStepGenerator, name, call)

    watched("forward", lambda self, *args, **options: options.get("resolution") or self.size)
    watched("lower_outputs", lambda self, condition, size: size // 2)
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", BOUND)
    return found


@pytest.mark.parametrize(("side", "count"), [(8, 256), (16, 256), (32, 64), (128, 4), (256, 1), (1024, 1)])
def test_a_call_takes_as_many_images_as_its_pixels_allow(side: int, count: int) -> None:
    assert images_at_once(side) == count


def test_a_whole_run_stays_below_the_bound(tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # The grids of a finished run are drawn in calls of 64, which their metadata name so that they can be made again.
    monkeypatch.setattr("pagoda.stages.train.draw_samples", lambda context: None)
    train(override(tiny_config(), {"grow.match_detail": True}), str(tmp_path / "run"), quiet=True)
    assert max(passes) == BOUND


def test_the_prior_gap_is_the_same_in_small_calls(finished_run: RunFolder, tmp_path: Path, passes: list[int]) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    shutil.rmtree(run.path / "prior-gap")
    measure_gap(open_context(run, run.config(), Runtime("cpu"), quiet=True), 16)
    assert max(passes) == BOUND
    for found, expected in zip(load_gaps(run)[16]["points"], load_gaps(finished_run)[16]["points"], strict=True):
        assert found["name"] == expected["name"]
        figures = {name: value for name, value in expected.items() if name != "name"}
        assert {name: found[name] for name in figures} == pytest.approx(figures, rel=1e-3, abs=1e-5)


def test_scores_are_the_same_in_small_calls(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    asked: dict[str, Any] = {"runtime": Runtime("cpu"), "metrics": ("kd", "fd"), "features": "random"}
    whole = [score.value for score in evaluate_run(run, **asked)]
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", BOUND)
    parts = [score.value for score in evaluate_run(run, **asked)]
    assert parts == pytest.approx(whole, rel=1e-3)
