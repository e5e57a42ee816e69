"""Figures that several benchmarks report: about images, and about what a command cost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pagoda.errors import TrainingError
from pagoda.evaluation import FeatureExtractor, ScoreOptions, contrast, sharpness
from pagoda.evaluation import score_images as scores_of


def score_images(
    extractor: FeatureExtractor,
    real_images: Tensor,
    real_labels: Tensor,
    fake_images: Tensor,
    floor_split_seed: int,
    *,
    per_class: int | None = None,
) -> dict[str, float]:
    """Fréchet distance with its floor, and how contrast and sharpness of generated images compare with real ones.

    Args:
        extractor: Independent of every generator that is compared.
        real_images: (N, C, S, S), uint8 or floats in [-1, 1]; half of them is the reference, half makes the floor.
        real_labels: (N,) integers from 0; all 0 for data without classes.
        fake_images: Like `real_images`; N / 2 of them, with the labels of half of the data, make the most of it.
        floor_split_seed: Decides the halves.
        per_class: Real images of each class in each half; half of each class when None.

    Returns:
        `distance`, `floor` (real against real, at the same counts), `contrast_ratio` (mean within-image standard deviation,
        generated / real) and `sharpness_ratio` (mean absolute Laplacian, generated / real).

    Raises:
        ShapeError, DataError: as `pagoda.evaluation.score_images`.
    """
    (report,) = scores_of(
        extractor,
        real_images,
        real_labels,
        fake_images,
        seed=floor_split_seed,
        per_class=per_class,
        options=ScoreOptions(resamples=0),
    )
    real, fake = _as_float(real_images), _as_float(fake_images)
    assert report.floor is not None, "real images stand in for the generated ones"
    return {
        "distance": report.value,
        "floor": report.floor,
        "contrast_ratio": contrast(fake).per_image / contrast(real).per_image,
        "sharpness_ratio": sharpness(fake) / sharpness(real),
    }


# A process inherits the peak memory of the one that forked it, so the command is started by a small one and not by this one.
_MEASURE = """
import json, resource, subprocess, sys, time
log, *command = sys.argv[1:]
start = time.perf_counter()
with open(log, "wb") as output:
    status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
seconds = time.perf_counter() - start
print(json.dumps([status, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def measure_command(command: Sequence[str], *, log: Path) -> dict[str, float]:
    """Run a command to its end in a process of its own; its output goes to a file.

    Returns:
        `seconds` of wall time and `peak_mib`, the largest resident memory of the process or of any of its children.

    Raises:
        TrainingError: the command failed; the message holds the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    wrapped = [sys.executable, "-S", "-c", _MEASURE, str(log), *command]
    done = subprocess.run(wrapped, stdout=subprocess.PIPE, check=True)
    status, seconds, peak = json.loads(done.stdout)
    if status != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise TrainingError(f"`{' '.join(command)}` ended with status {status}. Its last words:\n{tail}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return {"seconds": seconds, "peak_mib": peak / unit}


def _as_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.double() / 127.5 - 1
