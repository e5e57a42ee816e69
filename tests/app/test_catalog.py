"""The catalog sees the runs below its root and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pagoda.app import RunCatalog
from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import write_text_atomic
from pagoda.stages.run_folder import RunFolder


def test_runs_are_listed_with_what_they_can_make_and_why_not(runs: Path) -> None:
    found = {entry.name: entry for entry in RunCatalog(runs).entries()}
    assert list(found) == ["finished", "nested/under-way", "newer", "texts"]
    assert found["finished"].sizes == (8, 16)
    assert found["nested/under-way"].sizes == ()
    assert found["finished"].problem == found["nested/under-way"].problem == ""
    assert "made by pagoda 99.0" in found["newer"].problem


HOSTILE = [
    "../finished",
    "finished/../../etc",
    "finished/./../finished",
    "/etc",
    "",
    ".",
    "..",
    "finished/",
    "//finished",
    "finished\\..\\..",
    "finished\0",
    "finished\n",
    "notes",
    "notes/secret.txt",
    "outside",
    "borrowed",
    ".hidden",
    "a/b/c/d/e",
    "x" * 5000,
    None,
    7,
    ["finished"],
    {"name": "finished"},
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:30])
def test_a_name_that_is_no_run_below_the_root_is_refused(runs: Path, tmp_path: Path, name: object) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "finished").symlink_to(runs / "finished")  # leads out of this root
    (root / "outside").symlink_to("/etc")
    (root / "notes").mkdir()
    for folder in ("borrowed", ".hidden"):
        (root / folder).mkdir()
    (root / "borrowed" / "config.yaml").symlink_to(runs / "finished" / "config.yaml")
    (root / ".hidden" / "config.yaml").write_text("seed: 0\n")
    for catalog in (RunCatalog(root), RunCatalog(runs)):
        with pytest.raises(ArtifactError, match="there is no run"):
            catalog.open(name)
    assert RunCatalog(root).entries() == []


def test_a_root_that_is_a_run_is_the_only_one(runs: Path) -> None:
    catalog = RunCatalog(runs / "finished")
    assert [entry.name for entry in catalog.entries()] == ["finished"]
    assert catalog.open("finished").path == runs / "finished"
    with pytest.raises(ArtifactError):
        catalog.open("teacher")


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        RunCatalog(tmp_path / "nowhere")


def test_a_run_that_is_being_written_or_damaged_is_listed_with_its_problem(tmp_path: Path) -> None:
    for name, text in (("half", "base: 8\nsize: [unfinish"), ("foreign", "seed: 0\ncolour_of_the_sky: blue\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    found = RunCatalog(tmp_path).entries()
    assert [entry.name for entry in found] == ["foreign", "half"]
    assert all(entry.problem for entry in found)
    assert "colour_of_the_sky" in found[0].problem


def test_a_run_is_read_once_and_again_when_it_was_written(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "finished"
    shutil.copytree(finished_run.path, run)
    catalog, read, config = RunCatalog(tmp_path / "runs"), [], RunFolder.config
    monkeypatch.setattr(RunFolder, "config", lambda self: (read.append(self.path), config(self))[1])
    for _ in range(3):
        catalog.open("finished")
    assert len(read) == 1
    write_text_atomic(run / "config.yaml", (run / "config.yaml").read_text() + "\n# looked through\n")
    catalog.open("finished")
    assert len(read) == 2
    write_text_atomic(run / "config.yaml", "no: settings of ours\n")
    with pytest.raises(ConfigError):
        catalog.open("finished")
    with pytest.raises(ConfigError):
        catalog.open("finished")  # what was refused is read again
