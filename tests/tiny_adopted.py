"""Runs of tiny teachers that were trained elsewhere, one of each kind, each made when it is first asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conftest import TINY
from tests.tiny_teachers import DATA, SIZE, TEACHERS, WITH_CLASSES, make_teacher

from pagoda.stages.adopt import teacher_settings
from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train

STEPS = dict.fromkeys(TEACHERS, 150) | {"dit": 200, "sd3": 200, "ddpm-x0": 400}
"""Enough for latents of about unit variance."""
UNSAID = ("ddpm", "ddpm-v", "ddpm-x0", "class-unet")
"""U-Nets with a row more than there are classes: what it stands for must be told."""
SHORT = {
    "evaluation__gap__count": 0,
    "distill__loop__steps": 2,
    "distill__loop__preview_every": 0,
    "grow__steps": [2],
    "grow__loop__preview_every": 0,
    "grow__loss__adversarial": 0.0,
}
"""For the kinds that differ in what is read of the teacher, not in what is done with it: the second of two steps is judged."""


class Folders(dict[str, Path]):
    """Teachers by kind, each trained when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        self[kind] = make_teacher(self.root / kind, kind, steps=STEPS[kind])
        return self[kind]


def as_pipeline(folder: Path, path: Path) -> Path:
    """The same transformer as the folder of a pipeline."""
    (path / "scheduler").mkdir(parents=True)
    shutil.copytree(folder, path / "transformer", ignore=shutil.ignore_patterns("scheduler_config.json"))
    shutil.copy(folder / "scheduler_config.json", path / "scheduler")
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "vae": [None, None], **parts}))
    return path


def config_for(folder: Path, **changes: object) -> RunConfig:
    """8 -> 16 px in a few steps; keys of `changes` are dotted with `__`."""
    settings = {key: value for key, value in TINY.items() if not key.startswith("teach.")}
    settings |= {**teacher_settings(str(folder)), "encode.num_nodes": 8}
    if folder.name in UNSAID:
        settings["teacher.null_class"] = "last"
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return override(preset_config("tiny", DATA, base=SIZE, size=2 * SIZE), settings)


class AdoptedRuns(dict[str, RunFolder]):
    """Finished runs by kind of teacher. Read them, do not write into them."""

    def __init__(self, root: Path, folders: dict[str, Path]) -> None:
        super().__init__()
        self.root = root
        self.folders = folders

    def __missing__(self, kind: str) -> RunFolder:
        folder = self.folders[kind]
        if kind == "dit":
            folder = as_pipeline(folder, self.root / "pipeline")
        changes: dict[str, object] = {} if kind in ("ddpm", "dit", "sd3") else dict(SHORT)
        if kind not in WITH_CLASSES:
            changes["teacher__labels"] = False
        if (
            kind == "ddpm-x0"
        ):  # the ODE divides an error in x0 by the noise level: a tiny network is too rough for the lowest ones
            changes["encode__sigma_min"] = 0.3
        self[kind] = train(config_for(folder, **changes), str(self.root / kind), quiet=True)
        return self[kind]
