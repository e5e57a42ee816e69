"""Parquet through the `datasets` library."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pagoda.data import BadImageError, SourceConfig, open_source
from pagoda.errors import DataError, MissingExtraError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path: Path, picture: object) -> Path:
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    images = [picture(i) for i in range(4)]  # type: ignore[operator]
    columns = {"photo": images, "label": [1, 0, 1, 0], "text": [f"animal {i}" for i in range(4)]}
    path = tmp_path / "rows" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_a_parquet_file_brings_images_class_names_and_captions(parquet: Path, picture: object) -> None:
    for spec in (parquet, parquet.parent):
        source = open_source(spec)
        assert (len(source), source.class_names, source.label(0)) == (4, ["cat", "dog"], 1)
        assert source.caption(2) == "animal 2"
        assert source.image(3).tobytes() == picture(3).tobytes()  # type: ignore[operator]
        assert source.fingerprint == open_source(parquet).fingerprint
    filtered = open_source(parquet, options=SourceConfig(filter="text in 'animal 0'|'animal 1'"))
    assert [filtered.sample_id(i) for i in range(2)] == ["00000000", "00000001"]
    with pytest.raises(DataError, match="split 'test'; there are train"):
        open_source(parquet.parent, options=SourceConfig(split="test"))


def test_plain_bytes_are_found_as_images_and_bad_ones_named(tmp_path: Path, picture: object) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    path = tmp_path / "plain.parquet"
    datasets.Dataset.from_dict({"data": [content, b"", content[:40]], "n": [1, 2, 3]}).to_parquet(path)
    source = open_source(path)
    assert source.image(0).getpixel((0, 0)) == (255, 0, 0)
    assert source.metadata(2) == {"n": 3}
    with pytest.raises(BadImageError, match="`00000001` cannot be used: 0 bytes"):
        source.image(1)
    with pytest.raises(BadImageError, match="truncated"):
        source.image(2)


def test_no_image_column_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    datasets.Dataset.from_dict({"n": [1, 2, 3]}).to_parquet(path)
    with pytest.raises(DataError, match="has no image column; its columns are n"):
        open_source(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_source(path)


def test_without_the_library_the_install_line_is_named(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pagoda\[hub\]'"):
        open_source(parquet)


def test_a_hub_name_that_cannot_be_loaded_says_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"`somebody/photos` is no file or folder here.*no network"):
        open_source("somebody/photos")
