"""The store of latents: resumable to the bit, and nothing foreign gets in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pagoda.data.latents as latents_module
from pagoda.data import LatentStore
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.files import load_tensors, save_tensors

SHAPE = (2, 3, 4)
PROVENANCE = {"teacher": "abc", "solver": {"name": "heun", "steps": 18}, "sigma_max": 80.0, "sizes": (8, 16)}


def latent(index: int, flip: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2 * index + flip))


def start(path: Path, **changes: Any) -> LatentStore:
    settings: dict[str, Any] = {"shape": SHAPE, "count": 5, "flips": True, "shard_size": 4, "dtype": "float32"}
    settings["provenance"] = PROVENANCE | changes.pop("provenance", {})
    return LatentStore.create(path, **(settings | changes))


def fill(store: LatentStore, shards: list[int], *, guided: bool = False) -> None:
    for shard in shards:
        index, flip = store.shard_rows(shard)
        z = torch.stack([latent(i, f) for i, f in zip(index.tolist(), flip.tolist(), strict=True)])
        store.write_shard(shard, z, index.float() + 1 if guided else None)


def test_rows_run_over_images_with_their_mirror_images_beside_them(tmp_path: Path) -> None:
    store = start(tmp_path)
    rows = [torch.stack(store.shard_rows(shard)).T.tolist() for shard in range(store.num_shards)]
    assert [row for part in rows for row in part] == [[i, f] for i in range(5) for f in (0, 1)]
    assert [len(part) for part in rows] == [4, 4, 2]
    plain = start(tmp_path / "plain", flips=False)
    assert torch.cat([plain.shard_rows(shard)[0] for shard in range(2)]).tolist() == [0, 1, 2, 3, 4]
    assert not any(plain.shard_rows(shard)[1].any() for shard in range(2))


@pytest.mark.parametrize("flips", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read_back(tmp_path: Path, flips: bool, dtype: str) -> None:
    fill(start(tmp_path, flips=flips, dtype=dtype), list(range(3 if flips else 2)))
    store = LatentStore.open(tmp_path, expect={"teacher": "abc", "sizes": (8, 16)})
    indices, flip = torch.tensor([4, 0, 2, 4]), torch.tensor([True, False, True, False]) & flips
    expected = torch.stack([latent(i, f) for i, f in zip(indices.tolist(), flip.tolist(), strict=True)])
    found = store.get(indices, flip)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected if dtype == "float32" else expected.half().float())
    assert torch.equal(store.get(indices), store.get(indices, torch.zeros(4)))
    assert store.guidance(indices) is None


@pytest.mark.parametrize("flips", [True, False])
def test_a_store_that_stays_on_the_disk_gives_the_same_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flips: bool
) -> None:
    count = 5 if flips else 10
    fill(start(tmp_path, flips=flips, count=count), [0, 1, 2], guided=True)
    kept = LatentStore.open(tmp_path)
    monkeypatch.setattr(latents_module, "_IN_MEMORY_BYTES", 10 * 2 * 3 * 4 * 4 - 1)
    mapped = LatentStore.open(tmp_path)
    indices = torch.randint(count, (40,), generator=torch.Generator().manual_seed(0))
    flip = torch.arange(40) % 2 == 1 if flips else None
    assert torch.equal(mapped.get(indices, flip), kept.get(indices, flip))
    assert torch.equal(mapped.get(indices[:0]), kept.get(indices[:0]))
    assert mapped.moments() == kept.moments()
    found, expected = mapped.guidance(indices, flip), kept.guidance(indices, flip)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    if Path("/proc/self/maps").exists():
        shards = [mapped.shard_path(shard) for shard in range(3)]
        assert all(str(path) in Path("/proc/self/maps").read_text() for path in shards)


def test_a_resumed_store_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path) -> None:
    fill(start(tmp_path / "whole"), [0, 1, 2])
    first = start(tmp_path / "parts")
    fill(first, [1])
    assert (first.missing_shards(), first.complete) == ([0, 2], False)
    second = start(tmp_path / "parts")
    fill(second, second.missing_shards())
    assert second.complete
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_store_of_other_settings_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    fill(start(tmp_path), [0, 1, 2])
    for change, message in (
        ({"provenance": {"teacher": "xyz"}}, "teacher: 'abc' there, 'xyz' here"),
        ({"provenance": {"extra": 1}}, "extra: None there, 1 here"),
        ({"count": 6}, "count: 5 there, 6 here"),
        ({"dtype": "float16"}, "dtype: 'float32' there"),
        ({"shape": (2, 4, 4)}, "shape"),
    ):
        with pytest.raises(ArtifactError, match=message):
            start(tmp_path, **change)
    with pytest.raises(ArtifactError, match=r"sigma_max: 80\.0 there, 40\.0 here"):
        LatentStore.open(tmp_path, expect={"sigma_max": 40.0})
    assert LatentStore.open(tmp_path).provenance["teacher"] == "abc"


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    fill(start(tmp_path / "a"), [0, 1, 2])
    fill(start(tmp_path / "b", provenance={"teacher": "xyz"}), [0, 1, 2])
    name = "latents-00002-of-00003.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    for opened in (LatentStore.open, start):
        with pytest.raises(ArtifactError, match=f"{name}.*teacher: 'xyz' there, 'abc' here"):
            opened(tmp_path / "a")


def test_truncated_foreign_and_pickled_shards_are_named(tmp_path: Path) -> None:
    store = start(tmp_path)
    fill(store, [0, 1, 2])
    path = store.shard_path(1)
    content = path.read_bytes()

    def refused(message: str) -> None:
        for opened in (LatentStore.open, start):
            with pytest.raises(ArtifactError, match=f"{path.name}.*{message}"):
                opened(tmp_path)

    for length in (len(content) - 1, len(content) // 2, 20, 5):
        path.write_bytes(content[:length])
        refused("truncated")
    path.write_bytes(b"")
    refused("0 bytes")
    path.write_bytes(pickle.dumps({"z": [1.0]}))
    refused("a pickle")
    torch.save({"z": torch.zeros(4, *SHAPE)}, path)
    refused("zip archive")
    save_tensors(path, {"z": torch.zeros(4, *SHAPE)})
    refused("not written as a shard of latents")
    tensors, metadata = load_tensors(store.shard_path(0))
    save_tensors(path, tensors | {"z": tensors["z"][:2]}, metadata)
    refused("where .* belongs")
    path.write_bytes(store.shard_path(0).read_bytes())
    with pytest.raises(ArtifactError, match="holds other images than its place says"):
        LatentStore.open(tmp_path)
    path.write_bytes(content)
    (tmp_path / "old.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"old\.pt` does not belong"):
        LatentStore.open(tmp_path)


def test_an_incomplete_or_missing_store_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no store of latents"):
        LatentStore.open(tmp_path / "nothing")
    store = start(tmp_path)
    fill(store, [0, 2])
    with pytest.raises(ArtifactError, match=r"1 of 3 shards are missing, first `latents-00002-of-00003"):
        LatentStore.open(tmp_path)
    with pytest.raises(ArtifactError, match="is being written"):
        store.get(torch.tensor([0]))
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not describe a store"):
        LatentStore.open(tmp_path)


def test_values_that_are_not_finite_are_refused_on_both_sides(tmp_path: Path) -> None:
    store = start(tmp_path, dtype="float16")
    fill(store, [0, 1, 2])
    z = torch.zeros(4, *SHAPE)
    for bad in (float("nan"), float("inf"), 1e6):  # the last one overflows float16
        z[3, 0, 0, 0] = bad
        with pytest.raises(DataError, match="1 of 4 latents are not finite as float16, first that of image 3"):
            store.write_shard(1, z)
    tensors, metadata = load_tensors(store.shard_path(1))
    tensors["z"][0, 0, 0, 0] = float("nan")
    save_tensors(store.shard_path(1), tensors, metadata)
    with pytest.raises(ArtifactError, match=r"latents-00002.*not finite"):
        LatentStore.open(tmp_path)


def test_moments_are_those_of_all_latents(tmp_path: Path) -> None:
    fill(start(tmp_path, count=200, shard_size=64), list(range(7)))
    store = LatentStore.open(tmp_path)
    every = torch.stack([latent(i, f) for i in range(200) for f in (0, 1)]).double()
    moments = store.moments()
    centred = every - every.mean()
    rms = every.square().flatten(1).mean(1).sqrt()
    expected = {
        "mean": every.mean(),
        "std": every.std(correction=0),
        "rms": every.square().mean().sqrt(),
        "kurtosis": centred.pow(4).mean() / centred.square().mean() ** 2,
        "rms_min": rms.min(),
        "rms_max": rms.max(),
    }
    for name, value in expected.items():
        assert getattr(moments, name) == pytest.approx(float(value), rel=1e-9, abs=1e-12)
    channel_std = every.transpose(0, 1).flatten(1).std(1, correction=0).tolist()
    assert moments.channel_std == pytest.approx(channel_std, rel=1e-9)
    assert abs(moments.kurtosis - 3) < 0.2
    store.check_moments()


@pytest.mark.parametrize(("factor", "fits"), [(1.0, True), (80.0, False), (1 / 80, False)])
def test_latents_of_another_scale_are_refused_with_the_hint(tmp_path: Path, factor: float, fits: bool) -> None:
    store = start(tmp_path)
    for shard in range(3):
        store.write_shard(shard, factor * torch.randn(len(store.shard_rows(shard)[0]), *SHAPE))
    opened = LatentStore.open(tmp_path)
    if fits:
        opened.check_moments()
    else:
        with pytest.raises(ArtifactError, match="unit scale: z / sigma_max"):
            opened.check_moments()


def test_guidance_weights_travel_with_their_latents(tmp_path: Path) -> None:
    store = start(tmp_path)
    fill(store, [0, 1, 2], guided=True)
    guidance = LatentStore.open(tmp_path).guidance(torch.tensor([3, 0]), torch.tensor([True, False]))
    assert guidance is not None
    assert guidance.tolist() == [4.0, 1.0]
    fill(store, [1])
    with pytest.raises(ArtifactError, match="only some shards"):
        LatentStore.open(tmp_path)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    store = start(tmp_path, flips=False)
    with pytest.raises(ShapeError, match=r"shard 0 holds z of shape \(4, 2, 3, 4\)"):
        store.write_shard(0, torch.zeros(3, *SHAPE))
    with pytest.raises(ShapeError, match="4 guidance weights"):
        store.write_shard(0, torch.zeros(4, *SHAPE), torch.zeros(3))
    with pytest.raises(IndexError, match="outside of the 2 shards"):
        store.shard_path(2)
    fill(store, [0, 1])
    opened = LatentStore.open(tmp_path)
    with pytest.raises(DataError, match="no latents of mirror images"):
        opened.get(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(DataError, match=r"lie in \[0, 5\)"):
        opened.get(torch.tensor([5]))
    with pytest.raises(ConfigError, match="float16 or float32"):
        start(tmp_path / "b", dtype="bfloat16")
    with pytest.raises(ShapeError, match=r"\(C, H, W\)"):
        start(tmp_path / "c", shape=(0, 3, 4))


def test_a_store_of_some_images_knows_them_by_their_places_in_the_data_set(tmp_path: Path) -> None:
    images = torch.tensor([2, 5, 6, 11])
    store = start(tmp_path, count=12, images=images, shard_size=3)
    assert len(store) == 4
    fill(store, [2, 0])
    again = start(tmp_path, count=12, images=images, shard_size=3)  # continues
    assert again.missing_shards() == [1]
    with pytest.raises(ArtifactError, match="1 of 3 shards are missing"):
        LatentStore.open(tmp_path)
    fill(again, [1])
    opened = LatentStore.open(tmp_path)
    assert torch.equal(opened.images, images)
    indices, flips = torch.tensor([11, 2, 6]), torch.tensor([True, False, True])
    wanted = torch.stack([latent(i, f) for i, f in zip(indices.tolist(), flips.tolist(), strict=True)])
    assert torch.equal(opened.get(indices, flips), wanted)
    assert opened.rows(indices, flips).tolist() == [7, 0, 5]
    with pytest.raises(DataError, match=r"image 3 has no latent .* 4 of 12 images were encoded.*encode\.share"):
        opened.get(torch.tensor([2, 3]))
    with pytest.raises(DataError, match=r"lie in \[0, 12\)"):
        opened.get(torch.tensor([12]))
    with pytest.raises(ArtifactError, match="count"):
        start(tmp_path, count=12, images=images[:3], shard_size=3)


def test_a_store_of_all_images_is_written_as_before_there_were_others(tmp_path: Path) -> None:
    start(tmp_path)
    assert "of" not in json.loads((tmp_path / "store.json").read_text())


@pytest.mark.parametrize("images", [[], [0, 0], [3, 1], [-1, 2], [2, 5]])
def test_places_that_are_not_rising_ones_of_the_data_set_are_refused(tmp_path: Path, images: list[int]) -> None:
    with pytest.raises(DataError, match=r"rising, and lie in \[0, 5\)"):
        start(tmp_path, images=torch.tensor(images, dtype=torch.int64))
