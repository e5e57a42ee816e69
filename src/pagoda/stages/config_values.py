"""Configurations as plain values: read from YAML and from dotted settings, every key and type checked, and written again."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks import backbone_preset
from pagoda.pretraining import TECHNIQUES, TechniqueConfig

ConfigT = TypeVar("ConfigT")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data for YAML and JSON; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, TechniqueConfig):
            options = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
            return {value.name: options}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(kind: type[ConfigT], values: Mapping[str, Any], *, where: str = "") -> ConfigT:
    """A configuration from plain data; what is missing keeps its default.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key `{where}{key}`. {did_you_mean(str(key), names)}")
    return kind(**{key: _read(hints[key], value, f"{where}{key}") for key, value in values.items()})


def read_technique(value: Any, *, where: str = "techniques") -> TechniqueConfig:
    """A technique's configuration from its name, from `{name: {option: value}}`, or from itself.

    Raises:
        ConfigError: an unknown name or option, or something else.
    """
    if isinstance(value, TechniqueConfig):
        return value
    name: Any = value if isinstance(value, str) else None
    options: Any = {}
    if isinstance(value, Mapping) and len(value) == 1:
        name, options = next(iter(value.items()))
        options = {} if options is None else options
    if name is None or not isinstance(options, Mapping):
        raise ConfigError(
            f"`{where}` lists names, or a name with its options as in {{cep: {{gamma: 0.5}}}}; got {value!r}."
        )
    if name not in TECHNIQUES:
        raise ConfigError(f"unknown technique `{name}`. {did_you_mean(str(name), TECHNIQUES)}")
    return from_dict(TECHNIQUES[name], options, where=f"{name}.")


def _read(hint: Any, value: Any, where: str) -> Any:
    if hint is TechniqueConfig:
        return read_technique(value, where=where)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _read(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{where}` holds settings by name, got {value!r}.")
        return from_dict(typing.cast(type, hint), value, where=f"{where}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"`{where}` must be a list, got {value!r}.")
        return tuple(_read(typing.get_args(hint)[0], v, where) for v in value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"`{where}` must be one of {typing.get_args(hint)}, got {value!r}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"`{where}` must be a number, got {value!r}.") from None
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ConfigError(f"`{where}` must be of type {hint.__name__}, got {value!r}.")
    return value


def override(config: ConfigT, settings: Mapping[str, Any]) -> ConfigT:
    """The configuration with dotted keys replaced, e.g. `{"teach.loop.steps": 500}`; `backbone` and losses may be a preset's name.

    Raises:
        ConfigError: an unknown key or preset, or a value of another type.
    """
    values = to_dict(config)
    settings = dict(settings)
    if isinstance(settings.get("backbone"), str):
        preset = backbone_preset(settings.pop("backbone"), settings.get("base", values["base"]))
        settings = {"backbone": to_dict(preset), **settings}
    if any(isinstance(settings.get(key), str) for key in ("distill.loss", "grow.loss")):
        from pagoda.stages.loss_presets import named_losses  # it builds on this module

        settings = named_losses(settings, values)
    settings = _of_every_octave(settings, values)
    for dotted, value in settings.items():
        node, parts = values, dotted.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, dict) or part not in node:
                near = did_you_mean(part, node if isinstance(node, dict) else ())
                raise ConfigError(
                    f"unknown key `{dotted}`: no `{part}` in {'.'.join(parts[:depth]) or 'the configuration'}. {near}"
                )
            if depth == len(parts) - 1:
                node[part] = value
            else:
                node = node[part]
    return from_dict(type(config), values)


def _of_every_octave(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Single settings under `grow.loss` reach the losses of the octaves too, where octaves have their own."""
    prefix = "grow.loss."
    single = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    grow = values.get("grow")
    losses = settings.get("grow.octave_losses", grow.get("octave_losses") if isinstance(grow, Mapping) else None)
    if not single or not isinstance(losses, list | tuple):
        return dict(settings)
    changed = []
    for loss in losses:
        if not isinstance(loss, Mapping):
            return dict(settings)  # refused where it is read
        loss = copy.deepcopy(dict(loss))
        for dotted, value in single.items():
            node, parts = loss, dotted.split(".")
            for part in parts[:-1]:
                node = node[part] if isinstance(node.get(part), dict) else node.setdefault(part, {})
            node[parts[-1]] = value
        changed.append(loss)
    return {**settings, "grow.octave_losses": changed}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        ConfigError: missing, unreadable, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}.")
    return values


def to_yaml(config: Any) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)
