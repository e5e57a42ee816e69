"""The pictures of the page on editing, from a small finished run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from pagoda.images import make_grid, read_metadata
from pagoda.stages.run_folder import RunFolder
from recipes import editing_pictures


def test_every_picture_is_drawn_of_shapes_that_the_run_has_not_seen(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(editing_pictures, "COUNT", 5)
    monkeypatch.setattr(sys, "argv", ["editing_pictures", "--run", str(finished_run.path), "--out", str(tmp_path)])
    assert editing_pictures.main() == 0
    grids = ["reconstruct", "transfer", "interpolate", "inpaint", "upscale", "restore"]
    ways = ["way-0-1.webp", "way-3-4.webp"]
    expected = sorted([f"editing-{name}.png" for name in grids] + [f"editing-{name}" for name in ways])
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert len(capsys.readouterr().out.split()) == len(expected)
    _, reduced, labels = editing_pictures.unseen(16)
    facts = read_metadata(tmp_path / "editing-upscale.png")
    assert (facts["edit"], facts["labels"], facts["shapes_seed"]) == ("upscale", labels, editing_pictures.UNSEEN)
    for name in grids:
        assert read_metadata(tmp_path / f"editing-{name}.png")["model"] == facts["model"]
    # The first row of `reconstruct` is the shapes themselves.
    row = make_grid(reduced, columns=5, scale=2)
    with Image.open(tmp_path / "editing-reconstruct.png") as wide:
        assert wide.crop((0, 0, row.width, row.height)).convert("RGB").tobytes() == row.convert("RGB").tobytes()
