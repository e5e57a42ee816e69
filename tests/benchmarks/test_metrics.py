"""Helpers of the benchmarks: figures about images, and the cost of a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.metrics import measure_command, score_images
from torch import Tensor

from pagoda.errors import TrainingError


class Pooled:
    """Mean colour of each quarter of the image."""

    name, dim, input_size, resize, fingerprint = "pooled", 12, 2, "mean", "0" * 16

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


def images(seed: int, count: int = 200) -> Tensor:
    smooth = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(smooth, size=(8, 8), mode="nearest")
    return (large * 255).to(torch.uint8)


LABELS = torch.arange(200) % 2


def test_real_images_score_like_real_images() -> None:
    score = score_images(Pooled(), images(0), LABELS, images(1), 0)
    assert score.keys() == {"distance", "floor", "contrast_ratio", "sharpness_ratio"}
    assert score["distance"] < 3 * score["floor"]
    assert score["contrast_ratio"] == pytest.approx(1, abs=0.02)
    assert score["sharpness_ratio"] == pytest.approx(1, abs=0.05)


def test_half_contrast_halves_both_ratios_and_raises_the_distance() -> None:
    faded = (images(1).float() / 127.5 - 1) / 2
    score = score_images(Pooled(), images(0), LABELS, faded, 0)
    full = score_images(Pooled(), images(0), LABELS, images(1), 0)
    assert score["contrast_ratio"] == pytest.approx(full["contrast_ratio"] / 2, rel=1e-5)
    assert score["sharpness_ratio"] == pytest.approx(full["sharpness_ratio"] / 2, rel=1e-5)
    assert score["distance"] > 3 * full["distance"]
    assert score["floor"] == full["floor"]


def test_cost_of_a_command_is_its_own_and_not_that_of_its_parent(tmp_path: Path) -> None:
    code = "import time; block = bytearray(150 * 2**20); time.sleep(0.2); print('done')"
    cost = measure_command([sys.executable, "-c", code], log=tmp_path / "logs" / "out.txt")
    assert 0.2 <= cost["seconds"] < 30
    assert 150 <= cost["peak_mib"] < 200  # the block and a bare interpreter, nothing of this process
    small = measure_command([sys.executable, "-c", "pass"], log=tmp_path / "small.txt")
    assert small["peak_mib"] < cost["peak_mib"] - 100
    assert (tmp_path / "logs" / "out.txt").read_text() == "done\n"


def test_a_command_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)status 3.*no such shape"):
        measure_command([sys.executable, "-c", "print('no such shape'); raise SystemExit(3)"], log=tmp_path / "out.txt")
