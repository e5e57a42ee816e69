"""What every source of images keeps to, wherever its images come from."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pagoda.data import Downsampler, ImageSource, SourceConfig, batch_indices, check_source, open_source, prepare_images
from pagoda.errors import PagodaError

COUNT, SIZE = 8, 12


def picture(seed: int, channels: int = 3) -> np.ndarray:
    shape = (SIZE, SIZE) if channels == 1 else (SIZE, SIZE, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, format="PNG")
    return file.getvalue()


def make_folder(root: Path, seed: int) -> Path:
    for i in range(COUNT):
        path = root / "classes" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed + i))
    return root / "classes"


def make_flat_folder(root: Path, seed: int) -> Path:
    (root / "flat").mkdir(parents=True)
    for i in range(COUNT):
        (root / "flat" / f"{i}.png").write_bytes(png(seed + i))
    return root / "flat"


def make_captioned_folder(root: Path, seed: int) -> Path:
    folder = make_flat_folder(root, seed)
    rows = [{"file_name": f"{i}.png", "text": f"number {i}", "label": i % 3, "tone": i} for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def make_zip(root: Path, seed: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "images.zip", "w") as file:
        for i in range(COUNT):
            file.writestr(f"{'cats' if i % 2 else 'dogs'}/{i}.png", png(seed + i))
    return root / "images.zip"


def make_idx(root: Path, seed: int) -> Path:
    (root / "idx").mkdir(parents=True)
    pixels = np.stack([picture(seed + i, channels=1) for i in range(COUNT)])
    labels = np.arange(COUNT, dtype=np.uint8) % 4
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (root / "idx" / name).write_bytes(header + array.tobytes())
    return root / "idx"


def make_parquet(root: Path, seed: int) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")}
    )
    columns = {
        "image": [Image.fromarray(picture(seed + i)) for i in range(COUNT)],
        "label": [i % 2 for i in range(COUNT)],
        "text": [f"row {i}" for i in range(COUNT)],
    }
    path = root / "rows" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


VIEWS = SourceConfig(views=3)
MAKERS: dict[str, Callable[[Path, int], Path | str]] = {
    "folder": make_folder,
    "flat-folder": make_flat_folder,
    "captioned-folder": make_captioned_folder,
    "zip": make_zip,
    "idx": make_idx,
    "parquet": make_parquet,
    "viewed": make_folder,  # with VIEWS
    "shapes": lambda root, seed: f"shapes:count=10,size=16,seed={seed}",
}
Opener = Callable[..., ImageSource]


@pytest.fixture(params=list(MAKERS))
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Writes a source with content that depends on a seed, and opens it: `opened(seed=0)`."""
    if request.param == "parquet":
        config = pytest.importorskip("datasets").config
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made: dict[tuple[int, str], Path | str] = {}

    def make(seed: int = 0, place: str = "here") -> ImageSource:
        if (seed, place) not in made:
            made[seed, place] = MAKERS[request.param](tmp_path / f"{place}{seed}", seed)
        return open_source(made[seed, place], options=VIEWS if request.param == "viewed" else None)

    return make


def test_it_is_a_source(opened: Opener) -> None:
    source = opened()
    assert isinstance(source, ImageSource)
    assert len(source) in (COUNT, VIEWS.views * COUNT, 10)


def test_images_are_plain_and_always_the_same(opened: Opener) -> None:
    source, again = opened(), opened()
    mode = {1: "L", 3: "RGB"}[source.channels]
    for i in range(len(source)):
        image = source.image(i)
        assert image.mode == mode
        assert image.size in ((SIZE, SIZE), (16, 16))
        assert image.tobytes() == again.image(i).tobytes() == source.image(i).tobytes()


def test_every_image_has_a_name_of_its_own(opened: Opener) -> None:
    source, again = opened(), opened()
    names = [source.sample_id(i) for i in range(len(source))]
    assert all(isinstance(name, str) and name for name in names)
    assert len(set(names)) == len(names)
    assert names == [again.sample_id(i) for i in range(len(again))]


def test_labels_are_all_there_or_none(opened: Opener) -> None:
    source = opened()
    labels = [source.label(i) for i in range(len(source))]
    if source.num_classes == 0:
        assert set(labels) == {None}
        assert source.class_names is None
    else:
        assert set(labels) == set(range(source.num_classes))
        assert source.class_names is not None
        assert len(source.class_names) == source.num_classes
        assert len(set(source.class_names)) == source.num_classes


def test_captions_and_metadata_are_plain(opened: Opener) -> None:
    source = opened()
    for i in range(len(source)):
        assert source.caption(i) is None or isinstance(source.caption(i), str)
        assert isinstance(source.metadata(i), dict)


def test_the_fingerprint_is_that_of_the_content(opened: Opener) -> None:
    fingerprint = opened().fingerprint
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert opened().fingerprint == fingerprint
    assert opened(place="elsewhere").fingerprint == fingerprint
    assert opened(seed=1000).fingerprint != fingerprint


def test_an_index_outside_is_refused(opened: Opener) -> None:
    source = opened()
    with pytest.raises((IndexError, PagodaError)):
        source.image(len(source))


def test_it_can_be_checked_and_prepared_for_training(opened: Opener) -> None:
    source = opened()
    report = check_source(source, size=8, min_images=1, progress=False)
    assert report.bad == []
    data = prepare_images(source, sizes=[4, 8], downsampler=Downsampler(), cache_dir=None, progress=False)
    indices = batch_indices(0, 0, 5, len(data))
    images = data.images(indices, 8)
    assert images.shape == (5, source.channels, 8, 8)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1
    labels = data.labels(indices)
    if source.num_classes:
        assert labels is not None
        assert torch.equal(labels, torch.tensor([source.label(i) for i in indices.tolist()]))
    else:
        assert labels is None
