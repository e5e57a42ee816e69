"""The pass lines of `plan_accuracy`: one seed that is off fails them, whatever the others are."""

from __future__ import annotations

import pytest
from benchmarks.harness import REGISTRY, Results
from benchmarks.plan_accuracy import RUNS, WITHIN, config_of, stages_of


@pytest.mark.parametrize(("ratio", "side"), [(1.3, "not above"), (0.7, "not below")])
def test_one_seed_that_is_off_fails_its_lines_and_no_others(ratio: float, side: str) -> None:
    arms = {
        arm: [
            *WITHIN,
            *(f"{s} seconds" for s in stages_of(config_of(0, preset=preset, base=base, size=size, budget=1))),
        ]
        for arm, (preset, base, size) in RUNS.items()
    }
    bad = next(iter(arms))
    rows = {arm: [dict.fromkeys(figures, 1.0) for _ in range(3)] for arm, figures in arms.items()}
    rows[bad][1] = dict.fromkeys(arms[bad], ratio)
    results = Results(rows)
    failed = [line.text for line in REGISTRY["plan_accuracy"].passes if not line.holds(line.value(results))]
    assert len(failed) == len(arms[bad])
    assert all(text.startswith(bad) and text.endswith(side) for text in failed)
