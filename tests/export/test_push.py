"""`pagoda push`: a folder with what a repository would hold, equal pixels from there, and refusals before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagoda.cli.main import main
from pagoda.errors import ConfigError, ResourceError
from pagoda.export import push_run
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.run_folder import RunFolder

Capture = pytest.CaptureFixture[str]
FILES = [
    "README.md",
    "generator/config.json",
    "generator/diffusion_pytorch_model.safetensors",
    "model_index.json",
    "pagoda.json",
]


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_what_was_pushed_makes_the_same_pixels(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "hub" / "shapes"
    assert main(["push", str(finished_run.path), f"file:{place}", "--licence", "cc-by-4.0"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"bytes in 5 files\nwritten to {place}\n")
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()) == FILES
    settings = {"num_images": 4, "seed": 3, "output_type": "pt"}
    there, here = (PagodaPipeline.from_pretrained(path)(**settings).images for path in (place, finished_run.path))
    assert torch.equal(there, here)
    assert "license: cc-by-4.0" in (place / "README.md").read_text()
    # Pushed again, it is replaced as a whole.
    assert push_run(finished_run, str(place), licence="mit", size=8).place == str(place)
    assert PagodaPipeline.from_pretrained(place).resolutions == [8]


@pytest.mark.parametrize("target", ["file:{}/x", "somebody/shapes"])
def test_a_dry_run_shows_the_files_and_writes_nothing(target: str, finished_run: RunFolder, tmp_path: Path) -> None:
    pushed = push_run(finished_run, target.format(tmp_path), licence="mit", dry_run=True)
    assert sorted(pushed.files) == FILES
    weights = finished_run.path / "generator-16" / "diffusion_pytorch_model.safetensors"
    assert pushed.files[FILES[2]] == weights.stat().st_size
    assert "would go to" in str(pushed)
    assert list(tmp_path.iterdir()) == []


def test_a_licence_is_asked_for(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["push", str(finished_run.path), f"file:{tmp_path}/x"])
    assert "licence" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="got 'no idea'"):
        push_run(finished_run, f"file:{tmp_path}/x", licence="no idea")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("shapes", {}, r"neither owner/name, .* write \./shapes for a folder"),
        ("a/b/c", {}, "neither owner/name"),
        ("file:", {}, "names no folder"),
        ("./x", {"public": True}, "--public is for repositories of the hub"),
        ("somebody/shapes", {}, "Run `hf auth login`"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    target: str,
    options: dict[str, bool],
    message: str,
    finished_run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        push_run(finished_run, target, licence="mit", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_said_so(finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="the hub cannot be reached"):
        push_run(finished_run, "somebody/shapes", licence="mit")
