"""Three small sets of 16 px that techniques are compared on: images to train on, images that no run sees, and a judge that saw neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.real_sets import data_file, reduced
from pagoda.data import SourceConfig, open_source
from pagoda.evaluation import SmallClassifier, train_classifier

SIZE = 16
Pair = tuple[Tensor, Tensor]
"""Images (N, C, SIZE, SIZE) uint8 and their classes (N,)."""


@dataclass(frozen=True)
class SmallSet:
    """A data set, read when it is first used.

    Attributes:
        name: Of the set, part of an arm's name.
        read: Makes training images, held-out images and the judge's images.
        drawn: What `pagoda` opens instead of a folder of the training images; none by itself.
    """

    name: str
    read: Callable[[], tuple[Pair, Pair, Pair]]
    drawn: str | None = None

    @cached_property
    def _parts(self) -> tuple[Pair, Pair, Pair]:
        return self.read()

    @property
    def held_out(self) -> Pair:
        """Images that no run sees."""
        return self._parts[1]

    @property
    def classes(self) -> int:
        """Classes 0 to this one, without it."""
        return int(self.held_out[1].max()) + 1

    @cached_property
    def judge(self) -> SmallClassifier:
        """The classifier whose features are compared; its images are neither trained on nor measured on."""
        images, labels = self._parts[2]
        return train_classifier(images, labels, num_classes=self.classes, steps=600)

    def source(self, folder: Path) -> str:
        """The training images as a run opens them; written below `folder`, a folder a class, unless they are drawn."""
        if self.drawn is not None:
            return self.drawn
        images, labels = self._parts[0]
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = folder / str(label) / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)
        return str(folder)


def _shapes() -> tuple[Pair, Pair, Pair]:
    def draw(count: int, seed: int) -> Pair:
        return reduced(open_source(f"shapes:count={count},size={SIZE},seed={seed}"), SIZE, range(count))

    return draw(600, 0), draw(2000, 1000), draw(4000, 1001)


def _fashion() -> tuple[Pair, Pair, Pair]:
    def rows(split: str, start: int, count: int) -> Pair:
        source = open_source(str(data_file("fashion_mnist")), options=SourceConfig(pad=32, split=split))
        return reduced(source, SIZE, range(start, start + count))

    return rows("train", 0, 2000), rows("test", 0, 2000), rows("train", 10_000, 10_000)


def _emoji() -> tuple[Pair, Pair, Pair]:
    def every(name: str) -> Pair:
        # Without the eight flags: too few to hold some back.
        options = SourceConfig(filter="skin_tone=, label!=8", compact_labels=True)
        source = open_source(str(data_file(name)), options=options)
        return reduced(source, SIZE, range(len(source)))

    images, labels = every("emoji_noto_128.zip")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, train = order[:500], order[500:]
    # The judge knows the same symbols in another hand's style.
    return (images[train], labels[train]), (images[held], labels[held]), every("emoji_fluent3d_128.zip")


@cache
def small_sets() -> dict[str, SmallSet]:
    """By name: drawn shapes (600 to train on), Fashion-MNIST (2,000), emoji by group (1,129)."""
    return {
        "shapes": SmallSet("shapes", _shapes, drawn="shapes:count=600"),
        "fashion": SmallSet("fashion", _fashion),
        "emoji": SmallSet("emoji", _emoji),
    }
