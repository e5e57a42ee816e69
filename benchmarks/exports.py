"""Exports of one trained generator: speed of onnxruntime against PyTorch, what smaller weights cost, and the page in a browser."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes.demo import demo_config
from torch import Tensor

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.errors import MissingExtraError, import_extra
from pagoda.export import ImageMaker, export_onnx, export_web, run_graph
from pagoda.images import to_uint8
from pagoda.networks import OneStepGenerator
from pagoda.stages.config import override
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

SIZES = (16, 32)
BATCHES = (1, 16)
ROUNDS, SAMPLES = 30, 256
PAUSE = 0.1
"""Seconds."""
WEIGHTS = ("float32", "float16", "int8")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@cache
def trained(budget: float) -> OneStepGenerator:
    """The demo's run, kept in PAGODA_RUNS. One for all seeds, which decide the noise of the images that are compared."""
    config, changes = demo_config(0), dict[str, Any]()
    if budget < 1:
        steps = {"teach.loop.steps": 1100, "distill.loop.steps": 1400, "distill.teacher_pairs.count": 8000}
        changes |= {name: max(10, round(budget * value)) for name, value in steps.items()}
        changes |= {"grow.steps": [max(5, round(budget * 300))]}
        changes |= {"data": f"shapes:count={max(200, round(budget * 6000))}"}
    name = "shapes-seed0" + ("" if budget == 1 else f"-budget{budget:g}")
    folder = Path(os.environ.get("PAGODA_RUNS", "runs")) / name
    return load_generator(train(override(config, changes), str(folder), quiet=True))


