"""`--set KEY=VALUE`, as every command reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import tyro
import yaml

from pagoda.errors import ConfigError

Settings = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...", name="set")]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as dotted settings; values are read as YAML.

    Raises:
        ConfigError: a text without `=`, or a value that is not YAML.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {setting!r}. Example: --set teach.loop.steps=500")
        try:
            values[key.strip()] = "" if text == "" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value cannot be read as YAML ({error}).") from error
    return values
