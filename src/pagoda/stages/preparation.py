"""The seconds that a stage that trains spends before its first step: what its record of the training leaves out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pagoda.stages.context import StageContext


class Preparation:
    """A clock that starts when it is made, and stops before the first step.

    It counts reading what the stage is made from, building its networks and filling caches. A stage that is stopped prepares again when
    it goes on, so its record adds up every start that came as far as training; a start that was stopped before that is not counted.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._apart = 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What runs within has a record of its own, and is not counted."""
        started = time.monotonic()
        yield
        self._apart += time.monotonic() - started

    def end(self, context: StageContext, stage: str) -> None:
        """Write it down: `before_seconds` among the results of the stage when it is done."""
        seconds = time.monotonic() - self._started - self._apart
        if context.runtime.is_main:
            context.run.note_preparation(stage, seconds)