def seconds_each(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of two calls, in turn, after a warm-up, and the median of first over second in each round.

    A pause before each: onnxruntime's threads go on spinning for a while, and would take the cores from PyTorch's.
    """
    pairs = []
    for _ in range(rounds + 2):
        times = []
        for call in (first, second):
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        pairs.append(times)
    pairs = pairs[2:]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def psnr(images: Tensor, wanted: Tensor) -> float:
    """Of clamped images, peak to peak 2, in dB; 200 at most, where nothing differs."""
    error = float((images.clamp(-1, 1) - wanted.clamp(-1, 1)).double().square().mean())
    return 200.0 if error == 0 else min(200.0, float(10 * np.log10(4 / error)))


def graphs(seed: int, *, size: int, budget: float) -> dict[str, float]:
    """Images a second by PyTorch and onnxruntime, and what each kind of weights costs."""
    generator = trained(budget)
    maker = ImageMaker(generator, size)
    rounds = max(3, round(ROUNDS * budget))
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        inputs = maker.inputs(max(16, round(SAMPLES * budget)), first_seed=10_000 + 1000 * seed)
        wanted = maker(*inputs)
        for weights in WEIGHTS:
            path = export_onnx(generator, Path(folder) / f"{weights}.onnx", size=size, weights=weights).path
            graph = run_graph(path.read_bytes())
            made = graph(inputs)
            figures[f"{weights}_mib"] = path.stat().st_size / 2**20
            figures[f"{weights}_largest_difference"] = float((made - wanted).abs().max())
            figures[f"{weights}_psnr"] = psnr(made, wanted)
            for batch in BATCHES:
                part = maker.inputs(batch)
                torch_s, onnx_s, ratio = seconds_each(
                    lambda p=part: maker(*p),  # type: ignore[misc]
                    lambda g=graph, p=part: g(p),  # type: ignore[misc]
                    rounds,
                )
                figures[f"{weights}_images_per_s_batch{batch}"] = batch / onnx_s
                figures[f"{weights}_speedup_batch{batch}"] = ratio
                if weights == "float32":
                    figures[f"torch_images_per_s_batch{batch}"] = batch / torch_s
    return figures


def page(seed: int, *, budget: float, weights: str) -> dict[str, float]:
    """The page of 32 px in headless Chromium, from the disk and without a network."""
    generator = trained(budget)
    api = import_extra("playwright.sync_api", "dev")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise MissingExtraError(
            "Chromium is needed here and is not installed. Run: apt-get install --no-install-recommends chromium"
        )
    seeds = list(range(20_000 + 1000 * seed, 20_000 + 1000 * seed + max(5, round(50 * budget))))
    labels = [seed % generator.num_classes for seed in seeds]
    wanted = to_uint8(sample_images(generator, seeds, labels=labels, resolution=SIZES[-1])).permute(0, 2, 3, 1).numpy()
    with tempfile.TemporaryDirectory() as folder, api.sync_playwright() as playwright:
        made = export_web(generator, Path(folder) / "page", size=SIZES[-1], weights=weights)  # type: ignore[arg-type]
        size = sum(path.stat().st_size for path in made.path.parent.iterdir())
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            tab = browser.new_context(offline=True).new_page()
            tab.goto(made.path.as_uri())
            tab.wait_for_selector("body[data-state=ready]", timeout=120_000)
            load = float(tab.evaluate("pagoda.model.seconds_to_load"))
            times, differences = [], []
            for i, (one, label) in enumerate(zip(seeds, labels, strict=True)):
                milliseconds, values = tab.evaluate(
                    f"(async () => {{ const t = performance.now(); const p = await pagoda.generate({one}, {label}, {SIZES[-1]});"
                    "return [performance.now() - t, Array.from(p.data)] })()"
                )
                pixels = np.array(values, dtype=np.int16).reshape(SIZES[-1], SIZES[-1], 4)[..., :3]
                times.append(milliseconds)
                differences.append(int(np.abs(pixels - wanted[i].astype(np.int16)).max()))
        finally:
            browser.close()
    return {
        "folder_mb": size / 1e6,
        "load_s": load,
        "ms_an_image": statistics.median(times),
        "ms_an_image_slowest": max(times),
        "largest_difference_of_255": max(differences),
    }


def _slowest(size: int, batch: int) -> Callable[..., float]:
    return lambda results: results.median(f"{size} px", f"float32_speedup_batch{batch}")


@benchmark(
    "exports",
    question="Are exports as good and as fast as PyTorch, and does the page stay small and quick?",
    passes=[
        *(
            PassLine(
                f"{size} px: float32 within 1e-4 of PyTorch",
                lambda r, s=size: r.max(f"{s} px", "float32_largest_difference"),
                at_most=1e-4,
            )
            for size in SIZES
        ),
        *(
            PassLine(
                f"{size} px, batch {batch}: onnxruntime at least as fast as PyTorch",
                _slowest(size, batch),
                at_least=1.0,
            )
            for size in SIZES
            for batch in BATCHES
        ),
        *(
            PassLine(
                f"{size} px: int8 at 40 dB of PyTorch or better",
                lambda r, s=size: r.min(f"{s} px", "int8_psnr"),
                at_least=40.0,
            )
            for size in SIZES
        ),
        PassLine("the page's folder stays under 15 MB", lambda r: r.max("page float32", "folder_mb"), at_most=15.0),
        PassLine(
            "an image of 32 px in under 200 ms in Chromium",
            lambda r: r.median("page float32", "ms_an_image"),
            at_most=200.0,
        ),
        PassLine(
            "the page's pixels are PyTorch's to one level of 255",
            lambda r: r.max("page float32", "largest_difference_of_255"),
            at_most=1.0,
        ),
    ],
)
def exports(budget: float) -> dict[str, Arm]:
    """One run; graphs at two sizes, and pages of two kinds of weights."""

    def graph_arm(size: int) -> Arm:
        return lambda seed: graphs(seed, size=size, budget=budget)

    def page_arm(weights: str) -> Arm:
        return lambda seed: page(seed, budget=budget, weights=weights)

    arms = {f"{size} px": graph_arm(size) for size in SIZES}
    return arms | {f"page {weights}": page_arm(weights) for weights in ("float32", "float16")}
