"""A run of stand-ins, in which a plan builds what the stages would build: images of noise, fresh weights, drawn latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pagoda.data import Downsampler, ImageDataset, ImageSource, LatentStore, SourceConfig
from pagoda.networks import ImageCodec, PixelCodec
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.teacher_pairs import TeacherPairs, pair_conditions
from pagoda.text import CaptionTable
from pagoda.training import Runtime, seeded_generator

ROWS = 64
"""Images of a stand-in, or as many as there are classes."""


class NoiseSource:
    """As many classes and channels as the real source, some of its captions, and nothing in it; what an `ImageDataset` asks is answered."""

    def __init__(self, source: ImageSource, channels: int | None = None, captions: Sequence[str] = ()) -> None:
        self.captions = captions
        self.options = SourceConfig()
        self.class_names = source.class_names
        self.num_classes = source.num_classes
        self.channels = source.channels if channels is None else channels
        self.fingerprint = "stand-in"

    def __len__(self) -> int:
        return max(ROWS, self.num_classes)

    def label(self, index: int) -> int | None:
        """Every class in turn."""
        return index % self.num_classes if self.num_classes else None

    def caption(self, index: int) -> str | None:
        """Every one in turn; None where there are none."""
        return self.captions[index % len(self.captions)] if self.captions else None

    def sample_id(self, index: int) -> str:
        """The number."""
        return str(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def image(self, index: int) -> Image.Image:
        """One pixel; the set is made from arrays."""
        return Image.new("L" if self.channels == 1 else "RGB", (1, 1))


@dataclass(frozen=True)
class StandIn(StageContext):
    """A context whose captions need not be in its folder.

    Attributes:
        table: Of a run of texts.
    """

    table: CaptionTable | None = None

    @property
    def captions(self) -> CaptionTable | None:  # type: ignore[override]
        """`table`."""
        return self.table


def stand_in(
    config: RunConfig,
    source: ImageSource,
    folder: Path,
    runtime: Runtime,
    *,
    sizes: list[int],
    codec: ImageCodec | None = None,
    captions: Sequence[str] = (),
) -> StandIn:
    """The context of a run like `config` in an empty folder; its images, or latents of a codec, are noise, one for all rows.

    Args:
        captions: Of its images, in turn.
    """
    noise = np.random.default_rng(0)
    empty = NoiseSource(source, None if codec is None else codec.latent_channels, captions)
    rows = np.arange(len(empty))
    pixels = {}
    for size in sizes:
        image = noise.integers(0, 256, (1, empty.channels, size, size), dtype=np.uint8)
        pixels[size] = np.broadcast_to(image, (len(rows), *image.shape[1:]))
    data = ImageDataset(pixels, rows, source=empty, downsampler=Downsampler(config.downsampler))
    if config.threads:
        torch.set_num_threads(config.threads)
    # Few, and no evaluation beside the training.
    config = dataclasses.replace(config, grow=dataclasses.replace(config.grow, fakes=min(config.grow.fakes, ROWS)))
    if not config.teacher.labels:
        data.drop_labels()
    return StandIn(RunFolder(folder), config, runtime, data, codec or PixelCodec(data.channels), quiet=True)


def drawn_latents(context: StageContext) -> LatentStore:
    """A whole store of unit noise, one latent an image and its mirror."""
    data, base = context.data, context.config.base
    return _drawn_store(
        context.run.latents,
        (data.channels, base, base),
        len(data),
        flips=context.config.mirror,
        scale=1.0,
        guided=context.config.guidance.active,
    )


def drawn_pairs(context: StageContext) -> TeacherPairs:
    """Pairs whose images are noise."""
    data, base = context.data, context.config.base
    store = _drawn_store(context.run.teacher_pairs, (data.channels, base, base), len(data), flips=False, scale=0.5)
    settings = dataclasses.replace(context.config.distill.teacher_pairs, count=len(data))
    distill = dataclasses.replace(context.config.distill, teacher_pairs=settings)
    few = dataclasses.replace(context, config=dataclasses.replace(context.config, distill=distill))
    return TeacherPairs(store, pair_conditions(few), context.config.seed, context.config.guidance.scale_max)


def _drawn_store(
    path: Path, shape: tuple[int, int, int], count: int, *, flips: bool, scale: float, guided: bool = False
) -> LatentStore:
    provenance = {"kind": "stand-in"}
    store = LatentStore.create(path, provenance=provenance, shape=shape, count=count, flips=flips)
    for shard in store.missing_shards():
        rows = len(store.shard_rows(shard)[0])
        z = scale * torch.randn(rows, *shape, generator=seeded_generator("stand-in", shard))
        store.write_shard(shard, z, torch.ones(rows) if guided else None)
    return LatentStore.open(path)
