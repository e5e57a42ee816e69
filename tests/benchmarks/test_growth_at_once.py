"""The comparison of octaves in one go with octaves one after the other: same octaves, each arm its own stages, equal time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth_at_once as of
from pagoda.stages.config import RunConfig


@pytest.mark.parametrize(("arm", "growth"), [("one after the other", [16, 32]), ("in one go", [32])])
def test_both_arms_grow_the_same_octaves(arm: str, growth: list[int]) -> None:
    config = of.config_of(0, 1.0, 32, of.ARMS[arm], (7,))
    other = of.config_of(0, 1.0, 32, 1, (7,))
    assert config.growth == growth
    assert [config.grow.octave(k) for k in (0, 1)] == [other.grow.octave(k) for k in (0, 1)]
    assert config.distill == other.distill


@pytest.mark.parametrize("arm", of.ARMS)
def test_steps_fill_the_time_that_both_arms_have(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.1 and 0.4 s a step of single octaves and 0.5 of both, 150 s are as many steps as that makes."""
    trained: list[RunConfig] = []
    cost = {(16, 1): 0.1, (32, 1): 0.4, (32, 2): 0.5}

    @contextmanager
    def finished(path: Path, config: RunConfig, until: str) -> Iterator[RunConfig]:
        trained.append(config)
        yield config

    def seconds_of(run: Any, config: RunConfig) -> list[float]:
        grow = config.grow
        return [grow.octave(config.sizes.index(size) - 1)["steps"] * cost[size, grow.at_once] for size in config.growth]

    fakes = {
        "begun": lambda config, until: Path(),
        "finished": finished,
        "seconds_of": seconds_of,
        "samples": lambda run, size, count, resolution: torch.zeros(count, 3, resolution, resolution),
        "score_images": lambda *_: dict.fromkeys(of.FIGURES.values(), 1.0),
        "ClassifierFeatures": lambda judge: None,
        "judge": lambda size: None,
        "real_images": lambda size: (None, None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(of, name, fake)
    found = of.compare(of.ARMS[arm], 1.0, 0)
    assert found["seconds"] == pytest.approx(of.SECONDS, rel=0.01)
    assert {f"distance_{size}" for size in (8, 16, 32)} <= set(found)
    steps = [trained[-1].grow.octave(k)["steps"] for k in (0, 1)]
    assert steps == ([750, 188] if arm == "one after the other" else [300, 300])
