"""Fit a head to a run's own features and use it: search, fit, save; open, predict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import ImageDataset
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.files import write_text_atomic
from pagoda.stages.reading import ReadableModel
from pagoda.understanding import (
    DEFAULT_SIGMAS,
    Features,
    FeatureSpec,
    Head,
    HeadConfig,
    SearchResult,
    Taps,
    draw_heat_map,
    load_head,
    log_snr_of_sigma,
    read_features,
    search,
)
from pagoda.version import __version__

HEAD = "head.safetensors"
FACTS = "probe.json"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is searched and fitted."""

    head: HeadConfig = HeadConfig()
    tap: str | None = None
    """Part to read; None searches every part between stem and head."""
    sigma: float | None = None
    """Noise level to read at; None searches `sigmas`."""
    sigmas: tuple[float, ...] = DEFAULT_SIGMAS
    """Noise levels of the search."""
    search_count: int = 2000
    """Images that the search uses, a quarter of them to judge."""
    grid: int = 1
    """Windows a side that a map is averaged over, for linear and knn; 1 is the mean over the whole map."""
    held_out: float = 0.1
    """Share of the images that neither search nor fit sees, to tell the accuracy; 0 tells none."""
    draws: int = 1
    """Noises that features are averaged over."""
    seed: int = 0
    """Decides what is held out, and the noise of each image."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is a share in [0, 1), got {self.held_out}.")


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A head with what is known of it.

    Attributes:
        accuracy: On the images held out, in [0, 1]; None where none were.
        search: The search that chose part and noise level, where there was one.
    """

    head: Head
    accuracy: float | None
    search: SearchResult | None
    count: int

    def save(self, folder: Path, *, pictures: bool = True) -> None:
        """Write the head, its facts, and the table and heat map of the search.

        Raises:
            MissingExtraError: pictures are wanted and matplotlib is not installed.
        """
        self.head.save(folder / HEAD)
        spec = self.head.spec
        facts = {
            "version": __version__,
            "kind": self.head.kind,
            "spec": vars(spec),
            "log_snr": log_snr_of_sigma(spec.sigma),
            "class_names": self.head.class_names,
            "images": self.count,
            "accuracy": self.accuracy,
        }
        write_text_atomic(folder / FACTS, json.dumps(facts, indent=1))
        if self.search is not None:
            self.search.save(folder / "search.json")
            if pictures:
                draw_heat_map(self.search, folder / "search.png")


def fit_probe(
    model: ReadableModel,
    data: ImageDataset,
    config: ProbeConfig | None = None,
    *,
    cache: Path | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> FittedProbe:
    """Search the best part and noise level where they are not given, fit a head there, and judge it on images held out.

    Transfer to other data is the same call with those data: the model stays as it is.

    Args:
        data: Labelled images.
        cache: Folder for the features; memory then holds one batch while they are read, and a second fit reads nothing.
        progress: Called with what is under way and the number of images done.

    Raises:
        DataError: images without labels, of one class, or too few.
        ConfigError: a part or noise level that the model does not have.
    """
    config = config or ProbeConfig()
    labels = data.labels(torch.arange(len(data)))
    names = data.class_names
    if labels is None or names is None:
        raise DataError(
            "the images have no labels, which a head needs. Give class subfolders or --set source.label_column=."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    held = order[: round(config.held_out * len(order))]
    kept = order[len(held) :]
    found = None
    tap, sigma = config.tap, config.sigma
    if tap is None or sigma is None:
        found = search(
            model.denoiser,
            lambda rows: data.images(kept[rows], model.size),
            labels[kept],
            names,
            data=data.fingerprint,
            taps=None if tap is None else [tap],
            sigmas=config.sigmas if sigma is None else [sigma],
            count=config.search_count,
            grid=1 if config.head.kind == "attention" else config.grid,
            encode=model.encode,
            seed=config.seed,
            progress=None if progress is None else lambda done: progress("search", done),
        )
        tap, sigma = found.best
    taps = _taps(model, config.head.kind, tap, config.grid, config.seed, config.draws)
    table = read_features(
        taps,
        lambda rows: data.images(rows, model.size),
        len(data),
        [sigma],
        data=data.fingerprint,
        out=cache,
        progress=None if progress is None else lambda done: progress("features", done),
    )
    features = table.features(tap, sigma)
    head = config.head.fit(features[kept], labels[kept], names)
    accuracy = head.score(features[held], labels[held]) if len(held) else None
    return FittedProbe(head, accuracy, found, len(kept))


def predict_probe(
    model: ReadableModel, head: Head, data: ImageDataset, *, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Probabilities (N, K) of a head for images.

    Raises:
        ConfigError: the head was fitted to another model.
        DataError: features that are not finite.
    """
    taps = taps_of_spec(model, head.spec)
    if taps.spec(head.spec.tap, head.spec.sigma) != head.spec:
        head.predict_proba(Features(torch.zeros(0), taps.spec(head.spec.tap, head.spec.sigma)))  # says what differs
    found = []
    for rows in torch.arange(len(data)).split(256):
        images = data.images(rows, model.size).to(model.device)
        values = taps(images, head.spec.sigma, seeds=rows.tolist())[head.spec.tap].cpu()
        found.append(head.predict_proba(Features(values, head.spec)))
        if progress is not None:
            progress(int(rows[-1]) + 1)
    return torch.cat(found)


def taps_of_spec(model: ReadableModel, spec: FeatureSpec) -> Taps:
    """Taps that read what a specification says."""
    return Taps(
        model.denoiser,
        [spec.tap],
        pool=spec.pool,
        grid=spec.grid,
        seed=spec.seed,
        draws=spec.draws,
        encode=model.encode,
    )


def open_probe(folder: Path) -> tuple[Head, dict[str, Any]]:
    """The head that `FittedProbe.save` wrote, and its facts.

    Raises:
        ArtifactError: none is there.
    """
    path = folder / FACTS
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no probe. Fit one with `pagoda probe fit RUN --data DATA`.")
    return load_head(folder / HEAD), dict(json.loads(path.read_text(encoding="utf-8")))


def _taps(model: ReadableModel, kind: str, tap: str, grid: int, seed: int, draws: int) -> Taps:
    pool: Any = "tokens" if kind == "attention" else "mean" if grid == 1 else "grid"
    names: Sequence[str] = [tap]
    return Taps(model.denoiser, names, pool=pool, grid=grid, seed=seed, draws=draws, encode=model.encode)
