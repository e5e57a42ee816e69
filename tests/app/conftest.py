"""One app and one browser for all tests of the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagoda.stages.run_folder import RunFolder

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture(scope="session")
def runs(finished_run: RunFolder, text_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one under way, one of a newer version, one of texts, and something that is no run."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run.path, root / "finished")
    shutil.copytree(finished_run.path, root / "nested" / "under-way")
    under_way = RunFolder.open(root / "nested" / "under-way")
    for size in (8, 16):
        shutil.rmtree(under_way.generator(size))
    (under_way.path / "stages" / "grow-16.json").unlink()
    record = under_way.record("distill")
    assert record is not None
    under_way.write_record("distill", {**record, "done": False, "results": {}})
    shutil.copytree(finished_run.path, root / "newer")
    path = root / "newer" / "stages" / "teach.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "99.0"}))
    shutil.copytree(text_run.path, root / "texts")
    (root / "notes").mkdir()
    (root / "notes" / "secret.txt").write_text("hidden words")
    os.utime(root / "finished" / "config.yaml")  # the newest is shown first
    return root


@pytest.fixture(scope="session")
def app(runs: Path) -> Iterator[Any]:
    """The app, listening."""
    pytest.importorskip("gradio", reason="needs Gradio. Run: pip install 'pagoda[app]'", exc_type=ImportError)
    from pagoda.app.server_config import ServerConfig
    from pagoda.app.serving import AppConfig, RunningApp
    from pagoda.app.uploads import UploadLimits

    limits = UploadLimits(max_bytes=2**20, max_pixels=2**20, max_side=2048)
    with RunningApp(runs, AppConfig(port=0, server=ServerConfig(batch_size=4), limits=limits)) as running:
        yield running
