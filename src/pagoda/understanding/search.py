"""Which part at which noise level says most: a grid of heads on a small split of the training images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.diffusion import Denoiser
from pagoda.errors import ConfigError, DataError
from pagoda.files import write_text_atomic
from pagoda.understanding.feature_table import FeatureTable, read_features
from pagoda.understanding.heads import HeadConfig
from pagoda.understanding.levels import log_snr_of_sigma
from pagoda.understanding.taps import Taps, describe_taps

DEFAULT_SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Noise levels of a search: DDAE found its best near 0.05 at 32 px, and others near 0.4 at 256 px."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Accuracy on held-out images of every part and noise level.

    Attributes:
        taps: P parts, in the order in which they run.
        sigmas: L noise levels.
        accuracy: (P, L) in [0, 1].
        head: Kind of the heads.
        count: Images that heads were fitted to; `held_out` that they were judged on.
    """

    taps: list[str]
    sigmas: list[float]
    accuracy: Tensor
    head: str
    count: int
    held_out: int

    @property
    def best(self) -> tuple[str, float]:
        """The part and noise level of the highest accuracy; the first of equals."""
        index = int(self.accuracy.flatten().argmax())
        return self.taps[index // len(self.sigmas)], self.sigmas[index % len(self.sigmas)]

    @property
    def is_inside(self) -> bool:
        """Whether the best lies neither in the first nor the last part, and neither at the lowest nor the highest noise."""
        tap, sigma = self.best
        row, column = self.taps.index(tap), self.sigmas.index(sigma)
        return 0 < row < len(self.taps) - 1 and 0 < column < len(self.sigmas) - 1

    def text(self) -> str:
        """The table for people."""
        width = max(len(tap) for tap in self.taps)
        lines = [f"{'sigma':>{width}}  " + "".join(f"{sigma:>8.3g}" for sigma in self.sigmas)]
        lines += [f"{'log-SNR':>{width}}  " + "".join(f"{log_snr_of_sigma(sigma):>8.2f}" for sigma in self.sigmas)]
        for tap, row in zip(self.taps, self.accuracy.tolist(), strict=True):
            marked = [
                f"{100 * value:.1f}{'*' if (tap, sigma) == self.best else ' '}"
                for sigma, value in zip(self.sigmas, row, strict=True)
            ]
            lines.append(f"{tap:>{width}}  " + "".join(f"{value:>8}" for value in marked))
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        facts = {**vars(self), "accuracy": self.accuracy.tolist(), "best": list(self.best)}
        write_text_atomic(path, json.dumps(facts, indent=1))


def search(
    denoiser: Denoiser,
    load: Callable[[Tensor], Tensor],
    labels: Tensor,
    class_names: list[str],
    *,
    data: str,
    taps: Sequence[str] | None = None,
    sigmas: Sequence[float] = DEFAULT_SIGMAS,
    count: int = 2000,
    grid: int = 1,
    head: HeadConfig | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SearchResult:
    """Fit a head at every part and noise level on part of the images, judge it on others.

    Every image is read once for all of them. Features are standardised before each fit, because their scale varies a hundredfold
    between parts and would decide the search otherwise. Only the images given here are used: keep test images out of them.

    Args:
        load: Indices (b,) -> images (b, C, H, W).
        labels: (N,) int64 from 0.
        data: Fingerprint of the images.
        taps: Parts; everything between stem and head when None.
        sigmas: Noise levels.
        count: Images used, a quarter of them to judge; fewer when there are fewer.
        grid: Windows a side that maps are averaged over, 1 for the whole map: search with what the head will read.
        head: linear or knn; `HeadConfig(l2=1e-3)` when None.
        seed: Decides which images are used and the noise.

    Raises:
        ConfigError: a head that reads tokens, or what `Taps` refuses.
        DataError: labels that do not fit, or fewer than 8 images.
        ShapeError: a map with fewer pixels than windows.
    """
    config = HeadConfig(l2=1e-3) if head is None else head
    if config.kind == "attention":
        raise ConfigError(
            "the search compares pooled features; use head linear or knn, then fit `attention` at the best place."
        )
    names = middle_taps(denoiser) if taps is None else list(taps)
    if len(labels) < 8:
        raise DataError(f"a search needs 8 labelled images or more, got {len(labels)}.")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    table = read_features(
        Taps(denoiser, names, pool="mean" if grid == 1 else "grid", grid=grid, seed=seed, encode=encode),
        lambda part: load(rows[part]),
        len(rows),
        sigmas,
        data=f"{data}|{seed}|{count}",
        batch_size=batch_size,
        progress=progress,
    )
    return search_table(table, labels[rows], class_names, config)


def search_table(table: FeatureTable, labels: Tensor, class_names: list[str], head: HeadConfig) -> SearchResult:
    """The same on features that were read before: the first three quarters of the rows fit, the last quarter judges."""
    split = len(table) * 3 // 4
    accuracy = torch.zeros(len(table.taps), len(table.sigmas), dtype=torch.float64)
    fit, judge = torch.arange(split), torch.arange(split, len(table))
    for i, tap in enumerate(table.taps):
        for j, sigma in enumerate(table.sigmas):
            features = table.features(tap, sigma)
            fitted = head.fit(features[fit], labels[fit], class_names)
            accuracy[i, j] = fitted.score(features[judge], labels[judge])
    return SearchResult(table.taps, table.sigmas, accuracy, head.kind, split, len(table) - split)


def middle_taps(denoiser: Denoiser) -> list[str]:
    """Every part but stem and head, in the order in which they run."""
    return [tap.name for tap in describe_taps(denoiser) if tap.name not in ("stem", "head")]
