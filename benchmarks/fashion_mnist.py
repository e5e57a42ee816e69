"""Fashion-MNIST padded to 32 px, 8 -> 32 px with labels; compared with the test images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor

from benchmarks.harness import benchmark
from benchmarks.real_sets import common_lines, data_file, real_set, reduced
from pagoda.data import SourceConfig, open_source

SIZES = (8, 16, 32)


def folder() -> Path:
    """The four IDX files."""
    return data_file("fashion_mnist")


@cache
def test_images(size: int) -> tuple[Tensor, Tensor]:
    """The 10,000 images that no training saw."""
    source = open_source(str(folder()), options=SourceConfig(pad=32, split="test"))
    return reduced(source, size, range(len(source)))


@cache
def training_images(size: int) -> tuple[Tensor, Tensor]:
    """20,000 training images, for the judge."""
    source = open_source(str(folder()), options=SourceConfig(pad=32))
    return reduced(source, size, range(20_000))


fashion_mnist = benchmark(
    "fashion_mnist",
    question="8 -> 32 px on 60,000 grey images: does the same command work on real data?",
    passes=common_lines(SIZES),
)(
    real_set(
        "fashion_mnist",
        data=folder,
        sizes=SIZES,
        # 18,000 latents and no mirrors: the steps of `distill` and `grow` draw 75,000 images, and inverting all 60,000 would take as
        # long as all training.
        options=["--set", "source.pad=32", "mirror=false", "encode.share=0.3"],
        judged_on=training_images,
        compared_with=test_images,
        num_classes=10,
        count=5000,
        classifier_steps=1000,
    )
)
