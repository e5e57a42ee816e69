"""What a teacher that never saw a label knows about classes: heads on its features, against pixels and against fresh weights."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.probed_teachers import fashion, fresh, teacher
from pagoda.networks.anatomy import features
from pagoda.stages.reading import ReadableModel
from pagoda.understanding import (
    Features,
    FeatureSpec,
    HeadConfig,
    SearchResult,
    Taps,
    draw_heat_map,
    read_features,
    search,
)

NAMES = [str(k) for k in range(10)]
TRAIN, TEST, SEARCH = 20_000, 10_000, 20_000
SIGMAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Down to a level that the teacher has seen a few times (one training sample in 6,000 lies below). Accuracy is flat to 0.5 % up to 0.1: of
4,000 images, 1,000 judge, and three draws of them put the best place at three levels, once at an edge. So the search reads all of
the heads' training images. With 0.002 added, which training hardly ever told the network, seed 0 found 83.0 % there, 82.9 % at 0.05."""
GRID = 4
"""Windows a side that the head reads. With 2 the heads of a first try stayed at 83.7 % (fresh weights: 84.9 %); 4 was then chosen on
training images. The search reads means over whole maps, as the paper's: on the grid itself its best place was the last part at the
lowest noise (86.5 % from 10,000 training images, seed 0; at the place found by means 85.9 %)."""


def chosen(model: ReadableModel, images: Tensor, labels: Tensor, seed: int, count: int) -> SearchResult:
    """Part and noise level, chosen on training images alone."""
    return search(
        model.denoiser, lambda rows: images[rows], labels, NAMES, data="fashion", sigmas=SIGMAS, count=count, seed=seed
    )


def probe(kind: str, budget: float, seed: int) -> dict[str, float]:
    """Search and fit on training images, judge on the test images."""
    model = teacher("fashion-plain", 0)
    model = model if kind == "trained" else fresh(model, seed)
    (images, labels), (test, truth) = fashion("train", round(TRAIN * budget)), fashion("test", round(TEST * budget))
    found = chosen(model, images, labels, seed, round(SEARCH * budget))
    tap, sigma = found.best
    taps = Taps(model.denoiser, [tap], pool="grid", grid=GRID, seed=seed)
    fitted = read_features(taps, lambda rows: images[rows], len(images), [sigma], data="train").features(tap, sigma)
    judged = read_features(taps, lambda rows: test[rows], len(test), [sigma], data="test").features(tap, sigma)
    figures = {
        "linear_accuracy": 100 * HeadConfig().fit(fitted, labels, NAMES).score(judged, truth),
        "knn_accuracy": 100 * HeadConfig(kind="knn").fit(fitted, labels, NAMES).score(judged, truth),
        "best_sigma": sigma,
        "best_tap_index": float(found.taps.index(tap)),
        "taps": float(len(found.taps)),
        "best_is_inside": float(found.is_inside),
    }
    if kind == "trained":
        figures["throughput_ratio"] = throughput_ratio(model, images)
        if seed == 0 and budget == 1:
            draw_heat_map(found, Path("docs/results/images/ddae-fashion-heat-map.png"))
    return figures


def pixels(budget: float, seed: int) -> dict[str, float]:
    """The same head on as many principal components of the pixels as the trained network has features (64 at most tell more)."""
    (images, labels), (test, truth) = fashion("train", round(TRAIN * budget)), fashion("test", round(TEST * budget))
    x, y = images.flatten(1), test.flatten(1)
    mean = x.mean(0)
    best = 0.0
    for components in (32, 64, 128):  # the best of them on the test images: generous to the baseline
        axes = torch.linalg.svd(x - mean, full_matrices=False).Vh[:components].T
        spec = FeatureSpec(model="pixels", tap=f"pca-{components}", sigma=1.0)
        head = HeadConfig().fit(Features((x - mean) @ axes, spec), labels, NAMES)
        best = max(best, 100 * head.score(Features((y - mean) @ axes, spec), truth))
    return {"linear_accuracy": best}


def throughput_ratio(model: ReadableModel, images: Tensor) -> float:
    """Images a second of extraction (noise, network, pooling), over those of the bare network up to the same part."""
    taps = Taps(model.denoiser, ["decoder.1"])
    batch = images[:256]
    sigma = torch.full((len(batch),), 0.1)
    scaled, stamp = model.denoiser.network_input(batch, sigma)  # type: ignore[operator]

    @torch.no_grad()
    def bare() -> None:
        features(taps.network, scaled, stamp, names=["decoder.1"])

    def tapped() -> None:
        taps(batch, 0.1, seeds=range(len(batch)))

    bare()
    tapped()
    ratios = []
    for _ in range(9):
        seconds = []
        for function in (bare, tapped):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


@benchmark(
    "ddae",
    question=(
        "How well does a linear head on one part of a teacher's network tell Fashion-MNIST's classes, when the teacher (16 px, small "
        "preset) never saw a label? 20,000 training images for the search and the heads, all test images."
    ),
    passes=[
        PassLine(
            "linear head: at least 86 % on the test images (smallest over seeds)",
            lambda r: r.min("trained", "linear_accuracy"),
            at_least=86,
        ),
        PassLine(
            "above a linear head on principal components of the pixels (median difference)",
            lambda r: r.median("trained", "linear_accuracy") - r.median("pixels", "linear_accuracy"),
            at_least=0.1,
        ),
        PassLine(
            "above the same network with fresh weights (median difference)",
            lambda r: r.median("trained", "linear_accuracy") - r.median("fresh", "linear_accuracy"),
            at_least=0.1,
        ),
        PassLine(
            "the best place of the search lies inside, not at an edge (all seeds)",
            lambda r: r.min("trained", "best_is_inside"),
            at_least=1,
        ),
        PassLine(
            "extraction runs at 90 % of the bare partial forward or more (smallest over seeds)",
            lambda r: r.min("trained", "throughput_ratio"),
            at_least=0.9,
        ),
    ],
)
def ddae(budget: float) -> dict[str, Arm]:
    """The trained network, the same network with fresh weights, and pixels."""
    return {
        "trained": partial(probe, "trained", budget),
        "fresh": partial(probe, "fresh", budget),
        "pixels": partial(pixels, budget),
    }
