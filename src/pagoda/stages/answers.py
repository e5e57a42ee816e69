"""Answers of a classification: the finished set, and what is on disk while it is made, so that it can be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import ArtifactError
from pagoda.files import write_text_atomic
from pagoda.understanding import calibration_error
from pagoda.version import __version__


@dataclass(frozen=True)
class ClassifiedImages:
    """Answers for a set of images.

    Attributes:
        names: Name of each image.
        classes: (N,) int64.
        probabilities: (N, K).
        class_names: K names.
        calls: (N,) network rows spent on each image.
        truth: (N,) the class of each image where the images' own labels are classes of the model; None otherwise.
        calibrated: Whether a temperature was fitted, so that probabilities are probabilities.
    """

    names: list[str]
    classes: Tensor
    probabilities: Tensor
    class_names: list[str]
    calls: Tensor
    truth: Tensor | None
    calibrated: bool

    @property
    def accuracy(self) -> float | None:
        """Share of images that are right, in [0, 1]; None where the truth is not known."""
        return None if self.truth is None else float((self.classes == self.truth).double().mean())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        rows = [
            {"image": name, "class": self.class_names[k], "probability": round(float(p[k]), 6), "calls": int(n)}
            for name, k, p, n in zip(self.names, self.classes.tolist(), self.probabilities, self.calls, strict=True)
        ]
        report: dict[str, Any] = {
            "version": __version__,
            "calibrated": self.calibrated,
            "accuracy": self.accuracy,
            "calls_per_image": float(self.calls.double().mean()),
        }
        if self.truth is not None:
            report["calibration_error"] = calibration_error(self.probabilities, self.truth)
        return {**report, "images": rows}

    def save(self, path: Path) -> None:
        """Write `to_json`."""
        write_text_atomic(path, json.dumps(self.to_json(), indent=1))


class PartialAnswers:
    """Answers so far, beside the file that will hold them all: a line of facts, then a line a batch of images.

    Args:
        path: The file of the finished answers; `<path>.partial` is used.
        facts: What the answers depend on; a file of other facts is refused.

    Raises:
        ArtifactError: the file there is of another model, other images or other settings, or is damaged.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path.with_name(path.name + ".partial")
        self.facts = json.loads(json.dumps(facts))
        self.temperature: float | None = None
        self.rows: list[dict[str, Any]] = []
        self._end = 0  # bytes of whole lines
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._end = content.rfind(b"\n") + 1  # a last line without an end was being written
        try:
            head, *rows = [json.loads(line) for line in content[: self._end].splitlines()]
        except ValueError as error:
            raise ArtifactError(f"{self.path} cannot be read ({error}). Remove it to start over.") from error
        found = head.pop("temperature")
        differ = sorted(key for key in {*head, *self.facts} if head.get(key) != self.facts.get(key))
        if differ:
            raise ArtifactError(
                f"{self.path} holds answers of another command: {', '.join(differ)} differ. Remove it to start over, or choose another "
                "--out."
            )
        self.temperature, self.rows = found, rows

    def begin(self, temperature: float) -> None:
        """Write the facts, before the first answers."""
        self.temperature, self.rows = temperature, []
        head = json.dumps({**self.facts, "temperature": temperature}) + "\n"
        write_text_atomic(self.path, head)
        self._end = len(head.encode())

    def add(self, classes: Tensor, probabilities: Tensor, calls: Tensor) -> None:
        """Append the answers of a batch."""
        row = {"classes": classes.tolist(), "probabilities": probabilities.tolist(), "calls": calls.tolist()}
        self.rows.append(row)
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("r+b") as file:  # over what a broken write left behind
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
        self._end += len(line)

    def remove(self) -> None:
        """The finished answers are written."""
        self.path.unlink(missing_ok=True)


def join_answers(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (N,), probabilities (N, K) and calls (N,) of all batches."""
    classes, calls = (torch.tensor([v for row in rows for v in row[name]]) for name in ("classes", "calls"))
    return classes, torch.tensor([v for row in rows for v in row["probabilities"]], dtype=torch.float64), calls
