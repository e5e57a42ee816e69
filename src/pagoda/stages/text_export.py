"""The text encoder of a run in a folder or a repository that others load, beside the generator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, ResourceError
from pagoda.files import write_text_atomic
from pagoda.stages.captions import STAGE, encoder_folder, open_encoder
from pagoda.stages.pipeline_texts import PipelineTextEncoder
from pagoda.stages.run_folder import RunFolder
from pagoda.text import TEACHERS, TWO_TOWER, TextEncoder, TransformersTextEncoder
from pagoda.text.loading import find_part

FOLDER = "text_encoder"
"""Name of the folder beside the generator's."""
FACTS = "pagoda-text.json"
"""What says how the encoder is to be used."""
_READ = (".safetensors", ".json", ".txt", ".model")
"""How the names of an encoder's files end: weights, settings, and what tokenisers are made of."""


def export_encoder(run: RunFolder, target: Path) -> None:
    """Copy the encoder that the run was trained with into `target/text_encoder`, and check that it reads as before.

    One that is named by its place on the hub is copied from the hub's cache.

    Raises:
        ArtifactError: it is gone, or is not the one that embedded the captions.
    """
    config = run.config()
    folder, named = target / FOLDER, config.text.encoder
    if named in (TWO_TOWER, TEACHERS) or Path(named).is_dir():
        source = encoder_folder(run) if named in (TWO_TOWER, TEACHERS) else Path(named)
        ignore = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
        shutil.copytree(source, folder, ignore=ignore)
    else:
        open_encoder(run, config)  # all of its files are in the cache now, or it is said that they are not
        found = find_part(named, "config.json")
        assert found is not None
        shutil.copytree(found.parent, folder, ignore=_not_read)
    expected = run.require(STAGE, f"pagoda train DATA --out {run.path}")["results"]["encoder"]
    facts = {"max_tokens": config.text.max_tokens, "fingerprint": expected}
    write_text_atomic(folder / FACTS, json.dumps(facts))
    open_exported(target)


def _not_read(folder: str, names: list[str]) -> list[str]:
    """What nothing here reads of a snapshot of a repository."""
    return [name for name in names if not (name.endswith(_READ) or (Path(folder) / name).is_dir())]


def fetch_exported(repository: str, **options: Any) -> Path:
    """Fetch the text encoder of an export in a repository of the hub into the hub's cache; pickles stay where they are.

    Args:
        repository: owner/name.
        **options: Of `huggingface_hub.snapshot_download`: revision, token, cache_dir, local_files_only, force_download.

    Returns:
        The folder of the export, for `open_exported`.

    Raises:
        ArtifactError: the hub refuses.
        ResourceError: the hub cannot be reached, or without a download the repository is not in its cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [f"{FOLDER}/*{ending}" for ending in _READ]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **options))
    except HfHubHTTPError as error:
        raise ArtifactError(f"the hub refuses the text encoder of {repository}: {error}") from error
    except OSError as error:
        raise ResourceError(
            f"the text encoder of {repository} cannot be fetched from the hub ({error}). Run it again, or load a local export."
        ) from error


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
