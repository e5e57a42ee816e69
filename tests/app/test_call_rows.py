"""Sizes of calls: when a larger one is tried, and when it is used."""

from __future__ import annotations

from pagoda.app.call_rows import CallRows


def test_calls_double_one_trial_at_a_time_and_only_for_enough_rows() -> None:
    rows = CallRows(8, 32, seconds=1.0)
    assert rows.choose(100) == 8  # nothing is known about how long a call takes
    rows.took(8, 0.1)
    assert rows.choose(15) == 8
    assert rows.choose(16) == 16
    assert rows.is_trial(16)
    rows.settle(16, equal=True)
    assert rows.trusted == (8, 16)
    assert rows.choose(100) == 16
    rows.took(16, 0.2)
    rows.settle(rows.choose(100), equal=True)
    rows.took(32, 0.4)
    assert rows.choose(1000) == 32
    assert [rows.choose(waiting) for waiting in (1, 8, 15, 16, 31, 32)] == [8, 8, 8, 16, 16, 32]


def test_a_size_that_moves_bits_is_not_tried_again() -> None:
    rows = CallRows(4, 64, seconds=1.0)
    rows.took(4, 0.01)
    rows.settle(rows.choose(64), equal=False)
    rows.took(4, 0.01)
    assert rows.choose(64) == 4
    assert rows.trusted == (4,)


def test_a_call_that_would_take_too_long_is_not_tried() -> None:
    rows = CallRows(4, 64, seconds=1.0)
    rows.took(4, 0.6)
    assert rows.choose(64) == 4
    rows.took(4, 0.5)
    assert rows.choose(64) == 8
