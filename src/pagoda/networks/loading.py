"""Loading a diffusers model of unknown class from a local folder: its config says which class it is."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors
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
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a diffusers model folder ({error}).") from error
    classes = {kind.__name__: kind for kind in (*SUPPORTED_MODELS, *EXTENDED_MODELS)}
    name = config.get("_class_name")
    if name not in classes:
        raise ConfigError(f"{path} holds a {name}; known are {', '.join(sorted(classes))}.")
    weights = path / (EXTENDED_WEIGHTS if classes[name] in EXTENDED_MODELS else WEIGHTS)
    if not weights.is_file():
        raise ArtifactError(
            f"{path} has no {weights.name}. Only safetensors are loaded; save the model with `save_pretrained`."
        )
    load_tensors(weights)  # a truncated or foreign file is named here, in our words
    model: nn.Module = classes[name].from_pretrained(path, use_safetensors=True, local_files_only=True)
    return model.eval()
