"""Further views of images: what they show, and that the images themselves stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import tiny_config

from pagoda.data import ShapesSource, SourceConfig, ViewedSource, open_source, without_views
from pagoda.data.views import shifted_and_zoomed
from pagoda.errors import ConfigError, DataError
from pagoda.stages.config import override
from pagoda.stages.context import open_context
from pagoda.stages.judging import RealImages, open_real
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import Runtime


def bump(x: float, y: float, width: float, side: int = 64) -> Image.Image:
    """A smooth blob at (x, y), in fractions of the side."""
    at = (np.arange(side) + 0.5) / side
    value = np.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / (2 * width**2))
    return Image.fromarray(np.round(255 * value).astype(np.uint8))


def moments(image: Image.Image) -> tuple[float, float, float]:
    """Centre and width of a blob."""
    weight = np.asarray(image, dtype=np.float64)
    at = (np.arange(weight.shape[0]) + 0.5) / weight.shape[0]
    total = weight.sum()
    x, y = (weight.sum(0) * at).sum() / total, (weight.sum(1) * at).sum() / total
    return x, y, float(np.sqrt((weight.sum(0) * (at - x) ** 2).sum() / total))


def test_what_a_view_shows_is_moved_and_enlarged_as_told() -> None:
    seen = shifted_and_zoomed(bump(0.5, 0.5, 0.08), (0.1, -0.05), 1.2)
    # Moved first, then enlarged about the centre.
    assert moments(seen) == pytest.approx((0.5 + 1.2 * 0.1, 0.5 - 1.2 * 0.05, 1.2 * 0.08), abs=2e-3)
    assert moments(shifted_and_zoomed(bump(0.5, 0.5, 0.08), (0, 0), 1 / 1.2))[2] == pytest.approx(0.08 / 1.2, abs=2e-3)


def test_the_neutral_view_is_the_image_and_the_edge_is_repeated_outwards() -> None:
    image = ShapesSource(size=32).image(3)
    assert shifted_and_zoomed(image, (0.0, 0.0), 1.0).tobytes() == image.tobytes()
    flat = Image.new("RGB", (9, 5), (10, 200, 30))
    assert shifted_and_zoomed(flat, (0.4, -0.3), 0.6).tobytes() == flat.tobytes()


def test_the_images_come_first_and_views_of_one_differ() -> None:
    plain = open_source("shapes:count=20,seed=3")
    source = open_source("shapes:count=20,seed=3", options=SourceConfig(views=3))
    assert isinstance(source, ViewedSource)
    assert without_views(source).fingerprint == plain.fingerprint == without_views(plain).fingerprint
    assert [source.image(i).tobytes() for i in range(20)] == [plain.image(i).tobytes() for i in range(20)]
    for view in (1, 2):
        for i in range(20):
            row = 20 * view + i
            assert source.image(row).size == plain.image(i).size
            assert (source.label(row), source.caption(row)) == (plain.label(i), plain.caption(i))
            assert source.metadata(row)["view"] == view
    assert len({source.image(20 * view + 7).tobytes() for view in range(3)}) == 3


def test_the_fingerprint_knows_how_views_are_drawn() -> None:
    def fingerprint(**options: float) -> str:
        return open_source("shapes:count=20", options=SourceConfig(**options)).fingerprint  # type: ignore[arg-type]

    found = {
        fingerprint(views=2), fingerprint(views=3), fingerprint(views=2, view_shift=0.2), fingerprint(views=2, view_zoom=0.2)
    }  # fmt: skip
    assert len(found) == 4
    assert fingerprint(views=1) == open_source("shapes:count=20").fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "source.views must be at least 1, the image itself, got 0"),
        ({"view_shift": 0.2}, "belong to further views, and there are none"),
        ({"view_shift": 0.6}, r"source.view_shift must lie in \[0, 0.5\], got 0.6"),
        ({"view_zoom": -0.1}, r"source.view_zoom must lie in \[0, 1\], got -0.1"),
        ({"views": 2, "view_shift": 0, "view_zoom": 0}, "equal copies"),
    ],
)
def test_reach_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig(**options)  # type: ignore[arg-type]


def test_every_view_of_a_bad_image_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 2 * i, 90)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    config = tiny_config(data=str(folder), condition="label")
    skipping = override(config, {"source.views": 2, "source.on_bad": "skip", "mirror": False})
    run = RunFolder.create(tmp_path / "run", skipping)
    context = open_context(run, skipping, Runtime("cpu"), quiet=True)
    assert [image.sample_id for image in context.data.skipped] == ["07.png", "07.png#1"]
    assert len(context.data) == 38
    with pytest.raises(DataError, match=r"1 of 20 images cannot be used: 07\.png"):
        stopping = override(skipping, {"source.on_bad": "raise"})
        open_context(RunFolder.create(tmp_path / "other", stopping), stopping, Runtime("cpu"), quiet=True)


def test_a_run_trains_on_views_and_is_judged_by_the_images(tmp_path: Path) -> None:
    config = override(tiny_config(evaluation__gap__count=16), {"source.views": 2})
    run = train(config, str(tmp_path / "run"), quiet=True)
    context = open_context(run, config, Runtime("cpu"), quiet=True)
    plain = open_source(config.data)
    assert len(context.data) == 2 * len(plain)
    judged = open_real(run, config, None, config.size, Runtime("cpu"))
    assert judged.sample_ids == [plain.sample_id(i) for i in range(len(plain))]
    assert list(load_gaps(run)) == config.sizes
    walked = RealImages.split(context.data, config.size, count=None, seed=0, first=len(plain))
    assert sorted(torch.cat([walked.reference, walked.stand_in]).tolist()) == list(range(len(plain)))
    assert train(config, str(run.path), quiet=True).path == run.path  # nothing is left to do
