"""The comparison of octaves in one go with octaves one after the other: same octaves, each arm its own stages, equal work."""

from __future__ import annotations

import pytest

from benchmarks import growth_at_once as of


@pytest.mark.parametrize(("arm", "growth"), [("one after the other", [16, 32]), ("in one go", [32])])
def test_both_arms_grow_the_same_octaves(arm: str, growth: list[int]) -> None:
    config = of.config_of(0, 1.0, 32, of.ARMS[arm], (7,))
    other = of.config_of(0, 1.0, 32, 1, (7,))
    assert config.growth == growth
    assert [config.grow.octave(k) for k in (0, 1)] == [other.grow.octave(k) for k in (0, 1)]
    assert config.distill == other.distill


@pytest.mark.parametrize("budget", [0.05, 1.0])
def test_both_arms_take_as_much_work_and_one_go_fewer_steps(budget: float) -> None:
    apart, together = (of.with_work(0, budget, at_once) for at_once in of.ARMS.values())
    assert of.work(together) == pytest.approx(of.work(apart), rel=0.05 if budget < 1 else 0.005)
    steps = [[config.grow.octave(k)["steps"] for k in (0, 1)] for config in (apart, together)]
    assert steps[0] == [max(2, round(budget * full)) for full in (600, 400)]
    assert steps[1][0] == steps[1][1] < sum(steps[0])
