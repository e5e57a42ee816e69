"""Plans as JSON, so that settings travel with the model that they were chosen for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pagoda.acceleration.deepcache import DeepCache
from pagoda.acceleration.faster_diffusion import FasterDiffusion
from pagoda.acceleration.plan import Plan
from pagoda.acceleration.ras import RAS
from pagoda.errors import ArtifactError, ConfigError, did_you_mean
from pagoda.files import write_text_atomic

PLANS: dict[str, type[Plan]] = {"DeepCache": DeepCache, "FasterDiffusion": FasterDiffusion, "RAS": RAS}
FILE = "acceleration.json"
FORMAT = 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values; only what differs from its defaults.

    Raises:
        ConfigError: a metric of your own, which cannot be written.
    """
    default = type(plan)()
    settings = {}
    for field in fields(plan):  # type: ignore[arg-type]
        value = getattr(plan, field.name)
        if callable(value):
            raise ConfigError(f"{plan.name}: {field.name} is a function and cannot be saved; use a named one.")
        if value != getattr(default, field.name):
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return {"plan": plan.name, **settings}


def plan_from_dict(values: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_dict` wrote.

    Raises:
        ConfigError: an unknown plan or setting, or a setting out of range.
    """
    settings = dict(values)
    name = settings.pop("plan", None)
    if name not in PLANS:
        raise ConfigError(f"unknown plan {name!r}. {did_you_mean(str(name), PLANS)}")
    known = [field.name for field in fields(PLANS[name])]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{name} has no setting `{key}`. {did_you_mean(key, known)}")
    if isinstance(settings.get("ramp"), list):
        settings["ramp"] = tuple(settings["ramp"])
    return PLANS[name](**settings)


def save_plans(path: str | Path, plans: Sequence[Plan], **facts: Any) -> Path:
    """Write plans, and how they were chosen, to a file or into a model's folder; returns the file."""
    target = Path(path)
    target = target / FILE if target.is_dir() else target
    values = {"format": FORMAT, "plans": [plan_to_dict(plan) for plan in plans], **facts}
    write_text_atomic(target, json.dumps(values, indent=2) + "\n")
    return target


def load_plans(path: str | Path) -> list[Plan]:
    """Plans of a file, or of a model's folder.

    Raises:
        ArtifactError: no such file, no JSON, or of another format.
        ConfigError: an unknown plan or setting.
    """
    target = Path(path)
    target = target / FILE if target.is_dir() else target
    try:
        values = json.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{target} is not there. Make it with `pagoda accelerate tune`.") from error
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{target} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("plans"), list):
        raise ArtifactError(f"{target} is no file of plans of format {FORMAT}.")
    return [plan_from_dict(plan) for plan in values["plans"]]
