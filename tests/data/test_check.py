"""The check names everything that is wrong, before the long work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagoda.data import BadImage, CheckReport, ShapesSource, SourceConfig, check_source, move_bad, open_source
from pagoda.errors import ConfigError, DataError

MakePicture = Callable[..., Image.Image]


@pytest.fixture
def broken_folder(class_folder: Path, picture: MakePicture) -> Path:
    """The class folder with one planted fault of each kind beside its five good images."""
    picture(7).save(class_folder / "cats" / "whole.png")
    content = (class_folder / "cats" / "whole.png").read_bytes()
    (class_folder / "cats" / "cut.png").write_bytes(content[: len(content) // 2])
    (class_folder / "cats" / "whole.png").unlink()
    (class_folder / "cats" / "empty.png").write_bytes(b"")
    (class_folder / "dogs" / "letter.jpg").write_text("dear friend, this is not an image")
    picture(8, size=5).save(class_folder / "dogs" / "tiny.png")
    return class_folder


BAD = {
    "cats/cut.png": "truncated",
    "cats/empty.png": "0 bytes",
    "dogs/letter.jpg": "not an image",
    "dogs/tiny.png": "5x5 pixels, smaller than 8",
}


def check(source_path: Path, **options: object) -> CheckReport:
    source = open_source(source_path, options=SourceConfig(**options))  # type: ignore[arg-type]
    return check_source(source, size=8, min_images=2, progress=False)


def test_every_bad_file_is_named_with_its_reason(broken_folder: Path) -> None:
    report = check(broken_folder)
    assert {image.sample_id: image.reason for image in report.bad} == BAD
    assert (report.total, report.usable, report.classes) == (9, 5, {"cats": 3, "dogs": 2})
    with pytest.raises(
        DataError, match=r"4 of 9 images cannot be used: cats/cut\.png \(truncated\), [\s\S]*other 5"
    ) as caught:
        report.raise_if_bad()
    assert all(name in str(caught.value) and name in report.text() for name in BAD)
    check(broken_folder, on_bad="skip").raise_if_bad()


def test_a_good_set_passes_and_says_what_it_holds(class_folder: Path) -> None:
    report = check(class_folder)
    report.raise_if_bad()
    assert (report.bad, report.sizes, report.modes, report.channels) == ([], {"12x12": 5}, {"colour": 5}, 3)
    assert json.loads(json.dumps(report.to_json()))["usable"] == 5
    assert "mixed modes" not in report.text()


def test_long_lists_are_cut_in_the_message_but_not_in_the_report() -> None:
    bad = [BadImage(f"{i}.png", "0 bytes") for i in range(1234)]
    report = CheckReport(total=2000, size=8, min_images=2, bad=bad)
    with pytest.raises(DataError, match=r"1,234 of 2,000 images .* and 1,214 more"):
        report.raise_if_bad()
    assert "1233.png" in report.text()


def test_too_few_images_and_empty_classes_are_refused(class_folder: Path) -> None:
    report = check_source(open_source(class_folder), size=8, progress=False)
    with pytest.raises(DataError, match="5 usable images are too few to train on; at least 16"):
        report.raise_if_bad()
    for path in (class_folder / "dogs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no image has class 1 \(dogs\)"):
        check(class_folder, on_bad="skip").raise_if_bad()


def test_missing_captions_are_refused_only_where_text_is_asked(tmp_path: Path, picture: MakePicture) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,one\n1.png,\n2.png,three\n")
    source = open_source(tmp_path)
    check_source(source, size=8, min_images=1, progress=False).raise_if_bad()
    report = check_source(source, size=8, min_images=1, need_captions=True, progress=False)
    with pytest.raises(DataError, match=r"1 of 3 images have no caption, first `1\.png`"):
        report.raise_if_bad()
    check_source(ShapesSource(20), size=8, need_captions=True, progress=False).raise_if_bad()


def test_what_is_cut_from_images_that_are_not_square_is_said(class_folder: Path, picture: MakePicture) -> None:
    assert check(class_folder).notice is None
    assert "not square" not in check(class_folder).text()
    for name, size in (("wide", (24, 12)), ("high", (12, 16))):
        picture(5).resize(size).save(class_folder / "dogs" / f"{name}.png")
    report = check(class_folder)
    assert report.notice == (
        "2 of 7 images are not square: their centre is used, which leaves out 38% of each in the mean. "
        "source.pad=N centres images on a square of N pixels instead."
    )
    assert report.notice in report.text()
    assert check(class_folder, pad=24).notice is None


def test_exact_copies_and_mixed_modes_are_reported(class_folder: Path) -> None:
    shutil.copy(class_folder / "cats" / "a.png", class_folder / "dogs" / "copy.png")
    Image.open(class_folder / "cats" / "a.png").save(class_folder / "dogs" / "copy.bmp")  # other bytes, same pixels
    Image.fromarray(np.zeros((12, 12), dtype=np.uint8)).save(class_folder / "dogs" / "grey.png")
    report = check(class_folder)
    assert report.duplicates == [["cats/a.png", "dogs/copy.bmp", "dogs/copy.png"]]
    assert report.modes == {"colour": 7, "grey": 1}
    assert "mixed modes: colour: 7, grey: 1" in report.text()
    forced = check(class_folder, mode="grey")
    assert (forced.channels, forced.modes) == (1, report.modes)


def test_bad_files_are_moved_away_with_their_folders(tmp_path: Path, broken_folder: Path) -> None:
    source = open_source(broken_folder)
    report = check(broken_folder)
    with pytest.raises(DataError, match="lies inside of"):
        move_bad(report, source, broken_folder / "bad")
    moved = move_bad(report, source, tmp_path / "bad")
    assert {path.relative_to(tmp_path / "bad").as_posix() for path in moved} == set(BAD)
    check(broken_folder).raise_if_bad()
    (broken_folder / "cats" / "cut.png").write_bytes(b"")
    with pytest.raises(DataError, match="is there already, and nothing was moved"):
        move_bad(report, source, tmp_path / "bad")
    assert (broken_folder / "cats" / "cut.png").exists()


def test_bad_images_cannot_be_moved_out_of_an_archive(tmp_path: Path, class_folder: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", class_folder)
    source = open_source(tmp_path / "packed.zip")
    with pytest.raises(DataError, match="not out of ZipSource"):
        move_bad(check_source(source, size=8, progress=False), source, tmp_path / "bad")


def test_a_check_for_no_size_is_refused(class_folder: Path) -> None:
    with pytest.raises(ConfigError, match="size=0"):
        check_source(open_source(class_folder), size=0)
