"""Loading a diffusers model of unknown class from a local folder: its config says which class it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import tensor_shapes
from pagoda.networks.calling import SUPPORTED_MODELS
from pagoda.networks.extended import EXTENDED_MODELS, VARIANT

_STEM = "diffusion_pytorch_model"
WEIGHTS = f"{_STEM}.safetensors"
"""Name of diffusers' weight file; a folder with only a pickle (`.bin`) is refused."""


def load_model(path: Path | str) -> nn.Module:
    """The network in a diffusers folder, in evaluation mode and in float32.

    Raises:
        ArtifactError: no model folder, no safetensors weights, or truncated ones.
        ConfigError: a class that pagoda cannot call.
    """
    kind, weights = _find_model(Path(path))
    model: nn.Module = kind.from_pretrained(
        path, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, variant=weights.variant
    )
    return model.eval()


def count_stored(path: Path | str) -> int:
    """Parameters of the network in a diffusers folder; its weights are not read.

    Raises:
        As `load_model`.
    """
    return sum(math.prod(shape) for file in _find_model(Path(path))[1].files for shape in tensor_shapes(file).values())


@dataclass(frozen=True)
class StoredWeights:
    """Where the weights in a diffusers folder are.

    Attributes:
        files: One, or several that share them.
        variant: What diffusers calls the kind of them, such as `fp16`; None for those of no other name.
        index: What says which of several files holds what.
    """

    files: tuple[Path, ...]
    variant: str | None
    index: Path | None = None


def find_weights(folder: Path, variants: Sequence[str | None] = (None, "fp16"), *, stem: str = _STEM) -> StoredWeights:
    """The weights in a diffusers folder, whole and in full precision where there is a choice. Files are looked at, not read.

    Args:
        variants: Which to look for, the preferred one first.
        stem: How their names begin; in transformers it is `model`.

    Raises:
        ArtifactError: there are none, or a file of them is missing, truncated or foreign.
    """
    for variant in variants:
        named = "" if variant is None else f".{variant}"
        whole, index = folder / f"{stem}{named}.safetensors", folder / f"{stem}.safetensors.index{named}.json"
        if whole.is_file():
            found = StoredWeights((whole,), variant)
        elif index.is_file():
            found = StoredWeights(_read_index(index), variant, index)
        else:
            continue
        for file in found.files:
            tensor_shapes(file)  # a truncated or foreign file is named here, in our words
        return found
    name = f"{stem}.safetensors" if variants[0] is None else f"{stem}.{variants[0]}.safetensors"
    raise ArtifactError(f"{folder} has no {name}. Only safetensors are loaded; save the model with `save_pretrained`.")


def _read_index(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of its own folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index} does not say which files hold the weights ({error}). Copy it again.") from error
    foreign = [
        name
        for name in names
        if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name)
    ]
    if foreign or not names:
        raise ArtifactError(
            f"{index} names {foreign or 'no files'}; it may name files of its own folder. Copy it again."
        )
    return tuple(index.parent / name for name in names)


def _find_model(path: Path) -> tuple[type[Any], StoredWeights]:
    """The class of the network in a folder, and its weights."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a diffusers model folder ({error}).") from error
    classes: dict[str, type[Any]] = {kind.__name__: kind for kind in (*SUPPORTED_MODELS, *EXTENDED_MODELS)}
    name = config.get("_class_name")
    if name not in classes:
        raise ConfigError(f"{path} holds a {name}; known are {', '.join(sorted(classes))}.")
    kind = classes[name]
    return kind, find_weights(path, (VARIANT,)) if kind in EXTENDED_MODELS else find_weights(path)
