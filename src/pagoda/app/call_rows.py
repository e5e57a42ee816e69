"""How many rows a call of a network has: few for a single visitor, more for a crowd, as soon as more are known to change no bit."""

from __future__ import annotations


class CallRows:
    """Sizes of call that give every row the same bits, and the choice among them.

    A call costs much before its first row, so that twice the rows take less than twice the time. Each doubling is tried once, when
    enough rows wait for it: the server makes the same rows in calls of the smallest size too, and trusts the larger one only when every
    bit is the same. Nothing is tried whose call would keep others waiting for longer than `seconds`.

    Args:
        least: Rows of the smallest call, and of every call until a larger one was tried.
        most: Rows of the largest one that is tried; `least` for calls of one size only.
        seconds: A call of twice the rows is not tried when it would take longer, judged by the last one.
    """

    def __init__(self, least: int, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._trusted = [least]
        self._may_grow = False

    @property
    def least(self) -> int:
        """Rows of the smallest call."""
        return self._trusted[0]

    @property
    def trusted(self) -> tuple[int, ...]:
        """Sizes that are known to give the same bits, smallest first."""
        return tuple(self._trusted)

    def choose(self, waiting: int) -> int:
        """Rows of the next call, when this many wait for it. Too few are filled up to the smallest call."""
        following = 2 * self._trusted[-1]
        if self._may_grow and following <= waiting:
            return following
        return max((rows for rows in self._trusted if rows <= waiting), default=self.least)

    def is_trial(self, rows: int) -> bool:
        """Whether calls of this size have not been compared yet."""
        return rows not in self._trusted

    def settle(self, rows: int, *, equal: bool) -> None:
        """The outcome of a trial: trust this size, or try no larger one again."""
        if equal:
            self._trusted.append(rows)
        else:
            self._most = self._trusted[-1]
        self._may_grow = False

    def took(self, rows: int, seconds: float) -> None:
        """How long a call took; of the largest trusted size it decides whether twice as many rows are tried next."""
        if rows == self._trusted[-1]:
            self._may_grow = 2 * rows <= self._most and 2 * seconds <= self._seconds
