"""The search finds the place where the labels are, and says when that place lies at an edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.understanding.conftest import SIZE
from torch import Tensor

from pagoda.diffusion import Denoiser
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.understanding import HeadConfig, SearchResult, Taps, draw_heat_map, middle_taps, read_features, search
from pagoda.understanding.search import search_table

NAMES = ["dark", "bright"]


def striped(count: int, contrast: float) -> tuple[Tensor, Tensor]:
    """Dark and bright images: a difference that drowns in noise as sigma grows."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 2
    noise = 0.02 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (contrast * (labels.float() - 0.5))[:, None, None, None] + noise, labels


def run(denoiser: Denoiser, contrast: float, **options: object) -> SearchResult:
    images, labels = striped(160, contrast)
    return search(denoiser, lambda rows: images[rows], labels, NAMES, data="x", **options)  # type: ignore[arg-type]


def test_accuracy_falls_where_noise_drowns_the_difference(unet: Denoiser) -> None:
    result = run(unet, 0.1, taps=["encoder.0", "decoder.2"], sigmas=[0.05, 60.0])
    assert result.accuracy.shape == (2, 2)
    assert bool((result.accuracy[:, 0] >= 0.85).all())
    assert bool((result.accuracy[:, 1] < 0.8).all())
    assert result.best[1] == 0.05
    assert (result.count, result.held_out) == (120, 40)


def test_without_a_difference_nothing_is_found(unet: Denoiser) -> None:
    result = run(unet, 0.0, taps=["middle"], sigmas=[0.05, 0.2])
    assert bool((result.accuracy < 0.8).all())


def test_a_search_on_a_grid_judges_the_features_of_that_grid(unet: Denoiser) -> None:
    images, labels = striped(80, 0.1)
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    parts, head = ["encoder.0", "decoder.2"], HeadConfig(l2=1e-3)
    for grid in (1, 2):
        taps = Taps(unet, parts, pool="mean" if grid == 1 else "grid", grid=grid)
        table = read_features(taps, lambda part: images[rows[part]], 80, [0.3], data="x")
        expected = search_table(table, labels[rows], NAMES, head)
        found = search(
            unet, lambda part: images[part], labels, NAMES, data="x", taps=parts, sigmas=[0.3], grid=grid, head=head
        )
        assert torch.equal(found.accuracy, expected.accuracy)
    with pytest.raises(ShapeError, match="lower `grid`"):
        run(unet, 0.1, taps=["middle"], grid=SIZE)


def test_every_part_between_stem_and_head_is_searched_by_default(unet: Denoiser) -> None:
    result = run(unet, 0.1, sigmas=[0.1], head=HeadConfig(kind="knn", neighbours=3), count=40)
    assert (
        result.taps
        == middle_taps(unet)
        == ["encoder.0", "encoder.1", "encoder.2", "middle", *[f"decoder.{k}" for k in range(4)]]
    )
    assert result.head == "knn"


def test_the_best_place_is_told_and_whether_it_lies_inside(tmp_path: Path) -> None:
    accuracy = torch.full((3, 3), 0.5, dtype=torch.float64)
    accuracy[1, 1] = 0.9
    result = SearchResult(["a", "b", "c"], [0.1, 0.2, 0.4], accuracy, "linear", 30, 10)
    assert result.best == ("b", 0.2)
    assert result.is_inside
    accuracy[1, 2] = 0.95
    assert result.best == ("b", 0.4)
    assert not result.is_inside
    assert "95.0*" in result.text()
    result.save(tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text())["best"] == ["b", 0.4]
    draw_heat_map(result, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert min(picture.size) > 100


def test_mistakes_are_named(unet: Denoiser) -> None:
    with pytest.raises(ConfigError, match="pooled features"):
        run(unet, 0.1, head=HeadConfig(kind="attention"))
    with pytest.raises(ConfigError, match=r"no part `encoder\.7`"):
        run(unet, 0.1, taps=["encoder.7"])
    with pytest.raises(DataError, match="8 labelled images"):
        search(unet, lambda rows: torch.zeros(len(rows), 3, 8, 8), torch.zeros(3).long(), NAMES, data="x")
