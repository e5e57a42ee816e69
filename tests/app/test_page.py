"""The page in a real browser: every tab, a phone and a desk, the keyboard, cancelling, leaving, and runs that change meanwhile."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pagoda.app.jobs import TaskRequest
from pagoda.images import read_metadata
from pagoda.stages.provenance import compare_with_run

TABS = {"Generate": "#generate-result img", "Explore": "#explore-live img", "Edit": "#edit-go", "Watch": "#watch-content svg",
        "Data": "#data-content .tile", "About": "#about-card h1"}  # fmt: skip
PATIENCE = 60_000
"""Milliseconds: a busy machine is no failure."""


def open_page(browser: Any, app: Any, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page, complaints = context.new_page(), []
    own = "Method not implemented."  # Gradio's client says so of itself, now and then
    page.on(
        "console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") and m.text != own else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((app.url, "data:", "blob:")) else complaints.append(r.url))
    page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.goto(app.url, wait_until="commit")
    page.wait_for_selector(TABS["Generate"])
    return page, complaints


def go_to(page: Any, tab: str) -> None:
    button = page.get_by_role("tab", name=tab)
    if button.count() and button.first.is_visible():
        button.first.click()
    else:  # those for which a phone has no room are in a menu
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=tab).click()


@pytest.fixture(scope="module")
def page(browser: Any, app: Any) -> Iterator[Any]:
    opened, complaints = open_page(browser, app)
    yield opened
    opened.context.close()
    assert complaints == []


class Busy:
    """Keeps the model server busy until it is let go."""

    def __init__(self, server: Any) -> None:
        self.open = threading.Event()
        self.job = server.submit(TaskRequest(run="finished", work=self._wait), client="busy")

    def _wait(self, job: Any) -> None:
        while not self.open.wait(0.01):
            job.advance(0)

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *error: object) -> None:
        self.open.set()
        self.job.result(30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_every_tab_fits_its_window_shows_its_pictures_and_has_no_complaints(
    browser: Any, app: Any, width: int, scheme: str
) -> None:
    page, complaints = open_page(browser, app, width, scheme)
    for tab, content in TABS.items():
        go_to(page, tab)
        page.wait_for_selector(content)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        broken = "[...document.querySelectorAll('.pagoda img')].filter(i => i.offsetParent && !(i.complete && i.naturalWidth)).length"
        assert page.evaluate(broken) == 0, tab
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 19, 21)" if scheme == "dark" else "rgb(250, 248, 244)")
    assert not page.locator("#first-picture").is_visible()
    assert complaints == []
    page.context.close()


def choose(page: Any, label: str, option: str) -> None:
    field = page.get_by_label(label, exact=True).locator("visible=true").first
    field.click()
    menu = field.get_attribute("aria-controls")  # several menus may be open for a moment
    page.locator(f"[id^='{menu}'][role=option]", has_text=re.compile(f"^\\W*{re.escape(option)}\\W*$")).click()
    page.keyboard.press("Escape")


def test_all_octaves_come_side_by_side_and_what_is_downloaded_can_be_made_again(
    page: Any, runs: Path, tmp_path: Path
) -> None:
    go_to(page, "Generate")
    choose(page, "Class", "3: star")
    choose(page, "Size", "all sizes side by side")
    page.locator("#generate-go").click()
    page.wait_for_selector("#generate-result .octaves")
    captions = page.locator("#generate-result figcaption").all_inner_texts()
    assert captions == [f"seed {seed} · star" for seed in range(8)]
    assert page.locator("#generate-result .octaves img").count() == 16
    page.wait_for_selector("#generate-download:visible")
    with page.expect_download() as waiting:
        page.locator("#generate-download").click()
    archive = tmp_path / "images.zip"
    waiting.value.save_as(archive)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [s["seed"] for s in settings] == [*range(8), *range(8)]
    for entry in settings[::5]:
        assert compare_with_run(tmp_path / entry["file"], runs / "finished").equal, entry["file"]


def test_a_request_that_waits_says_so_and_can_be_cancelled(page: Any, app: Any) -> None:
    go_to(page, "Generate")
    with Busy(app.server):
        page.locator("#generate-go").click()
        page.wait_for_selector("#generate-status >> text=Waiting: 1 before you.")
        page.locator("#generate-stop").click()
        page.wait_for_selector("#generate-status >> text=Cancelled.")
        assert app.server.waiting == 1


def test_a_visitor_who_leaves_in_the_middle_leaves_no_work_behind(browser: Any, app: Any) -> None:
    page, _ = open_page(browser, app)
    until(lambda: app.server.waiting == 0)
    with Busy(app.server):
        page.locator("#generate-go").click()
        until(lambda: app.server.waiting == 2)
        page.context.close()
        until(lambda: app.server.waiting == 1)


def test_a_walk_follows_its_slider_and_candidates_are_picked_by_clicking(page: Any) -> None:
    go_to(page, "Explore")
    page.wait_for_selector("#explore-live img[alt*='50% across']")
    slider = page.locator("#explore-across input[type=range]")
    before = page.locator("#explore-live img").get_attribute("src")
    slider.focus()
    slider.press("ArrowRight")  # by the keyboard
    page.wait_for_selector("#explore-live img[alt*='51% across']")
    assert page.locator("#explore-live img").get_attribute("src") != before
    for number in (4, 5):  # the second click does not wait for the answer to the first
        page.locator("#explore-candidates button.thumbnail-item, #explore-candidates .thumbnail-lg").nth(number).click()
    page.wait_for_selector("#explore-live img[alt*='between 0, 1, 4, 5: 51% across, 50% down']")
    page.locator("#explore-around").click()
    page.wait_for_selector("#explore-result >> text=variation 8")
    page.locator("#explore-way").click()
    page.wait_for_selector("#explore-result >> text=100% / 100%")
    assert page.locator("#explore-result img").count() == 49
    page.locator("#explore-picks textarea, #explore-picks input").first.fill("1, two")
    page.wait_for_selector("#explore-status .bad >> text=a seed must be a whole number")


def test_a_hole_is_painted_and_filled_and_the_rest_stays(page: Any, tmp_path: Path) -> None:
    go_to(page, "Edit")
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    page.locator("#edit-upload input[type=file]").set_input_files(tmp_path / "photo.png")
    canvas = page.locator("#edit-easel canvas.paint")
    canvas.wait_for()
    choose(page, "The image shows", "1: square")
    page.get_by_label("Fill the painted hole").check()
    page.locator("#edit-go").click()
    page.wait_for_selector("#edit-status .bad >> text=where is the hole?")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    page.locator("#edit-go").click()
    page.wait_for_selector("#edit-status >> text=Done.")
    with page.expect_download() as waiting:
        page.locator("#edit-download").click()
    waiting.value.save_as(tmp_path / "filled.png")
    with Image.open(tmp_path / "filled.png") as opened:
        filled = np.asarray(opened.convert("RGB"))
    changed = (filled != noise).any(-1)
    assert 3 <= changed.sum() < 100  # a stroke across a third of 24 x 20 pixels
    rows, columns = changed.nonzero()
    assert 8 <= rows.min() <= rows.max() <= 12
    assert 6 <= columns.min() <= columns.max() <= 16
    facts = read_metadata(tmp_path / "filled.png")
    assert facts is not None
    assert (facts["edit"], facts["shows"]) == ("inpaint", 1)


def test_a_training_is_watched_and_runs_are_compared(page: Any) -> None:
    choose(page, "Run", "nested/under-way")
    go_to(page, "Generate")
    page.wait_for_selector("#generate-status >> text=no generator yet")
    go_to(page, "Watch")
    page.wait_for_selector("#watch-content >> text=Stage distill, step 6 of 6")
    choose(page, "Compare with", "finished")
    page.wait_for_selector("#watch-content svg[aria-label*='of each run']")
    choose(page, "Run", "finished")


def test_a_run_that_cannot_edit_has_no_tab_for_it(page: Any) -> None:
    for tab in ("Watch", "Edit"):
        go_to(page, tab)
        choose(page, "Run", "nested/under-way")
        page.wait_for_selector("#tab-edit-button", state="detached")
        # Whoever stood in the tab that goes finds himself in the first one.
        page.wait_for_selector(f"#tab-{'generate' if tab == 'Edit' else 'watch'}-button[aria-selected=true]")
        choose(page, "Run", "finished")
        page.wait_for_selector("#tab-edit-button:visible")


def test_a_run_of_texts_is_asked_by_prompts_and_its_images_can_be_made_again(
    browser: Any, app: Any, runs: Path, tmp_path: Path
) -> None:
    page, complaints = open_page(browser, app)
    assert not page.locator("#generate-prompt").is_visible()
    choose(page, "Run", "texts")
    field = page.locator("#generate-prompt textarea, #generate-prompt input").first
    field.fill("a large green star")
    field.press("Enter")
    page.wait_for_selector("#generate-result figcaption >> text=seed 7 · a large green star")
    page.wait_for_selector("#generate-download:visible")
    with page.expect_download() as waiting:
        page.locator("#generate-download").click()
    waiting.value.save_as(tmp_path / "images.zip")
    with zipfile.ZipFile(tmp_path / "images.zip") as opened:
        opened.extractall(tmp_path)
    entry = json.loads((tmp_path / "settings.json").read_text())[3]
    assert entry["prompts"] == ["a large green star"]
    assert compare_with_run(tmp_path / entry["file"], runs / "texts").equal
    field.fill("")
    page.locator("#generate-go").click()  # captions of the data
    page.wait_for_selector("#generate-result figcaption:not(:has-text('a large green star'))")
    go_to(page, "Explore")
    page.wait_for_selector("#explore-live img[alt*='50% across']")
    assert page.locator("#explore-prompt textarea, #explore-prompt input").first.input_value()
    go_to(page, "Edit")
    Image.new("RGB", (24, 20), (200, 30, 30)).save(tmp_path / "photo.png")
    page.locator("#edit-upload input[type=file]").set_input_files(tmp_path / "photo.png")
    page.wait_for_selector("#edit-status >> text=photo.png: 24 x 20 px")
    page.get_by_label("Carry over").check()
    page.locator("#edit-go").click()
    page.wait_for_selector("#edit-status .bad >> text=what shall it show?")
    page.locator("#edit-shows textarea, #edit-shows input").first.fill("a red square")
    page.locator("#edit-shall-show textarea, #edit-shall-show input").first.fill("a large green star")
    page.locator("#edit-go").click()
    page.wait_for_selector("#edit-status >> text=Done.")
    choose(page, "Run", "finished")
    page.wait_for_selector("#edit-shows", state="hidden")
    assert complaints == []
    page.context.close()


def test_a_run_of_a_newer_version_says_so_in_every_tab(page: Any) -> None:
    choose(page, "Run", "newer")
    for tab, place in (("Generate", "#generate-status"), ("Watch", "#watch-content"), ("About", "#about-status")):
        go_to(page, tab)
        page.wait_for_selector(f"{place} >> text=was made by pagoda 99.0")
    choose(page, "Run", "finished")


def test_a_run_that_is_deleted_while_it_is_open_is_named(browser: Any, app: Any, runs: Path) -> None:
    shutil.copytree(runs / "finished", runs / "brief")
    page, _ = open_page(browser, app)
    choose(page, "Run", "brief")
    page.locator("#generate-go").click()
    page.wait_for_selector("#generate-status >> text=8 images of brief")
    shutil.rmtree(runs / "brief")
    page.locator("#generate-go").click()
    page.wait_for_selector("#generate-status .bad >> text=there is no run 'brief' here (any more)")
    page.context.close()


def test_a_picture_is_told_which_model_made_it_and_a_hostile_one_is_refused(
    page: Any, runs: Path, tmp_path: Path
) -> None:
    go_to(page, "About")
    page.get_by_text("Which model made this picture?").click()
    chooser = page.locator("#about-upload input[type=file]")
    chooser.set_input_files(runs / "finished" / "samples" / "final-16.png")
    page.wait_for_selector("#about-verdict >> text=final-16.png: equal: the run makes the same pixels")
    page.locator(
        "#about-upload button[aria-label='Clear'], #about-upload button[aria-label='Remove this file']"
    ).first.click()
    hostile = tmp_path / "photo.png"
    hostile.write_bytes(b"<script>alert(1)</script>")
    chooser.wait_for(state="attached")
    chooser.set_input_files(hostile)
    page.wait_for_selector("#about-verdict .bad >> text=photo.png is not an image")


def test_everything_is_reached_by_the_keyboard(page: Any) -> None:
    go_to(page, "Generate")
    page.locator("#run input").focus()
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.innerText || document.activeElement.type"
            )
        )
        if reached[-1] == "generate-stop":
            break
    assert {"generate-go", "generate-stop"} <= set(reached)
    assert {"tab-explore-button", "tab-about-button"} <= set(reached)
    page.locator("#generate-go").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#generate-status >> text=8 images of finished")
