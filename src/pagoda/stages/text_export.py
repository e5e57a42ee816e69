"""The text encoder of a run in a folder that others load, beside the generator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import write_text_atomic
from pagoda.stages.captions import STAGE, encoder_folder
from pagoda.stages.pipeline_texts import PipelineTextEncoder
from pagoda.stages.run_folder import RunFolder
from pagoda.text import TEACHERS, TWO_TOWER, TextEncoder, TransformersTextEncoder

FOLDER = "text_encoder"
"""Name of the folder beside the generator's."""
FACTS = "pagoda-text.json"
"""What says how the encoder is to be used."""


def export_encoder(run: RunFolder, target: Path) -> None:
    """Copy the encoder that the run was trained with into `target/text_encoder`, and check that it reads as before.

    Raises:
        ConfigError: the encoder is a name on the hub and not a folder.
        ArtifactError: it is gone, or is not the one that embedded the captions.
    """
    config = run.config()
    source = encoder_folder(run) if config.text.encoder in (TWO_TOWER, TEACHERS) else Path(config.text.encoder)
    if not source.is_dir():
        raise ConfigError(
            f"text.encoder={config.text.encoder} is no folder that can be copied; save the encoder to one and name it."
        )
    expected = run.require(STAGE, f"pagoda train DATA --out {run.path}")["results"]["encoder"]
    folder = target / FOLDER
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
    )
    facts = {"max_tokens": config.text.max_tokens, "fingerprint": expected}
    write_text_atomic(folder / FACTS, json.dumps(facts))
    open_exported(target)


def open_exported(target: Path) -> Callable[[Sequence[str]], Condition] | None:
    """What reads prompts in an exported folder; None where it holds no encoder.

    Raises:
        ArtifactError: the encoder is damaged, or is not the one that was exported.
    """
    folder = target / FOLDER
    if not (folder / FACTS).is_file():
        return None
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    encoder: TextEncoder
    if (folder / "model_index.json").is_file():  # of a pipeline
        encoder = PipelineTextEncoder(folder)
    else:
        encoder = TransformersTextEncoder(folder, max_tokens=int(facts["max_tokens"]), advice="Export the run again.")
    if encoder.fingerprint != facts["fingerprint"]:
        raise ArtifactError(
            f"the text encoder in {folder} has the hash {encoder.fingerprint}, exported was {facts['fingerprint']}: it was exchanged or "
            "damaged. Export the run again."
        )

    def read(prompts: Sequence[str]) -> Condition:
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ConfigError(f"a prompt needs words, got {list(prompts)}.")
        return encoder.embed(list(prompts)).condition()

    return read
