"""Features of a set: the same streamed as in memory, made once, and never taken for another model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.understanding.conftest import SIZE, edm, make_network
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.understanding import FeatureTable, Taps, read_features

NAMES = ["middle", "decoder.1"]
SIGMAS = [0.1, 0.4]
COUNT = 11


def loader(seed: int = 0) -> Callable[[Tensor], Tensor]:
    images = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return lambda rows: images[rows]


def test_a_streamed_table_is_the_table_in_memory(unet: Denoiser, tmp_path: Path) -> None:
    taps = Taps(unet, NAMES)
    memory = read_features(taps, loader(), COUNT, SIGMAS, data="a", batch_size=4)
    disk = read_features(taps, loader(), COUNT, SIGMAS, data="a", batch_size=4, out=tmp_path)
    again = FeatureTable.open(tmp_path)
    assert (disk.taps, disk.sigmas, len(disk)) == (NAMES, SIGMAS, COUNT)
    for name in NAMES:
        for sigma in SIGMAS:
            found = memory.features(name, sigma)
            alone = Taps(unet, [name])(loader()(torch.arange(COUNT)), sigma, seeds=range(COUNT))[name]
            torch.testing.assert_close(found.values, alone, atol=1e-5, rtol=1e-4)
            for table in (disk, again):
                assert torch.equal(table.features(name, sigma).values, found.values)
                assert table.features(name, sigma).spec == found.spec == taps.spec(name, sigma)


def test_every_image_is_read_once_whatever_the_number_of_parts_and_levels(unet: Denoiser) -> None:
    seen: list[int] = []
    load = loader()

    def counting(rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return load(rows)

    done: list[int] = []
    read_features(Taps(unet, NAMES), counting, COUNT, SIGMAS, data="a", batch_size=4, progress=done.append)
    assert seen == list(range(COUNT))
    assert done == [4, 8, 11]


def test_a_table_is_made_once_and_anew_when_anything_has_changed(unet: Denoiser, tmp_path: Path) -> None:
    def read(denoiser: Denoiser, seed: int = 0, data: str = "a", sigmas: list[float] = SIGMAS) -> Tensor:
        table = read_features(
            Taps(denoiser, NAMES, seed=seed), load, COUNT, sigmas, data=data, batch_size=4, out=tmp_path
        )
        return table.features("middle", sigmas[0]).values

    calls: list[int] = []
    inner = loader()

    def load(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return inner(rows)

    first = read(unet)
    assert len(calls) == 3
    assert torch.equal(read(unet), first)
    assert len(calls) == 3
    other = edm(make_network("unet"))
    with torch.no_grad():
        other.network.model.conv_in.weight.mul_(1.1)
    for change in ({"denoiser": other}, {"seed": 1}, {"data": "b"}, {"sigmas": [0.2]}):
        before = len(calls)
        read(**{"denoiser": unet, **change})  # type: ignore[arg-type]
        assert len(calls) == before + 3, change


def test_a_table_that_was_interrupted_is_not_taken_for_a_whole_one(unet: Denoiser, tmp_path: Path) -> None:
    inner = loader()

    def failing(rows: Tensor) -> Tensor:
        if int(rows[0]) >= 8:
            raise KeyboardInterrupt
        return inner(rows)

    with pytest.raises(KeyboardInterrupt):
        read_features(Taps(unet, NAMES), failing, COUNT, SIGMAS, data="a", batch_size=4, out=tmp_path)
    with pytest.raises(ArtifactError, match="no table of features"):
        FeatureTable.open(tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_half_precision_halves_the_files_and_keeps_three_digits(unet: Denoiser, tmp_path: Path) -> None:
    taps = Taps(unet, ["middle"], pool="tokens")
    whole = read_features(taps, loader(), COUNT, [0.1], data="a", out=tmp_path / "a")
    half = read_features(taps, loader(), COUNT, [0.1], data="a", out=tmp_path / "b", dtype="float16")
    a, b = (next((tmp_path / name).glob("*.npy")).stat().st_size - 128 for name in "ab")
    assert a == 2 * b
    torch.testing.assert_close(
        half.features("middle", 0.1).values, whole.features("middle", 0.1).values, rtol=1e-3, atol=1e-3
    )


def test_conditions_reach_the_network(unet: Denoiser) -> None:
    labels = torch.arange(COUNT) % 4
    taps = Taps(unet, ["middle"])
    with_labels = read_features(
        taps, loader(), COUNT, [0.1], data="a", batch_size=4, condition=lambda rows: Condition.of_labels(labels[rows])
    )
    without = read_features(taps, loader(), COUNT, [0.1], data="a", batch_size=4)
    assert not torch.equal(with_labels.features("middle", 0.1).values, without.features("middle", 0.1).values)


def test_mistakes_are_named(unet: Denoiser, tmp_path: Path) -> None:
    taps = Taps(unet, NAMES)
    with pytest.raises(DataError, match=r"features of `middle` at sigma=0\.1 of 11 of 11 images hold NaN"):
        read_features(taps, lambda rows: torch.nan * loader()(rows), COUNT, SIGMAS, data="a")
    with pytest.raises(DataError, match="at least one image"):
        read_features(taps, loader(), 0, SIGMAS, data="a")
    with pytest.raises(ConfigError, match="unknown dtype"):
        read_features(taps, loader(), COUNT, SIGMAS, data="a", dtype="int8")
    table = read_features(taps, loader(), COUNT, SIGMAS, data="a", out=tmp_path)
    with pytest.raises(ConfigError, match=r"no part `decoder\.2`"):
        table.features("decoder.2", 0.1)
    with pytest.raises(ConfigError, match=r"no noise level 0\.2"):
        table.features("middle", 0.2)
    next(tmp_path.glob("*.npy")).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match="cannot be read"):
        FeatureTable.open(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        FeatureTable.open(tmp_path)
