"""Processes that take turns: one works at a time, and one that dies is named."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from benchmarks.turns import take_turns

from pagoda.errors import TrainingError

CONTESTANT = """
import sys, time
from benchmarks.turns import Turns
name, diary, pause, dies_at = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
time.sleep(0.3)  # set-up
turn = Turns(2)
print("what a peer prints is no report")
for step in range(7):
    if step == dies_at:
        sys.exit("out of memory, say")
    turn()
    with open(diary, "a") as file:
        file.write(f"{name}{step} ")
    time.sleep(pause)
"""


def command(name: str, diary: Path, pause: float, dies_at: int = -1) -> list[str]:
    return [sys.executable, "-c", CONTESTANT, name, str(diary), str(pause), str(dies_at)]


def test_contestants_work_in_turn_and_the_first_turn_does_not_count(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    found = take_turns({"a": command("a", diary, 0.02), "b": command("b", diary, 0.1)}, rounds=2)
    # Two steps a turn; the order turns by one each round; the head of a seventh step ends the third turn.
    assert diary.read_text().split()[:12] == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3", "a4", "a5", "b4", "b5"]
    assert [len(found[name].seconds) for name in "ab"] == [2, 2]
    assert min(found["a"].seconds) >= 0.04  # two pauses
    assert min(found["b"].seconds) >= 0.2
    if sys.platform == "linux":
        assert 5 < found["a"].peak_mib < 2000


def test_a_contestant_that_dies_is_named_with_its_last_words_and_nobody_is_left_behind(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with pytest.raises(TrainingError, match="out of memory, say"):
        take_turns({"a": command("a", diary, 0.01), "b": command("b", diary, 0.01, dies_at=3)}, rounds=2)
    written = diary.read_text()
    time.sleep(0.2)
    assert diary.read_text() == written
