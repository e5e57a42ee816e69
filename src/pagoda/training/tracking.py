"""What a run tells: `metrics.jsonl` for machines, one status line for people, TensorBoard when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.errors import import_extra
from pagoda.files import named_disk_errors, write_text_atomic


class MetricLog:
    """Appends one JSON object a line; `rewind` forgets what a killed run logged after its last checkpoint.

    Args:
        path: The file; made when missing.
        stage: Written into every line; `rewind` touches only lines of this stage.
        tensorboard: Folder for TensorBoard events too, or None.
    """

    def __init__(self, path: Path, stage: str, *, tensorboard: Path | None = None) -> None:
        self.path = path
        self.stage = stage
        self._writer = None
        if tensorboard is not None:
            module = import_extra("torch.utils.tensorboard", "tensorboard")
            self._writer = module.SummaryWriter(str(tensorboard / stage))

    def rewind(self, step: int) -> None:
        """Drop this stage's lines after `step`, and a last line that was cut short by a kill."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # only a line that was being written when the process died can be broken
            if entry.get("stage") != self.stage or entry.get("step", 0) <= step:
                kept.append(line)
        write_text_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"stage": self.stage, "step": step, **values})
        with named_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what is open."""
        if self._writer is not None:
            self._writer.close()


class StatusLine:
    """One line that is rewritten on a terminal, and printed line by line elsewhere.

    Args:
        quiet: Print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Show the newest status."""
        if self.quiet:
            return
        print(f"\r\033[K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Keep the last status and go to the next line."""
        if self._live and not self.quiet:
            print(file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
