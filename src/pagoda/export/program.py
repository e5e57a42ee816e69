"""`torch.export`: the generator as a program that PyTorch runs without this package."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pagoda.errors import ArtifactError
from pagoda.export.facts import FACTS, Exported, export_facts
from pagoda.export.graph import ImageMaker, largest_difference, quiet_pytrees, trace
from pagoda.files import atomic_path
from pagoda.networks import OneStepGenerator

PROGRAM_TOLERANCE = 1e-5
"""Largest accepted difference from PyTorch; the operations are the same, so that 0 is usual."""


def export_program(generator: OneStepGenerator, path: Path | str, *, size: int | None = None) -> Exported:
    """Write a program: `torch.export.load(path).module()(z, labels)`, without labels for a generator that takes none.

    The file is read again and compared with PyTorch before it takes its name.

    Args:
        generator: Of a finished run.
        path: File to write; its name ends in .pt2.
        size: Side of the images, in pixels; the largest when None.

    Raises:
        ArtifactError: another ending, a network of which PyTorch makes no graph, or a program that differs from PyTorch.
        ShapeError: the generator has no level of that size.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ArtifactError(f"a program is written into a file that ends in .pt2, got {path.name!r}.")
    maker = ImageMaker(generator, size)
    program = trace(maker)
    facts = export_facts(generator, size=maker.image_size)
    with atomic_path(path) as part, quiet_pytrees():
        with part.open("wb") as file:  # as a file: PyTorch refuses names with other endings
            torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
        with part.open("rb") as file:
            module = torch.export.load(file).module()
        difference, psnr = largest_difference(maker, lambda inputs: module(*inputs))
        if not difference <= PROGRAM_TOLERANCE:
            raise ArtifactError(
                f"the program differs from PyTorch by {difference:.2g}, accepted are {PROGRAM_TOLERANCE:g}. "
                "Nothing was written; try the versions in constraints.txt."
            )
    return Exported(path=path, difference=difference, psnr=psnr)
