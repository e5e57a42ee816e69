"""Processes that take turns: one works while the others wait, so that what slows the machine slows all of them alike.

A contestant calls `Turns` at the head of every step. The referee, `take_turns`, starts all contestants, lets each of them make a few
steps, then the next, round after round, and returns the seconds of every turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pagoda.errors import TrainingError


class Turns:
    """The side of a contestant: waits for its turn, and reports how long each took.

    Args:
        steps: Steps a turn.
        listen: Where the referee speaks; standard input when None.
        speak: Where the referee listens; standard output when None, which from then on is standard error for everyone else, so that
            nothing that a peer prints is taken for a report.
    """

    def __init__(self, steps: int, *, listen: IO[str] | None = None, speak: IO[str] | None = None) -> None:
        self.steps = steps
        self._listen = sys.stdin if listen is None else listen
        if speak is None:
            speak = os.fdopen(os.dup(sys.stdout.fileno()), "w")
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._speak = speak
        self._done = 0
        self._started = 0.0

    def __call__(self) -> None:
        """The head of a step; what comes before the first one is set-up and is not counted."""
        now = time.perf_counter()
        if self._done % self.steps == 0:
            if self._done:
                self._report({"seconds": now - self._started})
            else:
                self._report({"ready": True})
            self._listen.readline()  # the word, or the end of all turns
            self._started = time.perf_counter()
        self._done += 1

    def _report(self, facts: Mapping[str, Any]) -> None:
        print(json.dumps({**facts, "peak_mib": _peak_mib()}), file=self._speak, flush=True)


def _peak_mib() -> float:
    """Largest resident memory of this process in MiB; 0 where the system does not tell it of a process alone."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    # Not `getrusage`: a process inherits that peak from the one that started it.
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


@dataclass(frozen=True)
class TurnsTaken:
    """What one contestant did."""

    seconds: list[float]
    """Of each turn, the first one left out: it warms up."""
    peak_mib: float
    """Largest resident memory of its process."""


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, TurnsTaken]:
    """Start every contestant and let them work in turn; the order turns by one each round.

    Args:
        commands: By name. Each makes `rounds` + 1 turns and may go on to the head of the step behind them.
        rounds: Turns that count.

    Returns:
        By name.

    Raises:
        TrainingError: a contestant ended early; the message holds the end of its output.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{i}.log" for i, name in enumerate(commands)}
        running: dict[str, subprocess.Popen[str]] = {}
        try:
            for name, command in commands.items():
                with logs[name].open("wb") as log:
                    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                    running[name] = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
                _hear(running[name], logs[name])  # ready; one after the other, so that nobody's set-up slows a turn
            names = list(commands)
            for turn in range(rounds + 1):
                for name in (names[(turn + i) % len(names)] for i in range(len(names))):
                    speaker = running[name].stdin
                    assert speaker is not None
                    print("go", file=speaker, flush=True)
                    report = _hear(running[name], logs[name])
                    seconds[name].append(report["seconds"])
                    peaks[name] = report["peak_mib"]
        finally:
            for process in running.values():
                process.kill()
                process.communicate()
    return {name: TurnsTaken(seconds[name][1:], peaks[name]) for name in commands}


def _hear(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The next report of a contestant."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise TrainingError(
            f"`{' '.join(map(str, process.args))}` ended before its turns were over. Its last words:\n{tail}"  # type: ignore[arg-type]
        )
    return dict(json.loads(line))
