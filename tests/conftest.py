"""Shared by all tests: small thread pools, and a tiny run of the whole way that several tests read."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.tiny_adopted import AdoptedRuns

torch.set_num_threads(1)

TINY = {
    "device": "cpu",
    "precision": "float32",  # the same on every CPU; tests/stages/test_precision.py covers the other one
    "backbone.channels": [16, 32],
    "backbone.head_dim": 16,
    "teach.loop.steps": 6,
    "teach.loop.batch_size": 8,
    "teach.loop.checkpoint_every": 2,
    "teach.loop.log_every": 2,
    "teach.loop.preview_every": 0,  # a grid of the teacher is 35 calls of it, and there are two a preview
    "encode.num_nodes": 4,
    "encode.shard_size": 16,
    "encode.batch_size": 8,
    "distill.mode": "rec",
    "distill.loss.adversarial": 0.05,
    "distill.loss.adversarial_from": 0.5,
    "distill.loop.steps": 6,
    "distill.loop.batch_size": 8,
    "distill.loop.checkpoint_every": 2,
    "distill.loop.log_every": 2,
    "distill.loop.preview_every": 3,
    "grow.steps": [4],
    "grow.batch_size": [8],
    "grow.channels": [16],
    "grow.fakes": 16,
    "grow.loss.adversarial": 0.05,
    "grow.loss.crop": 8,
    "grow.loss.adversarial_from": 0.5,
    "grow.loop.checkpoint_every": 2,
    "grow.loop.log_every": 2,
    "grow.loop.preview_every": 2,
    # Bounds on what last bits grow to were measured with these; they must not move when a preset is tuned.
    "distill.matching.weight": 0.0,
    "distill.loss.feature": 0.3,
    "grow.targets": "images",
    "grow.match_detail": False,
    "distill.optimizer.lr": 2e-3,
    "distill.loss.huber": 0.03,
    "grow.optimizer.lr": 2e-3,
    "grow.loss.huber": 0.03,
    "grow.loss.feature": 1.0,
    "encode.share": 1.0,
}
"""Settings that make every stage take a second."""


def tiny_config(**changes: object) -> RunConfig:
    """shapes, 8 -> 16 px, a few steps a stage; keys of `changes` are dotted with `__`."""
    config = override(preset_config("tiny", "shapes:count=40", base=8, size=16), TINY)
    return override(config, {key.replace("__", "."): value for key, value in changes.items()})


TEXT = {
    "condition": "text",
    "text.two_tower.image_size": 16,
    "text.two_tower.width": 32,
    "text.two_tower.depth": 1,
    "text.two_tower.heads": 2,
    "text.two_tower.dim": 16,
    "text.two_tower.vocab_size": 300,
    "text.two_tower.loop.steps": 4,
    "text.two_tower.loop.batch_size": 8,
    "text.two_tower.loop.checkpoint_every": 2,
    "teach.loop.steps": 4,
    "distill.loop.steps": 4,
    "distill.loop.preview_every": 4,
    "grow.steps": [3],
}


def text_config(**changes: object) -> RunConfig:
    """`tiny_config`, told captions."""
    return override(tiny_config(), {**TEXT, **{key.replace("__", "."): value for key, value in changes.items()}})


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported is no garbage: without this, every collection between stages walks through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fresh weights are drawn from the global generator: what a test draws must not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that went all the way. Read it, do not write into it."""
    from pagoda.stages.train import train

    folder: Path = tmp_path_factory.mktemp("finished") / "run"
    return train(tiny_config(teach__loop__preview_every=3), str(folder), quiet=True)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of texts that went all the way. Read it, do not write into it."""
    from pagoda.stages.train import train

    return train(text_config(teach__loop__preview_every=4), str(tmp_path_factory.mktemp("text") / "run"), quiet=True)


@pytest.fixture(scope="session")
def adopted_runs(tmp_path_factory: pytest.TempPathFactory) -> AdoptedRuns:
    """Runs of teachers from elsewhere, by kind. Read them, do not write into them."""
    from tests.tiny_adopted import AdoptedRuns, Folders

    root: Path = tmp_path_factory.mktemp("adopted")
    return AdoptedRuns(root / "runs", Folders(root / "teachers"))


CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a window; one for all tests, since Playwright opens once a process."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright. Run: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium. Run: apt-get install --no-install-recommends chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()
