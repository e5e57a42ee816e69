"""The exported page in a real browser: PyTorch's pixels, nothing asked of any network, usable by hand and by keyboard."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.networks.conftest import make_dit, make_unet
from tests.stages.test_report import CHROMIUM, FLAGS

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.export import ONNX_TOLERANCE, WebRuntime, export_web, find_runtime
from pagoda.export.web_parts import compare_parts, run_parts, trace_parts
from pagoda.images import make_grid, read_metadata, to_uint8
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.training import noise_of_seeds

NOISE_TOLERANCE = 2e-6
"""PyTorch's vectorised logarithm and sine differ from the exact ones by some units in the last place of values up to 6."""


@pytest.fixture(scope="module")
def runtime() -> WebRuntime:
    try:
        return find_runtime()
    except ArtifactError as error:
        pytest.skip(f"needs onnxruntime-web. {error}")


@pytest.fixture(scope="module")
def generator(finished_run: RunFolder) -> OneStepGenerator:
    return load_generator(finished_run)


@pytest.fixture(scope="module")
def folder(finished_run: RunFolder, runtime: WebRuntime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "a <page> & more"
    words = ["--to", "web", "--weights", "float32", "--out", str(out)]
    assert main(["export", str(finished_run.path), *words]) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright. Run: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium. Run: apt-get install --no-install-recommends chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def open_page(browser: Any, folder: Path, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page from the disk, without a network; everything that it asks for or complains of is kept."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, seen = context.new_page(), []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda request: seen.append(request.url))
    page.goto((folder / "index.html").as_uri())
    settle(page)
    assert page.evaluate("document.body.dataset.state") == "ready", seen
    return page, seen


def settle(page: Any) -> None:
    page.wait_for_selector("body[data-state=ready], body[data-state=failed]", timeout=120_000)


@pytest.fixture(scope="module")
def page(browser: Any, folder: Path) -> Any:
    return open_page(browser, folder)[0]


def pixels_of(page: Any, call: str) -> np.ndarray:
    """(r, r, 3) bytes of an ImageData that a script gives."""
    values = page.evaluate(f"(async () => Array.from((await {call}).data))()")
    side = math.isqrt(len(values) // 4)
    return np.array(values, dtype=np.int16).reshape(side, side, 4)[..., :3]


def as_bytes(images: torch.Tensor) -> np.ndarray:
    return to_uint8(images).permute(0, 2, 3, 1).numpy().astype(np.int16)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 6, 6), (1, 4, 4), (3, 5, 5)])
@pytest.mark.parametrize("seed", [0, 41, 2**53 - 1])
def test_a_seed_gives_the_noise_that_it_gives_in_python(page: Any, seed: int, shape: tuple[int, ...]) -> None:
    wanted = noise_of_seeds([seed], shape)[0].flatten()
    made = page.evaluate(f"Array.from(pagoda.noiseOfSeed({seed}, {wanted.numel()}))")
    torch.testing.assert_close(torch.tensor(made), wanted, atol=NOISE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [8, 16])
def test_the_pages_images_are_pytorchs(page: Any, generator: OneStepGenerator, size: int) -> None:
    seeds, labels = [0, 7, 123456], [3, -1, 9]
    wanted = as_bytes(sample_images(generator, seeds, labels=labels, resolution=size))
    for seed, label, image in zip(seeds, labels, wanted, strict=True):
        made = pixels_of(page, f"pagoda.generate({seed}, {label}, {size})")
        assert made.shape == (size, size, 3)
        assert np.abs(made - image).max() <= 1  # a value half way between two levels may be rounded to either
        assert (made != image).mean() < 0.01


def test_the_grid_on_the_page_is_the_one_that_sample_writes(page: Any, generator: OneStepGenerator) -> None:
    page.fill("#seed", "5")
    page.click("text=Draw")
    settle(page)
    script = """i => {
        const canvas = document.querySelectorAll('#grid canvas')[i];
        return Array.from(canvas.getContext('2d').getImageData(0, 0, 16, 16).data);
    }"""
    wanted = as_bytes(sample_images(generator, range(5, 17)))
    for i in range(12):
        made = np.array(page.evaluate(script, i), dtype=np.int16).reshape(16, 16, 4)[..., :3]
        assert np.abs(made - wanted[i]).max() <= 1


