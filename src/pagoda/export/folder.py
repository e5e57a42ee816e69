"""The folder that `PagodaPipeline.from_pretrained` reads, with nothing else of the run in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pagoda.errors import ArtifactError
from pagoda.export.card import model_card
from pagoda.export.facts import FACTS, Exported, class_names_of, export_facts
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.text_export import export_encoder


def export_folder(
    run: RunFolder,
    path: Path | str,
    *,
    size: int | None = None,
    licence: str | None = None,
    place: str | None = None,
) -> Exported:
    """Write a diffusers folder: the generator, its class names or its text encoder, a model card, and where it comes from.

    Neither the teacher nor the latents nor the images go with it. A folder that was exported before is replaced.

    Args:
        run: A finished run.
        path: Folder to write.
        size: Which generator; the largest when None.
        licence: Of the weights, for the card: an SPDX name; the card says that none was given when None.
        place: What the card tells readers to load, where that is not the folder itself.

    Raises:
        ArtifactError: the run has no such generator, something else is at `path`, or the encoder of its texts is gone.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / FACTS).is_file()):
        raise ArtifactError(f"{path} holds other things than an export of pagoda; choose another --out.")
    if path.resolve() == run.path.resolve() or path.resolve() in run.path.resolve().parents:
        raise ArtifactError(f"{path} holds the run itself; choose another --out.")
    generator = load_generator(run, size)
    pipeline = PagodaPipeline(generator, class_names_of(run))
    facts = export_facts(generator)
    with run.artifact(path) as part:
        cast(Any, pipeline).save_pretrained(part, safe_serialization=True)
        if generator.token_dim:
            export_encoder(run, part)
        (part / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (part / "README.md").write_text(model_card(run, generator, licence=licence, place=place), encoding="utf-8")
        again = OneStepGenerator.from_pretrained(
            part, subfolder="generator", use_safetensors=True, local_files_only=True
        )
        if model_hash(again) != facts["model"]:
            raise ArtifactError(
                f"what was written for {path} does not read back as the same weights; nothing was kept."
            )
    return Exported(path=path)
