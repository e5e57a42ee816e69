"""Images that are held out: which, what is left, and that a run is never trained on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.conftest import tiny_config

from pagoda.data import PartSource, SourceConfig, held_out_rows, open_source
from pagoda.errors import ConfigError
from pagoda.stages.config import override
from pagoda.stages.context import open_context
from pagoda.stages.judging import open_real
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import Runtime

MakePicture = Callable[..., Image.Image]
SOME = SourceConfig(hold_out=0.25)


@pytest.fixture
def folder(tmp_path: Path, picture: MakePicture) -> Path:
    for name, count in (("cats", 8), ("dogs", 20), ("owls", 2)):
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * count + i).save(tmp_path / "all" / name / f"{i}.png")
    return tmp_path / "all"


def names(source: object) -> list[str]:
    return [source.sample_id(i) for i in range(len(source))]  # type: ignore[attr-defined, arg-type]


def test_both_parts_together_are_all_images_and_show_every_class(folder: Path) -> None:
    whole = open_source(folder)
    training, held = open_source(folder, options=SOME), open_source(folder, options=SOME, part="held out")
    assert isinstance(training, PartSource)
    assert sorted(names(training) + names(held)) == sorted(names(whole))
    assert not set(names(training)) & set(names(held))
    assert training.class_names == held.class_names == whole.class_names
    counts = [sum(part.label(i) == k for i in range(len(part))) for part in (training, held) for k in range(3)]
    assert counts == [6, 15, 1, 2, 5, 1]
    for part in (training, held):
        for i in range(len(part)):
            row = names(whole).index(part.sample_id(i))
            assert part.image(i).tobytes() == whole.image(row).tobytes()
            assert (part.label(i), part.caption(i)) == (whole.label(row), whole.caption(row))
            assert part.metadata(i) == whole.metadata(row)
    assert len({part.fingerprint for part in (training, held, whole)}) == 3


def test_names_decide_and_not_the_order_or_the_pixels(folder: Path, tmp_path: Path) -> None:
    held = names(open_source(folder, options=SOME, part="held out"))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in other.rglob("*.png"):
        Image.new("RGB", (12, 12)).save(path)
    assert names(open_source(other, options=SOME, part="held out")) == held
    (other / "dogs" / "0.png").rename(other / "dogs" / "another.png")
    changed = set(names(open_source(other, options=SOME, part="held out"))) ^ set(held)
    assert len(changed) <= 2  # the renamed one, and who takes its place


def test_without_labels_one_share_is_taken_of_all(tmp_path: Path, picture: MakePicture) -> None:
    for i in range(9):
        picture(i).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path)
    assert len(held_out_rows(source, 0.5)) == 4
    assert len(held_out_rows(source, 0.001)) == 1
    assert len(held_out_rows(source, 0.999)) == 8


def test_what_cannot_be_split_is_refused(folder: Path) -> None:
    (folder / "owls" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"`owls/1.png` is the only image of class owls: add images, filter"):
        open_source(folder, options=SOME)
    with pytest.raises(ConfigError, match=r"source.hold_out is a share of the images in \[0, 1\), got 1.0"):
        SourceConfig(hold_out=1.0)
    with pytest.raises(ConfigError, match=r"no images are held out: set source.hold_out above 0"):
        open_source(folder, part="held out")


def test_a_run_compares_its_walk_with_the_images_that_it_holds_out(tmp_path: Path) -> None:
    config = override(tiny_config(), {"data": "shapes:count=80,seed=2", "source.hold_out": 0.25})
    train(config, tmp_path / "run", quiet=True)
    run = RunFolder.open(tmp_path / "run")
    context = open_context(run, config, Runtime("cpu"), quiet=True)
    held = open_real(run, config, None, 8, Runtime("cpu"), part="held out")
    assert (len(context.data), len(held)) == (60, 20)
    assert not set(context.data.sample_ids) & set(held.sample_ids)
    for facts in load_gaps(run).values():
        assert facts["unseen"]["kind"] == "held out"
        assert 8 <= facts["unseen"]["count"] <= 20
    assert "images that the run holds out" in (run.path / "report.html").read_text(encoding="utf-8")
    plain = open_real(run, config, "shapes:count=80,seed=2", 8, Runtime("cpu"))
    assert torch.equal(
        plain.pictures(torch.arange(60), 8), context.data.pictures(torch.arange(60), 8)
    )  # its own training images
    other = open_real(run, config, "shapes:count=30,seed=9", 8, Runtime("cpu"))
    assert len(other) == 30  # nothing is held out of other images
