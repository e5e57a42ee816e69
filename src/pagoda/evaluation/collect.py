"""Features of many images, batch after batch, shared over processes: which process does a batch changes no digit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagoda.errors import DataError
from pagoda.evaluation.extractors import ClassifyingExtractor, FeatureExtractor


class Team(Protocol):
    """The processes that share the work, as far as evaluation needs to know (`pagoda.training.Runtime` is one)."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order; they may differ in length."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a set of images, in the order of the images."""

    values: Tensor
    """(N, dim) float32 on the CPU."""
    logits: Tensor | None = None
    """(N, classes) of an extractor that classifies."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Features:
        """Features of some rows."""
        return Features(self.values[rows], None if self.logits is None else self.logits[rows])


def image_batches(images: Tensor, batch_size: int = 256) -> Iterable[Tensor]:
    """Pieces of a tensor of images (N, C, H, W); 8-bit ones become floats in [-1, 1]."""
    for piece in images.split(batch_size):
        yield piece.float() / 127.5 - 1 if piece.dtype == torch.uint8 else piece


def extract_features(
    extractor: FeatureExtractor, batches: Iterable[Tensor], *, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Features (N, dim) float32 of all images, on the CPU.

    Args:
        batches: Images (B, C, S, S) in [-1, 1], batch after batch.
        progress: Called with the number of images done after each batch.

    Raises:
        DataError: there is no image, or images that the extractor refuses.
    """
    found: list[Tensor] = []
    done = 0
    for batch in batches:
        found.append(extractor(batch).float().cpu())
        done += len(batch)
        if progress is not None:
            progress(done)
    if done == 0:
        raise DataError("there are no images to take features of.")
    return torch.cat(found)


def collect_features(
    extractor: FeatureExtractor,
    load: Callable[[Tensor], Tensor],
    count: int,
    *,
    batch_size: int = 256,
    team: Team | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of `count` images that are made or read batch after batch.

    Batches have the same bounds whatever the number of processes; they are dealt out in turn and put together in order. So one
    process and several give the same features to the last bit, and everything that is computed from them is the same too.

    Args:
        load: Rows (B,) -> images (B, C, S, S) in [-1, 1]; called with consecutive rows.
        count: Number of images.
        batch_size: Images a call.
        team: The processes; None is this one alone.
        progress: Called with the number of images that this process has done.

    Raises:
        DataError: there is no image, or images that the extractor refuses.
    """
    if count < 1:
        raise DataError("there are no images to take features of.")
    rank, size = (0, 1) if team is None else (team.rank, team.world_size)
    batches = torch.arange(count).split(batch_size)
    values: list[Tensor] = []
    logits: list[Tensor] = []
    classifies, done = isinstance(extractor, ClassifyingExtractor), 0
    for rows in batches[rank::size]:
        images = load(rows)
        if isinstance(extractor, ClassifyingExtractor):
            features, scores = extractor.features_and_logits(images)
            logits.append(scores.float().cpu())
        else:
            features = extractor(images)
        values.append(features.float().cpu())
        done += len(rows)
        if progress is not None:
            progress(done)
    everything = _in_order(values, batches, extractor.dim, team)
    if not classifies:
        return Features(everything)
    width = logits[0].shape[1] if logits else 0
    if team is not None and size > 1:
        width = int(torch.stack(team.all_gather(torch.tensor([width]))).max())
    return Features(everything, _in_order(logits, batches, width, team))


def _in_order(mine: list[Tensor], batches: tuple[Tensor, ...], width: int, team: Team | None) -> Tensor:
    """The rows of all processes in the order of the images."""
    if team is None or team.world_size == 1:
        return torch.cat(mine)
    size = team.world_size
    parts = team.all_gather(torch.cat([torch.zeros(0, width), *mine]))
    dealt = [iter(part.split([len(rows) for rows in batches[rank::size]])) for rank, part in enumerate(parts)]
    return torch.cat([next(dealt[index % size]) for index in range(len(batches))])
