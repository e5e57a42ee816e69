"""Steps by work: what a straight line gives back, and arms of a benchmark that end at the same count."""

from __future__ import annotations

import pytest
from benchmarks.equal_work import steps_for, work_by_stage
from benchmarks.harness import Results

from benchmarks import adversarial


@pytest.mark.parametrize(("start", "each"), [(0, 3), (700, 11)])
def test_steps_are_those_of_the_straight_line(start: int, each: int) -> None:
    for steps in (2, 100, 5000):
        assert steps_for(start + each * steps, lambda count: start + each * count) == steps


@pytest.mark.parametrize("arm", ["teacher, 0.3", "teacher, 0.3, every fourth step", "teacher, 0.3, and of pairs"])
def test_judged_steps_are_fewer_and_as_much_work(arm: str) -> None:
    def work(loss: object, steps: int) -> int:
        return work_by_stage(adversarial.config_of(0, 1.0, 32, loss, steps))["grow-32"]  # type: ignore[arg-type]

    target, loss = work({}, 400), adversarial.ARMS[arm]
    steps = steps_for(target, lambda count: work(loss, count))
    assert steps < 400
    assert work(loss, steps) == pytest.approx(target, rel=0.01)


def test_the_best_arm_is_chosen_by_one_seed_and_judged_by_the_others() -> None:
    rows = {"reconstruction": [1.0, 1.0, 1.0], "lucky": [0.5, 2.0, 3.0], "steady": [0.9, 0.9, 0.9]}
    results = Results({arm: [{"distance": value} for value in values] for arm, values in rows.items()})
    assert adversarial.best(rows, "distance", min)(results) == 2.5
    assert adversarial.best(rows, "distance", max)(results) == 0.9