def test_a_walk_joins_two_images_in_noise_and_class(page: Any, folder: Path, generator: OneStepGenerator) -> None:
    a, b = "{seed: 2, label: 2}", "{seed: 30, label: 7}"
    for t, seed, label in ((0, 2, 2), (1, 30, 7)):
        end = as_bytes(sample_images(generator, [seed], labels=[label]))[0]
        assert np.abs(pixels_of(page, f"pagoda.walk({a}, {b}, {t}, 16)") - end).max() <= 1
    first, second = noise_of_seeds([2, 30], (3, 8, 8)).double().flatten(1)
    angle = torch.acos(first @ second / (first.norm() * second.norm()))
    z = (torch.sin(0.7 * angle) * first + torch.sin(0.3 * angle) * second) / torch.sin(angle)
    sessions = sessions_of(folder)
    inputs = (z.float().reshape(1, 3, 8, 8), torch.tensor([2]), torch.tensor([7]), torch.tensor([0.3]))
    wanted = as_bytes(run_parts(sessions, inputs)[-1])[0]
    assert np.abs(pixels_of(page, f"pagoda.walk({a}, {b}, 0.3, 16)") - wanted).max() <= 1


def sessions_of(folder: Path) -> list[Any]:
    """The page's own graphs, as they lie in it, for onnxruntime in Python."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    blocks = re.findall(r'id="part-\d+">([^<]*)<', (folder / "index.html").read_text())
    assert len(blocks) == 2
    models = [gzip.decompress(base64.b64decode(block)) for block in blocks]
    return [onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]) for m in models]


def test_nothing_is_asked_of_anybody_and_no_other_script_runs(browser: Any, folder: Path) -> None:
    page, seen = open_page(browser, folder)
    assert seen == [(folder / "index.html").as_uri()]
    text = (folder / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-[\w+/=]+' 'wasm-unsafe-eval'; style-src 'sha256-[\w+/=]+'; "
        r"img-src data:; base-uri 'none'; form-action 'none'",
        policy[1],
    )
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:,)", text)
    inject = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    page.evaluate(f"() => {{ {inject} }}")
    assert page.evaluate("window.broken === undefined")
    assert page.evaluate("fetch('https://example.org/').then(() => 'went', () => 'refused')") == "refused"
    assert any("Content Security Policy" in line for line in seen[1:])


def test_a_title_is_text(browser: Any, finished_run: RunFolder, folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert f"<title>{finished_run.path.name}</title>" in text
    facts = json.loads((folder / "pagoda.json").read_text())
    assert facts["class_names"][3] == "star"
    assert (facts["sizes"], facts["weights"]) == ([8, 16], "float32")
    assert facts["difference"] <= ONNX_TOLERANCE


def test_everything_can_be_done_by_keyboard(browser: Any, folder: Path) -> None:
    page, seen = open_page(browser, folder)
    page.focus("#seed")
    page.keyboard.press("Control+A")
    page.keyboard.type("40")
    page.keyboard.press("Enter")
    settle(page)
    assert page.get_attribute("#grid button", "aria-label") == "seed 40, circle"
    page.focus("#grid button:nth-child(2)")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.eval_on_selector_all("#grid [aria-pressed=true]", "found => found.length") == 2
    assert page.inner_text("#from") == "seed 41, square"
    page.focus("#position")
    page.keyboard.press("End")
    page.wait_for_selector("#between[data-position='1']")
    same = (
        "(() => { const bytes = c => String(c.getContext('2d').getImageData(0, 0, 16, 16).data);"
        "return bytes(document.getElementById('between')) === bytes(document.querySelectorAll('#grid canvas')[2]) })()"
    )
    assert page.evaluate(same)
    page.focus("input[name=size]:checked")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert "images of 8 px" in page.inner_text("#status")
    assert seen == [(folder / "index.html").as_uri()]


def test_a_seed_that_is_none_is_refused_in_words(browser: Any, folder: Path) -> None:
    page, _ = open_page(browser, folder)
    page.evaluate("document.getElementById('seed').value = ''")
    page.select_option("#count", "4")
    assert page.inner_text("#status") == "A seed is a whole number, 0 or larger."


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_fingers(browser: Any, folder: Path, width: int, scheme: str) -> None:
    page, _ = open_page(browser, folder, width, scheme)
    page.click("#grid button:nth-child(1)")
    page.click("#grid button:nth-child(4)")
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    touched = "button, select, input:not([type=radio]), #sizes label"
    small = "found => found.filter(e => e.getBoundingClientRect().height < 44).map(e => e.id || e.textContent)"
    assert page.eval_on_selector_all(touched, small) == []
    background = {"light": "rgb(250, 248, 244)", "dark": "rgb(19, 19, 21)"}[scheme]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background


def test_a_saved_grid_says_what_made_it_and_is_made_again(
    page: Any, finished_run: RunFolder, generator: OneStepGenerator, tmp_path: Path
) -> None:
    page.fill("#seed", "11")
    page.click("text=Draw")
    settle(page)
    with page.expect_download() as waiting:
        page.click("#save")
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    assert path.name == f"{finished_run.path.name}-11.png"
    facts = read_metadata(path)
    assert facts is not None
    assert (facts["kind"], facts["seeds"], facts["model"]) == ("grid", list(range(11, 23)), model_hash(generator))
    found = compare_with_run(path, finished_run.path)
    assert found.largest <= 1
    if not found.equal:
        assert "torch was onnxruntime-web" in str(found)
    images = sample_images(generator, facts["seeds"])
    assert make_grid(images, columns=4, scale=facts["scale"]).size[0] >= 400


@pytest.mark.parametrize("backbone", ["dit", "unconditional"])
def test_other_generators_are_the_same_function_in_parts(backbone: str) -> None:
    model = make_dit() if backbone == "dit" else make_unet(num_class_embeds=None)
    generator = OneStepGenerator.from_teacher(model).grow(channels=8).eval()
    parts = trace_parts(generator)
    assert [part.size for part in parts] == generator.sizes
    assert compare_parts(generator, parts)[0] < ONNX_TOLERANCE


def test_another_release_of_the_runtime_is_refused(runtime: WebRuntime, tmp_path: Path) -> None:
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / "ort.wasm.bundle.min.mjs").write_text(runtime.script)
    (dist / "ort-wasm-simd-threaded.wasm").write_bytes(runtime.wasm)
    assert find_runtime(tmp_path) == runtime
    (dist / "ort-wasm-simd-threaded.wasm").write_bytes(runtime.wasm[:-1] + b"\1")
    with pytest.raises(ArtifactError, match=r"wasm in .* is not that of onnxruntime-web 1\.\d+\.\d+: its SHA-512 is"):
        find_runtime(tmp_path)


def test_a_missing_runtime_is_told_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match=r"Run `npm pack onnxruntime-web@[\d.]+` and give the file"):
        find_runtime(tmp_path)
    (tmp_path / "half.tgz").write_bytes(b"\x1f\x8b\x08\0")
    with pytest.raises(ArtifactError, match="cannot be read as the package"):
        find_runtime(tmp_path / "half.tgz")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"no npm here .*npm pack onnxruntime-web@.*--runtime onnxruntime-web"):
        find_runtime(cache=tmp_path / "cache")


def test_nothing_is_written_over_other_things(generator: OneStepGenerator, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ArtifactError, match=r"other things than a page of pagoda \(\['thesis.tex'\]\)"):
        export_web(generator, tmp_path)
    with pytest.raises(ConfigError, match="unknown weights 'int4'"):
        export_web(generator, tmp_path / "x", weights="int4")  # type: ignore[arg-type]
    tiny = OneStepGenerator.from_teacher(make_unet(sample_size=2, in_channels=1, out_channels=1))
    with pytest.raises(ShapeError, match="at least 16 numbers, this generator takes noise of 1 x 2 x 2"):
        export_web(tiny, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
