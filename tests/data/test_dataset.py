"""Prepared images: the same pixels by every way, made once."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pagoda.data import Downsampler, ImageDataset, ShapesSource, SourceConfig, open_source, prepare_images
from pagoda.errors import ConfigError, DataError, ResourceError, ShapeError

EVERY = torch.arange(20)


def prepare(
    cache: Path | None, *, sizes: tuple[int, ...] = (8, 16), count: int = 20, kind: str = "box_bicubic"
) -> ImageDataset:
    downsampler = Downsampler(kind)  # type: ignore[arg-type]
    return prepare_images(ShapesSource(count), sizes=sizes, downsampler=downsampler, cache_dir=cache, progress=False)


def test_images_are_the_downsampled_originals_in_minus_one_to_one() -> None:
    source, data = ShapesSource(20), prepare(None)
    assert (len(data), data.sizes, data.channels, data.num_classes) == (20, (8, 16), 3, 10)
    for size in data.sizes:
        batch = data.images(EVERY, size)
        assert (batch.dtype, batch.shape) == (torch.float32, (20, 3, size, size))
        for i in range(20):
            expected = torch.from_numpy(Downsampler()(source.image(i), size)).permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(batch[i], expected)
    assert data.labels(torch.tensor([13, 2])) is not None
    assert torch.equal(data.labels(EVERY), EVERY % 10)
    assert data.captions == [source.caption(i) for i in range(20)]
    assert data.sample_ids == [source.sample_id(i) for i in range(20)]


def test_flip_mirrors_the_chosen_images_and_twice_is_the_identity() -> None:
    data = prepare(None)
    flip = torch.arange(20) % 3 == 0
    plain, flipped = data.images(EVERY, 16), data.images(EVERY, 16, flip)
    assert torch.equal(flipped[flip], plain[flip].flip(-1))
    assert torch.equal(flipped[~flip], plain[~flip])
    assert not torch.equal(flipped[flip], plain[flip])


def test_memory_cache_and_memory_map_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(None)
    written, read = prepare(tmp_path), prepare(tmp_path)
    monkeypatch.setattr("pagoda.data.dataset._IN_MEMORY_BYTES", 0)
    mapped = prepare(tmp_path)
    assert isinstance(mapped._pixels[8], np.memmap)
    assert not isinstance(read._pixels[8], np.memmap)
    for data in (written, read, mapped):
        assert data.fingerprint == expected.fingerprint
        for size in (8, 16):
            assert torch.equal(data.images(EVERY, size), expected.images(EVERY, size))


def test_the_cache_is_used_when_nothing_changed_and_remade_when_anything_did(tmp_path: Path) -> None:
    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}

    prepare(tmp_path)
    first = stamps()
    assert set(os.listdir(tmp_path)) == {"images-8.npy", "images-8.json", "images-16.npy", "images-16.json"}
    prepare(tmp_path)
    assert stamps() == first
    prepare(tmp_path, sizes=(8, 16, 32))  # only the new size is made
    second = stamps()
    assert {name: second[name] for name in first} == first
    for change in ({"kind": "area"}, {"count": 30}):
        data = prepare(tmp_path, **change)  # type: ignore[arg-type]
        assert torch.equal(data.images(EVERY, 8), prepare(None, **change).images(EVERY, 8))  # type: ignore[arg-type]
        third = stamps()
        assert all(third[name] != second[name] for name in first)
        second = third


def test_a_damaged_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = prepare(tmp_path).images(EVERY, 8)
    content = (tmp_path / "images-8.npy").read_bytes()
    for damaged in (content[:-100], content[:20], b"", b"\x80\x04pickle"):
        (tmp_path / "images-8.npy").write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(prepare(tmp_path).images(EVERY, 8), expected)
        assert "images-8.npy" in caplog.text
        caplog.clear()
    (tmp_path / "images-8.json").write_text("{")
    assert torch.equal(prepare(tmp_path).images(EVERY, 8), expected)
    np.save(tmp_path / "images-8.npy", np.zeros((20, 3, 4, 4), dtype=np.uint8))
    assert torch.equal(prepare(tmp_path).images(EVERY, 8), expected)


def test_an_interrupted_preparation_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stop(self: ShapesSource, index: int) -> None:
        calls.append(index)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShapesSource, "image", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert calls
    assert os.listdir(tmp_path) == []


def test_bad_images_stop_the_preparation_with_all_their_names(class_folder: Path) -> None:
    (class_folder / "cats" / "a.png").write_bytes(b"")
    (class_folder / "dogs" / "b.png").write_text("not an image")
    with pytest.raises(DataError, match=r"2 of 5 images .*cats/a\.png \(0 bytes\), dogs/b\.png \(not an image\)"):
        prepare_images(open_source(class_folder), sizes=(8,), downsampler=Downsampler(), cache_dir=None, progress=False)
    none_left = open_source(class_folder / "cats", options=SourceConfig(on_bad="skip"))
    with pytest.raises(DataError, match=r"3 of 3 images .*12x12 pixels, smaller than 64"):
        prepare_images(none_left, sizes=(64,), downsampler=Downsampler(), cache_dir=None, progress=False)


def test_skipped_images_leave_the_others_in_place(tmp_path: Path, class_folder: Path) -> None:
    (class_folder / "cats" / "b.png").write_bytes(b"")
    source = open_source(class_folder, options=SourceConfig(on_bad="skip"))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):  # the last time from the cache
        data = prepare_images(source, sizes=(8, 12), downsampler=Downsampler(), cache_dir=cache, progress=False)
        assert data.sample_ids == ["cats/a.png", "cats/c.png", "dogs/a.png", "dogs/b.png"]
        assert [image.sample_id for image in data.skipped] == ["cats/b.png"]
        labels = data.labels(torch.arange(4))
        assert labels is not None
        assert labels.tolist() == [0, 0, 1, 1]
        for row, index in enumerate((0, 2, 3, 4)):
            expected = torch.from_numpy(np.array(source.image(index))).permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(data.images(torch.tensor([row]), 12)[0], expected)


def test_a_class_that_loses_all_its_images_is_refused(class_folder: Path) -> None:
    for path in (class_folder / "dogs").iterdir():
        path.write_bytes(b"")
    source = open_source(class_folder, options=SourceConfig(on_bad="skip"))
    with pytest.raises(DataError, match=r"no image has class 1 \(dogs\)"):
        prepare_images(source, sizes=(8,), downsampler=Downsampler(), cache_dir=None, progress=False)


def test_a_target_larger_than_the_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"20 of 20 images .*32x32 pixels, smaller than 64"):
        prepare(None, sizes=(8, 64))


def test_one_more_size_leaves_the_fingerprint_and_another_kernel_does_not() -> None:
    assert prepare(None, sizes=(8,)).fingerprint == prepare(None, sizes=(8, 16)).fingerprint
    assert prepare(None, sizes=(8,), kind="area").fingerprint != prepare(None, sizes=(8,)).fingerprint


def test_what_was_not_prepared_or_is_out_of_range_is_refused() -> None:
    data = prepare(None)
    with pytest.raises(ConfigError, match=r"size 32 was not prepared; there are \(8, 16\)"):
        data.images(EVERY, 32)
    for index in (-1, 20):
        with pytest.raises(DataError, match=r"lie in \[0, 20\)"):
            data.images(torch.tensor([0, index]), 8)
        with pytest.raises(DataError, match=r"lie in \[0, 20\)"):
            data.labels(torch.tensor([index]))
    with pytest.raises(ShapeError, match="flip"):
        data.images(EVERY, 8, torch.tensor([True]))
    for sizes in ((), (0, 8)):
        with pytest.raises(ConfigError, match="positive"):
            prepare(None, sizes=sizes)


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object) -> object:
        return type("Usage", (), {"free": 10})

    monkeypatch.setattr("pagoda.files.shutil.disk_usage", full)
    with pytest.raises(ResourceError, match="the image cache needs"):
        prepare(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_description_says_what_the_pixels_were_made_from(tmp_path: Path) -> None:
    prepare(tmp_path)
    content = json.loads((tmp_path / "images-8.json").read_text())
    assert content["source"] == ShapesSource(20).fingerprint
    assert (content["downsampler"], content["shape"]) == ("box_bicubic", [20, 3, 8, 8])
