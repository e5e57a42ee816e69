"""Checkpoints: one folder a step, safetensors and a small JSON file, written beside and renamed: a kill leaves the old or the new."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.errors import ArtifactError
from pagoda.files import load_tensors, named_disk_errors, save_tensors, write_text_atomic
from pagoda.training.optim import EMA

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainState:
    """Everything of one network that training changes."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None


def save_checkpoint(
    folder: Path, step: int, states: Mapping[str, TrainState], *, info: Mapping[str, Any], keep_last: int = 2
) -> Path:
    """Write `folder/step-<step>` whole or not at all, then delete all but the newest `keep_last`.

    Args:
        folder: Where checkpoints live; made when missing.
        step: Steps done so far.
        states: Networks by name.
        info: JSON-able facts kept beside the weights (fingerprint of the run, seconds spent, ...).
        keep_last: How many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        ResourceError: the disk became full. The checkpoints before it are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    target = folder / f"step-{step:08d}"
    part = folder / f".writing-{target.name}"
    with named_disk_errors(target):
        part.mkdir()
        for name, state in states.items():
            save_tensors(part / f"{name}.safetensors", dict(state.module.state_dict()))
            if state.optimizer.state:  # empty before its first step, and safetensors does not read back an empty file
                save_tensors(part / f"{name}.optimizer.safetensors", _flatten(state.optimizer))
            if state.ema is not None:
                save_tensors(part / f"{name}.ema.safetensors", dict(state.ema.module.state_dict()))
        stepped = sorted(name for name, state in states.items() if state.optimizer.state)
        facts = {"format": 1, "step": step, "networks": sorted(states), "stepped": stepped, **info}
        write_text_atomic(part / "state.json", json.dumps(facts, indent=1))
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut
    finally:
        os.close(descriptor)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file())


def clean_up(folder: Path) -> None:
    """Remove what a killed process was writing."""
    if folder.is_dir():
        for path in folder.glob(".writing-*"):
            shutil.rmtree(path)


def load_checkpoint(
    path: Path, states: Mapping[str, TrainState], *, expect: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load a checkpoint into the networks, optimisers and averages in place.

    Args:
        path: A folder that `save_checkpoint` wrote.
        states: Where to load to; names must be those saved.
        expect: Facts of `info` that must agree.

    Returns:
        The facts saved beside the weights, `step` among them.

    Raises:
        ArtifactError: truncated, foreign, of another run or of other networks. Nothing is loaded then.
    """
    try:
        facts: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not a checkpoint ({error}). Remove that folder to go on from the one before it."
        ) from error
    for key, value in (expect or {}).items():
        if facts.get(key) != value:
            raise ArtifactError(
                f"{path} belongs to another run: its {key} is {facts.get(key)!r}, this run's is {value!r}. "
                "Use another --out, or the configuration that the run was started with."
            )
    if facts.get("networks") != sorted(states):
        raise ArtifactError(
            f"{path} holds the networks {facts.get('networks')}, this run trains {sorted(states)}. Use another --out, or the configuration "
            "that the run was started with."
        )
    # Everything is read and compared before anything is changed.
    loaded: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = {}
    for name, state in states.items():
        weights = _read(path, f"{name}.safetensors")
        _compare(path / f"{name}.safetensors", weights, dict(state.module.state_dict()))
        optimizer: dict[str, Tensor] = {}
        if name in facts["stepped"]:
            optimizer = _read(path, f"{name}.optimizer.safetensors")
        average: dict[str, Tensor] = {}
        if state.ema is not None:
            average = _read(path, f"{name}.ema.safetensors")
            _compare(path / f"{name}.ema.safetensors", average, dict(state.ema.module.state_dict()))
        loaded[name] = (weights, optimizer, average)
    for name, state in states.items():
        weights, optimizer, average = loaded[name]
        state.module.load_state_dict(weights)
        _restore(state.optimizer, optimizer)
        if state.ema is not None:
            state.ema.module.load_state_dict(average)
    return facts


def _read(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint; what is wrong with it is said with what to do about the whole folder."""
    try:
        tensors, _ = load_tensors(checkpoint / name)
    except ArtifactError as error:
        what = str(error).partition(". ")[0].removesuffix(".")
        raise ArtifactError(
            f"{what}. Nothing was loaded. Remove the folder {checkpoint}: the same command then goes on from the checkpoint before it, or "
            "starts the stage anew."
        ) from error
    return tensors


def _compare(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = [n for n in wanted if n in found and wanted[n].shape != found[n].shape]
    if missing or foreign or shapes:
        raise ArtifactError(
            f"{path} does not fit the network: missing {missing[:3]}, foreign {foreign[:3]}, other shape {shapes[:3]}. "
            f"It was written by another configuration: use that, or another --out, or remove the folder {path.parent} to go on from the "
            "checkpoint before it."
        )


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as named tensors: `<parameter index>.<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


def _restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
