"""Runs on drawn shapes that the experiments of the theory share: begun once, continued in copies, scored alike."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.metrics import score_images
from benchmarks.shapes import judge, real_images
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import StageContext, open_context
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.training import Runtime

FIRST_SEED = 1_000_000
"""Seeds of scored samples start here."""
CLASSES = 10


def shapes_config(seed: int, *, base: int, size: int, budget: float, **changes: Any) -> RunConfig:
    """The demo's settings with its steps shortened; keys of `changes` are dotted with `__`."""
    config = preset_config("tiny", f"shapes:count={max(200, round(6000 * budget))}", base=base, size=size)
    steps = {
        "teach.loop.steps": config.teach.loop.steps,
        "distill.loop.steps": config.distill.loop.steps,
        "distill.teacher_pairs.count": config.distill.teacher_pairs.count,
    }
    settings: dict[str, Any] = {name: max(20, round(budget * value)) for name, value in steps.items()}
    settings |= {"grow.steps": [max(20, round(budget * value)) for value in config.grow.steps]}
    settings |= {
        "seed": seed,
        "mirror": False,
        "device": "cpu",
        "encode.share": 1.0,
    }  # a mirrored crescent is not drawn by the set
    # Nobody looks at what is drawn and measured on the way.
    settings |= {f"{stage}.loop.preview_every": 0 for stage in ("teach", "distill", "grow")}
    settings["evaluation.gap.count"] = 0
    return override(config, settings | {key.replace("__", "."): value for key, value in changes.items()})


@lru_cache(maxsize=1)
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pagoda-theory-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_BEGUN: dict[str, Path] = {}


def begun(config: RunConfig, until: str) -> Path:
    """A run of this configuration up to a stage, made once in a process. Continue it in a copy (`continued`)."""
    key = f"{until} {config!r}"
    if key not in _BEGUN:
        path = _scratch() / f"run-{len(_BEGUN)}"
        train(config, str(path), until=until, quiet=True)
        _BEGUN[key] = path
    return _BEGUN[key]


@contextmanager
def continued(path: Path) -> Iterator[Path]:
    """A copy of a run, removed in the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(path, Path(folder) / "run"))


@contextmanager
def finished(path: Path, config: RunConfig, until: str) -> Iterator[RunFolder]:
    """A copy of a run, taken on to a stage under a configuration that keeps the stages that it has."""
    with continued(path) as copy:
        yield train(config, str(copy), until=until, quiet=True)


def context_of(path: Path, config: RunConfig) -> StageContext:
    """For stages that are run by hand."""
    run = RunFolder.open(path)
    run.write_config(config)
    return open_context(run, config, Runtime(config.device, config.precision), quiet=True)


def samples(run: RunFolder, size: int, count: int, *, resolution: int | None = None) -> Tensor:
    """Images (count, 3, r, r) of the generator of `size`, every class alike."""
    generator = load_generator(run, size)
    seeds = list(range(FIRST_SEED, FIRST_SEED + count))
    return sample_images(generator, seeds, labels=[seed % CLASSES for seed in seeds], resolution=resolution)


def distance(images: Tensor, seed: int) -> dict[str, float]:
    """Fréchet distance in the features of a classifier of held-out images, and its floor."""
    size = images.shape[-1]
    found = score_images(ClassifierFeatures(judge(size)), *real_images(size), images, seed)
    return {"distance": found["distance"], "floor": found["floor"]}


def latent_std(run: RunFolder) -> float:
    """Standard deviation of the encoded images."""
    return float(run.require("encode", f"pagoda encode {run.path}")["results"]["std"])


def seconds(run: RunFolder) -> float:
    """Of all stages that are done."""
    records = [run.record(path.stem) or {} for path in (run.path / "stages").glob("*.json")]
    return sum(float(record.get("results", {}).get("seconds", 0.0)) for record in records)


def num_scored(budget: float) -> int:
    """Samples that are scored."""
    return max(200, round(2000 * budget))
