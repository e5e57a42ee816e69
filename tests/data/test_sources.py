"""Folders, archives, IDX and Parquet: one list of images from each."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagoda.data import BadImageError, ImageSource, ShapesSource, SourceConfig, ZipSource, open_source
from pagoda.errors import ConfigError, DataError

MakePicture = Callable[..., Image.Image]


def zipped(folder: Path, archive: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


def listing(source: ImageSource) -> list[tuple[str, int | None, str | None, bytes]]:
    indices = range(len(source))
    return [(source.sample_id(i), source.label(i), source.caption(i), source.image(i).tobytes()) for i in indices]


@pytest.fixture
def captioned_folder(tmp_path: Path, picture: MakePicture) -> Path:
    """Six images under images/ with captions, labels 0 to 2, and their group in words."""
    folder = tmp_path / "captioned"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(6):
        picture(i).save(folder / "images" / f"{i}.png")
        row = {"file_name": f"images/{i}.png", "text": f"picture {i}", "label": i % 3, "group": "abc"[i % 3]}
        rows.append(row | {"tone": "" if i < 3 else "dark", "words": ["p", str(i)]})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_class_subfolders_become_labels_in_sorted_order(class_folder: Path, picture: MakePicture) -> None:
    source = open_source(class_folder)
    assert isinstance(source, ImageSource)
    assert source.class_names == ["cats", "dogs"]
    assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 1, 1]
    assert source.sample_id(3) == "dogs/a.png"
    assert (source.channels, source.num_classes, source.caption(0)) == (3, 2, None)
    assert source.image(3).tobytes() == picture(3).tobytes()


def test_a_zip_equals_its_folder_whichever_way_it_was_packed(
    tmp_path: Path, class_folder: Path, captioned_folder: Path
) -> None:
    for folder in (class_folder, captioned_folder):
        plain = listing(open_source(folder))
        assert listing(open_source(zipped(folder, tmp_path / "a.zip"))) == plain
        assert listing(open_source(zipped(folder, tmp_path / "b.zip", prefix="top/"))) == plain


def test_a_zip_survives_a_trip_to_another_process(tmp_path: Path, class_folder: Path) -> None:
    source = open_source(zipped(class_folder, tmp_path / "a.zip"))
    assert isinstance(source, ZipSource)
    copy = pickle.loads(pickle.dumps(source))
    assert listing(copy) == listing(source)
    source.close()
    assert listing(source) == listing(copy)


def test_a_flat_folder_and_a_single_subfolder_have_no_labels(tmp_path: Path, class_folder: Path) -> None:
    shutil.rmtree(class_folder / "dogs")
    single = open_source(class_folder)
    flat = open_source(class_folder / "cats")
    assert listing(single) == listing(flat)
    assert (flat.num_classes, flat.class_names, flat.label(0)) == (0, None, None)


def test_other_files_and_hidden_ones_are_left_alone(class_folder: Path) -> None:
    before = listing(open_source(class_folder))
    (class_folder / "README.txt").write_text("about")
    (class_folder / ".thumbs").mkdir()
    (class_folder / ".thumbs" / "a.png").write_bytes(b"")
    (class_folder / "__MACOSX").mkdir()
    (class_folder / "__MACOSX" / "a.png").write_bytes(b"")
    assert listing(open_source(class_folder)) == before


def test_images_beside_class_folders_are_refused(class_folder: Path, picture: MakePicture) -> None:
    picture(9).save(class_folder / "stray.png")
    with pytest.raises(DataError, match=r"1 images beside the folders cats, dogs"):
        open_source(class_folder)


def test_split_folders_are_chosen_by_split(tmp_path: Path, class_folder: Path) -> None:
    root = tmp_path / "splits"
    shutil.copytree(class_folder, root / "train")
    shutil.copytree(class_folder, root / "test")
    (root / "test" / "cats" / "a.png").unlink()
    assert len(open_source(root)) == 5
    assert len(open_source(root, options=SourceConfig(split="test"))) == 4
    with pytest.raises(DataError, match="has the splits test, train, and no `val`"):
        open_source(root, options=SourceConfig(split="val"))
    with pytest.raises(DataError, match="has no splits"):
        open_source(class_folder, options=SourceConfig(split="test"))


def test_metadata_gives_captions_labels_and_filters(captioned_folder: Path) -> None:
    source = open_source(captioned_folder)
    assert (source.caption(4), source.label(4), source.class_names) == ("picture 4", 1, ["a", "b", "c"])
    assert source.metadata(4)["tone"] == "dark"
    kept = open_source(captioned_folder, options=SourceConfig(filter="tone=", caption_column="words"))
    assert [kept.caption(i) for i in range(len(kept))] == ["p, 0", "p, 1", "p, 2"]
    by_group = open_source(captioned_folder, options=SourceConfig(label_column="group"))
    assert listing(by_group) == listing(source)
    with pytest.raises(DataError, match=r"no image has class 2 \(c\)"):
        open_source(captioned_folder, options=SourceConfig(filter="label in 0|1"))
    two = open_source(captioned_folder, options=SourceConfig(filter="label in 0|2", compact_labels=True))
    assert (two.class_names, [two.label(i) for i in range(len(two))]) == (["a", "c"], [0, 1, 0, 1])


def test_csv_metadata_reads_like_jsonl(tmp_path: Path, captioned_folder: Path) -> None:
    before = listing(open_source(captioned_folder))
    lines = ["file_name,text,label"] + [f'images/{i}.png,"picture {i}",{i % 3}' for i in range(6)]
    (captioned_folder / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"both metadata\.jsonl and metadata\.csv"):
        open_source(captioned_folder)
    (captioned_folder / "metadata.jsonl").unlink()
    assert listing(open_source(captioned_folder)) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "name,text\na.png,hello\n", "row 0 .* has no `file_name`"),
        ("metadata.csv", "file_name,text\na.png,one,two\n", "another number of values"),
        ("metadata.csv", "file_name\n", "has no rows"),
        ("metadata.jsonl", '{"file_name": "a.png"\n', "line 1 .* is not JSON"),
        ("metadata.jsonl", "[1]\n", "is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "../secret.png"}\n', "outside of the data"),
        ("metadata.jsonl", '{"file_name": "/etc/secret.png"}\n', "outside of the data"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": "./a.png"}\n', "listed more than once"),
        ("metadata.jsonl", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_unusable_metadata_is_refused(
    tmp_path: Path, picture: MakePicture, name: str, content: str | bytes, message: str
) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def test_unknown_columns_are_named_with_the_nearest(captioned_folder: Path) -> None:
    for options, column in (
        (SourceConfig(filter="tune="), "tone"),
        (SourceConfig(label_column="grup"), "group"),
        (SourceConfig(caption_column="texts"), "text"),
    ):
        with pytest.raises(DataError, match=f"Did you mean `{column}`"):
            open_source(captioned_folder, options=options)


def test_a_bad_image_is_named_with_its_reason(captioned_folder: Path) -> None:
    (captioned_folder / "images" / "2.png").write_bytes(b"")
    (captioned_folder / "images" / "4.png").unlink()
    source = open_source(captioned_folder)
    with pytest.raises(BadImageError, match=r"`images/2\.png` cannot be used: 0 bytes"):
        source.image(2)
    with pytest.raises(BadImageError, match=r"`images/4\.png` cannot be used: missing"):
        source.image(4)
    error = pickle.loads(pickle.dumps(BadImageError("a.png", "0 bytes")))
    assert (error.sample_id, error.reason) == ("a.png", "0 bytes")


def test_grey_sets_are_grey_and_a_coloured_image_in_them_is_bad(tmp_path: Path, picture: MakePicture) -> None:
    for i in range(100):
        picture(i, channels=1).convert("RGB" if i % 2 else "L").save(tmp_path / f"{i:03d}.png")
    source = open_source(tmp_path)
    assert source.channels == 1
    assert source.image(1).tobytes() == picture(1, channels=1).tobytes()
    assert open_source(tmp_path, options=SourceConfig(mode="rgb")).image(0).mode == "RGB"
    picture(0).save(tmp_path / "051.png")  # not one of the 32 that are looked at
    source = open_source(tmp_path)
    assert source.channels == 1
    with pytest.raises(BadImageError, match=r"051\.png.*set source\.mode to rgb or grey"):
        source.image(51)
    assert open_source(tmp_path, options=SourceConfig(mode="grey")).image(51).mode == "L"
    picture(0).save(tmp_path / "000.png")
    mixed = open_source(tmp_path)
    assert (mixed.channels, mixed.image(1).mode) == (3, "RGB")


def test_fingerprints_follow_contents_and_options_but_not_places(tmp_path: Path, class_folder: Path) -> None:
    first = open_source(class_folder).fingerprint
    shutil.copytree(class_folder, tmp_path / "elsewhere" / "copy")
    assert open_source(tmp_path / "elsewhere" / "copy").fingerprint == first
    assert open_source(class_folder, options=SourceConfig(mode="grey")).fingerprint != first
    assert open_source(class_folder, options=SourceConfig(pad=20)).fingerprint != first
    assert open_source(class_folder, options=SourceConfig(on_bad="skip")).fingerprint == first
    archive = open_source(zipped(class_folder, tmp_path / "a.zip")).fingerprint
    Image.new("RGB", (12, 12)).save(class_folder / "cats" / "a.png")
    assert open_source(class_folder).fingerprint != first
    assert open_source(zipped(class_folder, tmp_path / "b.zip")).fingerprint != archive


def test_links_that_lead_back_up_end(class_folder: Path) -> None:
    (class_folder / "cats" / "loop").symlink_to(class_folder)
    assert len(open_source(class_folder)) == 5


def test_missing_empty_and_unknown_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images among 0 files"):
        open_source(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no images among 2 files"):
        open_source(tmp_path)


def test_broken_archives_and_entries_are_named(tmp_path: Path, class_folder: Path) -> None:
    archive = zipped(class_folder, tmp_path / "a.zip")
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a complete zip archive"):
        open_source(archive)
    damaged = bytearray(content)
    damaged[100] ^= 0xFF  # inside of the first image
    archive.write_bytes(damaged)
    with pytest.raises(BadImageError, match=r"cats/a\.png.*damaged in the archive"):
        open_source(archive, options=SourceConfig(mode="rgb")).image(0)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_read_by_folder_or_by_name_and_padded_with_black(tmp_path: Path, ending: str) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (6, 4, 4))
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", pixels[: 6 if prefix == "train" else 3])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", np.arange(6 if prefix == "train" else 3) % 3)
    source = open_source(tmp_path, options=SourceConfig(pad=8, background="white"))
    assert (len(source), source.num_classes, source.channels, source.label(4)) == (6, 3, 1, 1)
    padded = np.asarray(source.image(5))
    assert (padded[2:6, 2:6] == pixels[5]).all()
    assert padded.sum() == pixels[5].sum()
    assert len(open_source(tmp_path, options=SourceConfig(split="test"))) == 3
    direct = open_source(tmp_path / f"t10k-images-idx3-ubyte{ending}")
    assert listing(direct) == listing(open_source(tmp_path, options=SourceConfig(split="test")))
    with pytest.raises(DataError, match="splits train, test"):
        open_source(tmp_path, options=SourceConfig(split="val"))


def test_broken_idx_files_are_refused(tmp_path: Path) -> None:
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(images, np.zeros((3, 4, 4)))
    write_idx(labels, np.zeros(2))
    with pytest.raises(DataError, match="2 labels for the 3 images"):
        open_source(tmp_path)
    labels.write_bytes(images.read_bytes())
    with pytest.raises(DataError, match="is not an IDX file of bytes with 1 axes"):
        open_source(tmp_path)
    write_idx(labels, np.zeros(3))
    images.write_bytes(images.read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated or not gzip"):
        open_source(tmp_path)
    images.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 3, 4, 4) + bytes(47)))
    with pytest.raises(DataError, match="promises 48 bytes after its header and has 47"):
        open_source(tmp_path)


def test_shapes_are_opened_with_arguments() -> None:
    source = open_source("shapes:count=20, seed=1")
    assert isinstance(source, ShapesSource)
    assert (source.count, source.seed, source.size) == (20, 1, 32)
    assert len(open_source("shapes")) == 6000
    with pytest.raises(ConfigError, match=r"unknown argument `cuont`\. Did you mean `count`"):
        open_source("shapes:cuont=20")
    with pytest.raises(ConfigError, match="must be a whole number"):
        open_source("shapes:count=many")
    with pytest.raises(ConfigError, match=r"does not take source\.filter, source\.pad"):
        open_source("shapes", options=SourceConfig(filter="shape=star", pad=40))


def test_options_are_checked_when_they_are_made() -> None:
    for wrong in ({"mode": "gray"}, {"on_bad": "ignore"}, {"pad": 0}, {"background": "whitish"}):
        with pytest.raises(ConfigError, match=f"source.{next(iter(wrong))}"):
            SourceConfig(**wrong)  # type: ignore[arg-type]
