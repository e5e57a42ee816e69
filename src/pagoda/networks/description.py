"""A diffusers model as plain JSON values, and back: how a generator's config carries its base."""

from __future__ import annotations

import json
from typing import Any, cast

from torch import nn

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks.calling import SUPPORTED_MODELS, check_supported, config_of, disable_label_dropout
from pagoda.networks.extended import EXTENDED_MODELS


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The config of a supported diffusers model, with its class under `_class_name`; only JSON values.

    Raises:
        ConfigError: a class that is not supported.
    """
    check_supported(model)
    fields = {name: value for name, value in dict(config_of(model)).items() if not name.startswith("_")}
    return cast(dict[str, Any], json.loads(json.dumps({"_class_name": type(model).__name__, **fields})))


def build_model(description: dict[str, Any]) -> nn.Module:
    """The model that `describe_model` described, with fresh weights.

    Raises:
        ConfigError: an unknown class.
    """
    kinds = {kind.__name__: kind for kind in (*SUPPORTED_MODELS, *EXTENDED_MODELS)}
    name = str(description.get("_class_name", "(none)"))
    if name not in kinds:
        raise ConfigError(f"unknown model class `{name}`. {did_you_mean(name, kinds)}")
    model: nn.Module = kinds[name](**{key: value for key, value in description.items() if not key.startswith("_")})
    disable_label_dropout(model)
    return model
