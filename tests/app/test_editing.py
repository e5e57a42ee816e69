"""Edits in the model server: which runs can, masks from strokes and boxes, progress, and stopping."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pagoda.app import JobCancelledError, ModelServer, RunCatalog, ServerConfig, TaskRequest, UploadLimits
from pagoda.app.editing import EditDesk, EditRequest, can_edit, can_encode_in_one_call, parse_mask
from pagoda.edit_pipeline import PagodaEditPipeline
from pagoda.errors import ConfigError, DataError, PagodaError
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.config import override
from pagoda.stages.run_folder import RunFolder

LIMITS = UploadLimits(max_bytes=100_000, max_pixels=100_000)


def data_url(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def photo(size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[ModelServer]:
    with ModelServer(RunCatalog(runs), ServerConfig(batch_size=2)) as opened:
        yield opened


def edited(server: ModelServer, **settings: Any) -> Any:
    desk = EditDesk(server.catalog, "cpu")
    request = EditRequest(**{"run": "finished", "kind": "reconstruct", "image": photo(), "label": 1, **settings})
    return server.submit(TaskRequest(run=request.run, work=lambda job: desk.edit(job, request))).result(60)


def test_a_run_can_be_edited_with_when_it_has_generator_and_teacher(runs: Path) -> None:
    catalog = RunCatalog(runs)
    assert can_edit(catalog, "finished")
    assert can_edit(catalog, "texts")
    assert not can_edit(catalog, "nested/under-way")  # no generator yet
    assert not can_edit(catalog, "newer")
    assert not can_edit(catalog, "../finished")


def test_strokes_and_boxes_make_one_hole() -> None:
    strokes = np.zeros((10, 12), np.uint8)
    strokes[:5, :6] = 255  # painted at half the image's size
    keep = parse_mask(data_url(strokes), "20, 18, 4, 2; 0 19 1 1", (24, 20), LIMITS)
    assert keep is not None
    expected = np.ones((20, 24), bool)
    expected[:10, :12] = False
    expected[18:20, 20:24] = False
    expected[19, 0] = False
    assert np.array_equal(keep, expected)
    assert parse_mask("", "", (24, 20), LIMITS) is None
    assert parse_mask(data_url(np.zeros((10, 12), np.uint8)), "", (24, 20), LIMITS) is None


@pytest.mark.parametrize(
    ("painted", "boxes", "error", "message"),
    [
        ("file:///etc/passwd", "", DataError, "no PNG of this page"),
        ("data:image/svg+xml;base64,AAAA", "", DataError, "no PNG of this page"),
        ("data:image/png;base64,????", "", DataError, "arrived damaged"),
        ("data:image/png;base64,AAAA", "", DataError, "not an image"),
        ("data:image/png;base64," + "A" * 200_000, "", DataError, "too large"),
        ("", "1, 2, 3", ConfigError, "whole pixels"),
        ("", "-1, 0, 2, 2", ConfigError, "whole pixels"),
        ("", "23, 0, 2, 2", ConfigError, "does not lie within"),
        ("", "0, 0, 0, 2", ConfigError, "does not lie within"),
        ("", "9999999999, 0, 1, 1", ConfigError, "whole pixels"),
    ],
)
def test_hostile_masks_are_refused(painted: str, boxes: str, error: type[PagodaError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_mask(painted, boxes, (24, 20), LIMITS)


def test_an_inpainting_leaves_every_known_pixel_as_it_was(server: ModelServer) -> None:
    keep = np.ones((20, 24), bool)
    keep[5:12, 5:12] = False
    made = np.asarray(edited(server, kind="inpaint", keep=keep, strength=0.5).image)
    before = np.asarray(photo())
    assert np.array_equal(made[keep], before[keep])
    assert not np.array_equal(made[~keep], before[~keep])


def test_the_other_edits_have_the_sizes_that_they_should(server: ModelServer) -> None:
    assert edited(server).image.size == (24, 20)
    assert edited(server, kind="transfer", to=4, strength=0.2).image.size == (24, 20)
    assert edited(server, kind="upscale", image=photo((8, 6))).image.size == (16, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "inpaint"}, "where is the hole"),
        ({"kind": "transfer"}, "what shall it show"),
        ({"prompt": "a star", "label": None}, "trained on labels, not on texts"),
        ({"kind": "upscale"}, "not enlarged"),
        ({"run": "nested/under-way"}, "no generator yet"),
    ],
)
def test_what_cannot_be_done_is_said(server: ModelServer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PagodaError, match=message):
        edited(server, **settings)


def test_a_run_of_texts_is_told_in_words_what_an_image_shows_and_shall_show(server: ModelServer) -> None:
    one, other = (
        edited(server, run="texts", kind="transfer", label=None, prompt="a red circle", to=text)
        for text in ("a blue star", "a red circle")
    )
    rebuilt = edited(server, run="texts", label=None, prompt="a red circle")
    assert one.facts["edit"] == "transfer"
    assert one.image.size == (24, 20)
    assert np.array_equal(np.asarray(other.image), np.asarray(rebuilt.image))  # nothing is to be changed
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert edited(server, run="texts", kind="upscale", image=photo((8, 6)), label=None).image.size == (16, 12)


def test_an_image_is_read_in_one_call_where_the_run_has_such_an_encoder(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "finished", tmp_path / "fast")
    config = override(
        RunFolder.open(tmp_path / "fast").config(), {"amortise.loop.steps": 2, "amortise.loop.preview_every": 0}
    )
    amortise_run(str(tmp_path / "fast"), config, quiet=True)
    assert not can_encode_in_one_call(RunCatalog(runs), "finished")
    assert not can_encode_in_one_call(RunCatalog(runs), "nowhere")
    with ModelServer(RunCatalog(tmp_path), ServerConfig(batch_size=2)) as server:
        assert can_encode_in_one_call(server.catalog, "fast")
        one, exact = (edited(server, run="fast", encoder=kind) for kind in ("amortised", "teacher"))
    wanted = PagodaEditPipeline.from_pretrained(tmp_path / "fast", encoder="amortised").reconstruct(photo(), label=1)
    assert np.array_equal(np.asarray(one.image), np.asarray(wanted.image))
    assert not np.array_equal(np.asarray(one.image), np.asarray(exact.image))


def test_an_edit_tells_how_far_it_is_and_stops_when_told_to(server: ModelServer) -> None:
    desk, seen = EditDesk(server.catalog, "cpu"), []
    # A guess among ten classes: one inversion of all of them, then the edit's own.
    request = EditRequest(run="finished", kind="reconstruct", image=photo())

    def work(job: Any) -> Any:
        advance = job.advance

        def note(finished: int, total: int | None = None) -> None:
            seen.append((finished, total))
            if finished == 1:
                job.ask_to_stop()
            advance(finished, total)

        job.advance = note
        return desk.edit(job, request)

    with pytest.raises(JobCancelledError):
        server.submit(TaskRequest(run="finished", work=work)).result(60)
    assert seen == [(0, 2), (0, 2), (1, 2)]
