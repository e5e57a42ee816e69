"""The plan of a run, kept in its folder when it was made, so that it stands beside what the run then took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError
from pagoda.files import write_text_atomic
from pagoda.stages.config import RunConfig, to_dict
from pagoda.stages.plan_model import RunPlan
from pagoda.stages.run_folder import FREE_KEYS, PLAN_FILE, RunFolder
from pagoda.version import __version__

_STAGE_KEYS = ("name", "seconds", "before_seconds", "memory_bytes", "disk_bytes", "total_multiply_adds", "gpu_hours")


def keep_plan(folder: Path | str, plan: RunPlan, config: RunConfig) -> Path | None:
    """Write `plan.json` into a run folder, or into one that shall become a run; returns its path.

    A folder that holds other things is left alone, and None returned: `pagoda plan --out` may name a disk.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        return None
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {PLAN_FILE} and not RunFolder(folder).config_path.is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    done = [stage.name for stage in plan.stages if run.is_done(stage.name)]
    facts = {"plan": plan.to_json(), "config": to_dict(config), "done": done, "version": __version__}
    write_text_atomic(folder / PLAN_FILE, json.dumps(facts, indent=1))
    return folder / PLAN_FILE


def kept_plan(run: RunFolder) -> dict[str, Any] | None:
    """What `keep_plan` wrote last, or None where it never did.

    It holds `plan` as `RunPlan.to_json` gives it, the `config` that it was made for, and the stages that were `done` by then.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = run.path / PLAN_FILE
    if not path.is_file():
        return None
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
        for stage in facts["plan"]["stages"]:
            for key in _STAGE_KEYS:
                stage[key]
        facts["plan"]["total"]["kept_bytes"], facts["plan"]["gpu"]["name"], facts["config"], facts["done"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} holds no plan ({error!r}). Remove it, or run `pagoda plan --run {run.path}`."
        ) from error
    return facts


def changed_since(planned: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Settings that decide what a run takes and that are not those of the plan, as `key was a, is b`."""
    before, now = _flat(planned), _flat(json.loads(json.dumps(to_dict(config))))
    keys = [key for key in [*before, *(k for k in now if k not in before)] if not _watches(key)]
    return [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _watches(key: str) -> bool:
    """Whether a setting says where or how a run is watched only."""
    parts = key.split(".")
    return parts[0] == "evaluation" or any(part in FREE_KEYS and part != "device" for part in parts) or key == "seed"


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return found
