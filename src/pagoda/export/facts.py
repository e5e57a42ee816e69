"""What every export says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagoda.networks import OneStepGenerator, model_hash
from pagoda.stages.context import teacher_facts
from pagoda.stages.run_folder import RunFolder
from pagoda.version import __version__

FACTS = "pagoda.json"
"""Name of the file, or of the entry, that holds the facts."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path: File or folder.
        difference: Largest absolute difference from PyTorch, of images in [-1, 1]; None where the weights were copied as they are.
        psnr: Of the exported images against PyTorch's, dB; inf where they are equal.
    """

    path: Path
    difference: float | None = None
    psnr: float | None = None

    def __str__(self) -> str:
        if self.difference is None:
            return str(self.path)
        return f"{self.path}\nlargest difference from PyTorch {self.difference:.2g}, PSNR {self.psnr:.1f} dB"


def export_facts(generator: OneStepGenerator, *, size: int | None = None, **others: Any) -> dict[str, Any]:
    """Hash of the model, sizes, inputs and versions, as JSON-able values."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "model": model_hash(generator),
        "size": generator.size if size is None else size,
        "base_size": generator.base_size,
        "channels": generator.channels,
        "num_classes": generator.num_classes,
        **others,
    }


def class_names_of(run: RunFolder) -> list[str] | None:
    """Names of a run's classes in the order of the labels; None without classes, or without the teacher that knows them.

    Raises:
        ArtifactError: the teacher's facts are damaged.
    """
    names = teacher_facts(run.teacher).get("class_names") if run.teacher.is_dir() else None
    return list(names) if isinstance(names, list) else None
