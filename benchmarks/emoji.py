"""Noto emoji without skin-tone variants, 16 -> 64 px with group labels: few images, many kinds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import benchmark
from benchmarks.real_sets import common_lines, data_file, real_set, reduced
from pagoda.data import ImageSource, SourceConfig, open_source

SIZES = (16, 32, 64)


def archive() -> Path:
    """The zip of the emoji."""
    return data_file("emoji_noto_128.zip")


@cache
def source() -> ImageSource:
    """The 1,637 emoji without a skin tone."""
    return open_source(str(archive()), options=SourceConfig(filter="skin_tone="))


@cache
def all_images(size: int) -> tuple[Tensor, Tensor]:
    """Every emoji and its mirror: there are too few to hold a reference back, so distances are to the training images."""
    images, labels = reduced(source(), size, range(len(source())))
    return torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])


emoji = benchmark(
    "emoji",
    question="16 -> 64 px on 1,637 emoji: does the same command work where images are few?",
    passes=common_lines(SIZES),
)(
    real_set(
        "emoji",
        data=archive,
        sizes=SIZES,
        options=["--filter", "skin_tone="],
        judged_on=all_images,
        compared_with=all_images,
        num_classes=9,
        count=1637,
        classifier_steps=600,
    )
)
