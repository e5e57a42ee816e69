"""What metrics cost at the sizes of papers: seconds and memory, each in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.metrics import measure_command
from pagoda.evaluation import (
    CIFARResNet,
    ClassifierConfig,
    ClassifierFeatures,
    FeatureMoments,
    SmallClassifier,
    collect_features,
    extrapolate_frechet,
    frechet_distance,
    kernel_distance,
    neighbour_scores,
)

COUNT = 10_000


def _features(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim, generator=generator) + 0.1


def _frechet(count: int, seed: int, dim: int = 2048) -> float:
    real, fake = _features(count, dim, seed)
    start = time.perf_counter()
    frechet_distance(FeatureMoments.from_features(real), FeatureMoments.from_features(fake))
    return time.perf_counter() - start


def _resnet(count: int, seed: int) -> float:
    """The 64 features of a ResNet-20; its weights do not change what it costs."""
    torch.manual_seed(seed)
    network = CIFARResNet(3).eval()
    images = torch.rand(count, 3, 32, 32) * 2 - 1
    start = time.perf_counter()
    with torch.no_grad():
        for batch in images.split(256):
            network.features(batch)
    return time.perf_counter() - start


def _classifier(count: int, seed: int) -> float:
    torch.manual_seed(seed)
    extractor = ClassifierFeatures(SmallClassifier(ClassifierConfig(num_classes=10)))
    images = torch.rand(count, 3, 32, 32) * 2 - 1
    start = time.perf_counter()
    collect_features(extractor, lambda rows: images[rows], count)
    return time.perf_counter() - start


def _small(measure: Callable[[Tensor, Tensor], object], count: int, seed: int) -> float:
    real, fake = _features(count, 96, seed)
    start = time.perf_counter()
    measure(real, fake)
    return time.perf_counter() - start


WORK: dict[str, Callable[[int, int], float]] = {
    "frechet-2048": _frechet,
    "features-resnet20": _resnet,
    "features-classifier": _classifier,
    "frechet-inf-96": partial(_small, lambda r, f: extrapolate_frechet(FeatureMoments.from_features(r), f)),
    "kernel-96": partial(_small, kernel_distance),
    "neighbours-96": partial(_small, neighbour_scores),
}
"""By arm: (images a side, seed) -> seconds, without making the inputs."""


def _arm(name: str, count: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        cost = measure_command([sys.executable, "-m", "benchmarks.metrics_cost", name, str(count), str(seed)], log=log)
        seconds = json.loads(log.read_text().splitlines()[-1])
    return {"seconds": seconds, "process_peak_mib": cost["peak_mib"]}


@benchmark(
    "metrics_cost",
    question=f"What do metrics cost for {COUNT:,} real and {COUNT:,} generated images?",
    passes=[
        PassLine("2,048-dimensional Fréchet distance (s)", lambda r: r.max("frechet-2048", "seconds"), at_most=10),
        PassLine(
            "in a process of at most 1 GiB, PyTorch and both sets of features included (MiB)",
            lambda r: r.max("frechet-2048", "process_peak_mib"),
            at_most=1024,
        ),
        PassLine("ResNet-20 features of 32-px images (s)", lambda r: r.max("features-resnet20", "seconds"), at_most=60),
    ],
)
def metrics_cost(budget: float) -> dict[str, Arm]:
    """One arm a metric or network."""
    count = max(100, round(COUNT * budget))
    return {name: partial(_arm, name, count) for name in WORK}


if __name__ == "__main__":
    arm, images, drawn_with = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(WORK[arm](images, drawn_with)))
