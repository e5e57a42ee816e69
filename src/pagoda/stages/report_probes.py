"""The optional lines of a report: what `pagoda probe fit` and `pagoda probe rank` found out about a run's diffusion model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from pagoda.errors import ArtifactError
from pagoda.evaluation.page import picture, tiles
from pagoda.stages.probe import FACTS
from pagoda.stages.rank import RANK
from pagoda.stages.run_folder import RunFolder


def probe_lines(run: RunFolder) -> str:
    """Accuracy of the head and the intrinsic dimension, with their pictures; nothing where neither was asked for.

    Raises:
        ArtifactError: a file of theirs is damaged.
    """
    folder = run.path / "probe"
    facts, pictures = [], []
    probe, rank = _read(folder / FACTS), _read(folder / RANK)
    if probe is not None:
        where = f"{probe['kind']} head on {probe['spec']['tap']} at sigma {probe['spec']['sigma']:.3g}"
        if probe["accuracy"] is not None:
            facts.append((f"{100 * probe['accuracy']:.1f} %", f"right on images held out, {where}"))
        if (folder / "search.png").is_file():
            pictures.append(picture(Image.open(folder / "search.png"), "Accuracy over part and noise level"))
    if rank is not None:
        if rank["intrinsic_dimension"] is not None:
            facts.append(
                (
                    f"{rank['intrinsic_dimension']:.0f} of {rank['size']}",
                    "intrinsic dimension (smallest numerical rank)",
                )
            )
        if (folder / "rank.png").is_file():
            pictures.append(picture(Image.open(folder / "rank.png"), "Directions kept, over the noise level"))
    return (tiles(facts) if facts else "") + "".join(pictures)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}). Delete it, or run the probe again.") from error
