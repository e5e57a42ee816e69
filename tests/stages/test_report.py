"""`report.html`: whole in one file, true to the run, and well-behaved in a real browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import tiny_config

from pagoda.errors import ArtifactError
from pagoda.evaluation import ScoreOptions
from pagoda.stages.evaluate import evaluate_run
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime


@pytest.fixture(scope="module")
def report(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    shutil.copytree(finished_run.path, folder)
    run = RunFolder.open(folder)
    options = ScoreOptions(resamples=3, neighbours=2)
    evaluate_run(run, Runtime("cpu"), features="random", metrics=("fd", "kd", "recall"), options=options)
    return write_report(run)


def test_nothing_is_fetched_and_no_script_runs(report: Path) -> None:
    text = report.read_text()
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', text))


def test_every_part_of_a_finished_run_is_there(report: Path) -> None:
    text = report.read_text()
    found = re.findall(r'<section id="(\w+)"', text)
    assert found == [
        "summary", "samples", "octaves", "scores", "gap", "reconstructions", "latents",
        "curves", "training", "cost", "continue", "configuration",
    ]  # fmt: skip
    assert "a &lt;run&gt; &amp; more" in text  # the name of the folder is text
    assert "FD ↓" in text
    assert "reference " in text
    assert "noise_scale" in text
    assert "--size 32" in text


def test_a_run_that_has_not_begun_has_a_report_too(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny_config())
    text = write_report(run).read_text()
    assert "0 of 4" in text
    assert "not started" in text
    assert f"pagoda grow {run.path}" in text


def test_a_stage_under_way_is_shown_with_its_curve_and_the_command_that_goes_on(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    record = run.record("grow-16")
    assert record is not None
    run.write_record("grow-16", {**record, "done": False, "results": {}})
    with run.metrics.open("a") as file:
        file.write('{"stage": "grow-16", "st')  # a line that is being written
    text = write_report(run).read_text()
    assert "under way" in text
    assert "goes on with grow-16" in text


def test_a_broken_line_in_the_middle_of_the_log_is_named(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(ArtifactError, match="line 2 of"):
        write_report(run)


def open_page(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    page.goto(path.as_uri())
    return page, complaints


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_every_picture_shows(browser: Any, report: Path, width: int, scheme: str) -> None:
    page, complaints = open_page(browser, report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0 && i.clientWidth > 20)).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.images.length") > 10
    flat = "[...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().height < 8).length"
    assert page.evaluate(flat) == 0
    if width >= 390:  # on the narrowest screens wide tables are scrolled
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
        assert page.evaluate(cut) == []
    assert complaints == []


def test_dark_and_light_follow_the_readers_system_and_print_is_light(browser: Any, report: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, _ = open_page(browser, report, 1000, "light")
    dark, _ = open_page(browser, report, 1000, "dark")
    assert light.evaluate(background) == "rgb(250, 248, 244)"
    assert dark.evaluate(background) == "rgb(19, 19, 21)"
    dark.emulate_media(media="print")
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.pdf().startswith(b"%PDF")


def test_text_in_charts_can_be_read_on_a_phone(browser: Any, report: Path) -> None:
    page, _ = open_page(browser, report, 390)
    sizes = page.evaluate("[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) >= 9  # pixels, line height


def test_links_lead_to_their_sections(browser: Any, report: Path) -> None:
    page, _ = open_page(browser, report, 1000)
    missing = (
        "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert page.evaluate(missing) == 0
    assert page.evaluate("document.querySelectorAll('nav a').length") == 11
