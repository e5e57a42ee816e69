"""Loading a diffusers model of unknown class from a local folder: its config says which class it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors, tensor_shapes
from pagoda.networks.calling import SUPPORTED_MODELS
from pagoda.networks.extended import EXTENDED_MODELS, VARIANT

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of diffusers' weight file; a folder with only a pickle (`.bin`) is refused."""
EXTENDED_WEIGHTS = f"diffusion_pytorch_model.{VARIANT}.safetensors"
"""Name of the weight file of an extended network."""


def load_model(path: Path | str) -> nn.Module:
    """The network in a diffusers folder, in evaluation mode.

    Raises:
        ArtifactError: no model folder, no safetensors weights, or truncated ones.
        ConfigError: a class that pagoda cannot call.
    """
    kind, weights = _find_weights(Path(path))
    load_tensors(weights)  # a truncated or foreign file is named here, in our words
    model: nn.Module = kind.from_pretrained(path, use_safetensors=True, local_files_only=True)
    return model.eval()


def count_stored(path: Path | str) -> int:
    """Parameters of the network in a diffusers folder; its weights are not read.

    Raises:
        As `load_model`.
    """
    return sum(math.prod(shape) for shape in tensor_shapes(_find_weights(Path(path))[1]).values())


def _find_weights(path: Path) -> tuple[type[Any], Path]:
    """The class of the network in a folder, and the file of its weights."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a diffusers model folder ({error}).") from error
    classes: dict[str, type[Any]] = {kind.__name__: kind for kind in (*SUPPORTED_MODELS, *EXTENDED_MODELS)}
    name = config.get("_class_name")
    if name not in classes:
        raise ConfigError(f"{path} holds a {name}; known are {', '.join(sorted(classes))}.")
    weights = path / (EXTENDED_WEIGHTS if classes[name] in EXTENDED_MODELS else WEIGHTS)
    if not weights.is_file():
        raise ArtifactError(
            f"{path} has no {weights.name}. Only safetensors are loaded; save the model with `save_pretrained`."
        )
    return classes[name], weights
