"""What a sentence encoder's own files ask for after its network: how tokens are pooled, and dense layers on top.

modules.json           the modules in their order
1_Pooling/config.json  mean or first token
2_Dense/               config.json and model.safetensors, of sentence encoders that project

A `Normalize` at the end is left out: it changes the length of a vector alone, and a network reads entries near 1 more easily.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors
from pagoda.text.loading import find_part, read_json_part

_POOLINGS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
"""Whether the first token is taken."""
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "Sigmoid": nn.Sigmoid}


def open_sentence_head(source: Path | str, *, allow_download: bool = False) -> tuple[bool, nn.Sequential]:
    """Whether the first token is pooled (the mean otherwise), and the dense layers that follow: none for most encoders.

    Raises:
        ConfigError: a module, a pooling or an activation that is not known.
        ArtifactError: a file that cannot be read, or dense layers without safetensors.
    """
    folder, dense = "1_Pooling", nn.Sequential()
    modules = _modules(source, allow_download)
    while modules and modules[-1][0] in ("Normalize", "Dropout"):
        modules.pop()
    for kind, place in modules:
        if kind == "Pooling":
            folder = place
        elif kind == "Dense":
            dense.extend(_dense(source, place, allow_download))
        elif kind not in ("Transformer", "Dropout"):
            raise ConfigError(
                f"`{source}` is a sentence encoder with a module {kind}; accepted are a Transformer, Pooling, Dense, Dropout, and "
                "Normalize at the end. Give another encoder, or take that module out of its modules.json to do without it."
            )
    return _pools_first_token(source, f"{folder}/config.json", allow_download), dense


def _modules(source: Path | str, allow_download: bool) -> list[tuple[str, str]]:
    """Class and folder of each module, in order; none where the model is no sentence encoder."""
    found = find_part(source, "modules.json", allow_download=allow_download)
    if found is None:
        return []
    try:
        listed = json.loads(found.read_text(encoding="utf-8"))
        return [(str(entry["type"]).rsplit(".", 1)[-1], str(entry["path"])) for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`modules.json` of `{source}` cannot be read ({error}). Get the file again.") from error


def _pools_first_token(source: Path | str, name: str, allow_download: bool) -> bool:
    pooling = read_json_part(source, name, allow_download=allow_download) or {}
    asked = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    if "pooling_mode" in pooling:  # newer files name it in one word
        short = str(pooling["pooling_mode"])
        asked.append({"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}.get(short, short))
    if len(asked) > 1 or any(key not in _POOLINGS for key in asked):
        raise ConfigError(
            f"`{source}` pools by {', '.join(asked)}; accepted are {' and '.join(_POOLINGS)}, one of them. Give another encoder."
        )
    return bool(asked) and _POOLINGS[asked[0]]


def _dense(source: Path | str, folder: str, allow_download: bool) -> list[nn.Module]:
    """A linear layer with its weights, and its activation."""
    facts: dict[str, Any] = read_json_part(source, f"{folder}/config.json", allow_download=allow_download) or {}
    weights = find_part(source, f"{folder}/model.safetensors", allow_download=allow_download)
    if weights is None:
        raise ArtifactError(
            f"the dense layer `{folder}` of `{source}` has no model.safetensors, and pickles are not read. Save the encoder again with a "
            "present sentence-transformers (`SentenceTransformer(...).save(folder)`), or give another one."
        )
    activation = str(facts.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"the dense layer `{folder}` of `{source}` ends with {activation}; accepted are {', '.join(_ACTIVATIONS)}. Give another "
            "encoder."
        )
    try:
        linear = nn.Linear(int(facts["in_features"]), int(facts["out_features"]), bias=bool(facts.get("bias", True)))
        linear.load_state_dict(
            {name.removeprefix("linear."): value for name, value in load_tensors(weights)[0].items()}
        )
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(
            f"the dense layer `{folder}` of `{source}` is not the one that its config.json tells of ({reason}). Get the files again."
        ) from error
    return [linear, _ACTIVATIONS[activation]()]
