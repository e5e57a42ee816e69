"""Parts of transformers models by the name of their class, from a local folder or the hub's cache; safetensors only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError, ConfigError, import_extra

DUAL_KINDS = {"clip": "CLIPModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel"}
"""Model types with an image and a text tower in one space, and the class that reads them."""

ENCODER_ADVICE = (
    "Give a folder in the Hugging Face layout with safetensors in it, or `two-tower` to train an encoder on your own captions; a hub "
    "name needs text.allow_download=true."
)
"""The next step where the configuration of a run names an encoder."""


def load_part(
    kind: str, source: Path | str, *, advice: str, allow_download: bool = False, variant: str | None = None
) -> Any:
    """`transformers.<kind>.from_pretrained(source)`, without pickles, and without a download unless it is allowed.

    Args:
        kind: Name of a class, such as `AutoTokenizer` or `CLIPModel`.
        source: Folder in the Hugging Face layout, or a hub name.
        advice: The next step of who asked, for the error: what else to give, and what allows a download there.
        variant: Of the weights, such as `fp16`.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there is no such thing here.
    """
    options: dict[str, Any] = {} if variant is None else {"variant": variant}  # tokenisers know no such option
    found = getattr(import_extra("transformers", "encoders"), kind)
    try:
        with without_progress_bars():
            return found.from_pretrained(
                str(source), use_safetensors=True, local_files_only=not allow_download, **options
            )
    except (OSError, ValueError, KeyError, TypeError) as error:  # all of them, for files that are missing or foreign
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"`{source}` holds no {kind} that can be loaded{'' if allow_download else ' without a download'} ({reason}). {advice}"
        ) from error


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers shows a bar for every file that it reads or writes; inside it does not."""
    bars = import_extra("transformers.utils.logging", "encoders")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def load_dual(source: Path | str, *, advice: str, allow_download: bool = False) -> Any:
    """A CLIP, or another model of two towers, frozen and in evaluation mode.

    Raises:
        ConfigError: a model that has no two towers.
        ArtifactError, MissingExtraError: as `load_part`.
    """
    config = load_part("AutoConfig", source, advice=advice, allow_download=allow_download)
    if config.model_type not in DUAL_KINDS:
        raise ConfigError(
            f"`{source}` holds a {config.model_type}, which does not put images and texts into one space; accepted are "
            f"{', '.join(DUAL_KINDS)}. Train one with `pagoda text train DATA --out FOLDER`."
        )
    model = load_part(DUAL_KINDS[config.model_type], source, advice=advice, allow_download=allow_download)
    return model.eval().requires_grad_(False)


def find_part(source: Path | str, name: str, *, allow_download: bool = False) -> Path | None:
    """Where a file beside a model is, or None where there is none."""
    hub = import_extra("transformers.utils", "encoders")
    found = hub.cached_file(
        str(source),
        name,
        local_files_only=not allow_download,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def read_json_part(source: Path | str, name: str, *, allow_download: bool = False) -> dict[str, Any] | None:
    """A JSON object in a file beside a model, or None where there is none.

    Raises:
        ArtifactError: it cannot be read.
    """
    found = find_part(source, name, allow_download=allow_download)
    if found is None:
        return None
    try:
        return dict(json.loads(found.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"`{name}` of `{source}` cannot be read ({error}). Get the file again.") from error
