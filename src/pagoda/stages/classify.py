"""Classify images by a run's own diffusion model, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import ImageDataset
from pagoda.errors import ConfigError, DataError
from pagoda.files import write_text_atomic
from pagoda.stages.reading import ReadableModel
from pagoda.understanding import (
    AtRisk,
    Candidates,
    DiffusionClassifier,
    ErrorConfig,
    Full,
    LevelGrid,
    calibration_error,
)
from pagoda.version import __version__


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """How `pagoda classify` spends its network calls."""

    levels: int = 64
    """Noise levels of the full evaluation."""
    risk: float = 0.01
    """Chance, per image, of dropping the answer of the full evaluation on the way; 0 evaluates everything."""
    sigma_mean: float = -1.0
    """Mean of ln sigma over the levels."""
    sigma_std: float = 0.8
    """Standard deviation of ln sigma over the levels."""
    weighting: str = "eps"
    """eps (error of the noise, as in the paper), elbo, edm or x0."""
    batch_size: int = 256
    """Rows a network call."""
    seed: int = 0
    """Decides the noise of each image."""


@dataclass(frozen=True)
class ClassifiedImages:
    """Answers for a set of images.

    Attributes:
        names: Name of each image.
        classes: (N,) int64.
        probabilities: (N, K).
        class_names: K names.
        calls: (N,) network rows spent on each image.
        truth: (N,) the class of each image where the images' own labels are classes of the model; None otherwise.
        calibrated: Whether a temperature was fitted, so that probabilities are probabilities.
    """

    names: list[str]
    classes: Tensor
    probabilities: Tensor
    class_names: list[str]
    calls: Tensor
    truth: Tensor | None
    calibrated: bool

    @property
    def accuracy(self) -> float | None:
        """Share of images that are right, in [0, 1]; None where the truth is not known."""
        return None if self.truth is None else float((self.classes == self.truth).double().mean())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        rows = [
            {"image": name, "class": self.class_names[k], "probability": round(float(p[k]), 6), "calls": int(n)}
            for name, k, p, n in zip(self.names, self.classes.tolist(), self.probabilities, self.calls, strict=True)
        ]
        report: dict[str, Any] = {
            "version": __version__,
            "calibrated": self.calibrated,
            "accuracy": self.accuracy,
            "calls_per_image": float(self.calls.double().mean()),
        }
        if self.truth is not None:
            report["calibration_error"] = calibration_error(self.probabilities, self.truth)
        return {**report, "images": rows}

    def save(self, path: Path) -> None:
        """Write `to_json`."""
        write_text_atomic(path, json.dumps(self.to_json(), indent=1))


def classify_images(
    model: ReadableModel,
    data: ImageDataset,
    config: ClassifyConfig | None = None,
    *,
    calibrate_on: ImageDataset | None = None,
    progress: Callable[[int], None] | None = None,
) -> ClassifiedImages:
    """The class of each image under which the model denoises it best.

    Args:
        calibrate_on: Labelled images, others than `data`, on which one temperature is fitted.
        progress: Called with the number of images done.

    Raises:
        ConfigError: the model has no classes, or one only; a setting out of range.
        DataError: `calibrate_on` has no labels of the model's classes.
    """
    config = config or ClassifyConfig()
    classifier = build_classifier(model, config)
    if calibrate_on is not None:
        truth = match_labels(model.class_names or [], calibrate_on)
        if truth is None:
            raise DataError("the images to calibrate on have no labels that are classes of this model.")
        shown = calibrate_on.images(torch.arange(len(calibrate_on)), model.size).to(model.device)
        classifier.calibrate(shown, truth, seeds=range(len(calibrate_on)))
    found = []
    for rows in torch.arange(len(data)).split(64):
        images = data.images(rows, model.size).to(model.device)
        found.append(classifier.predict(images, seeds=rows.tolist()))
        if progress is not None:
            progress(int(rows[-1]) + 1)
    return ClassifiedImages(
        names=list(data.sample_ids),
        classes=torch.cat([part.classes for part in found]),
        probabilities=torch.cat([part.probabilities for part in found]),
        class_names=list(classifier.candidates.names),
        calls=torch.cat([part.calls for part in found]),
        truth=match_labels(model.class_names or [], data),
        calibrated=calibrate_on is not None,
    )


def build_classifier(model: ReadableModel, config: ClassifyConfig) -> DiffusionClassifier:
    """The classifier of a model with these settings.

    Raises:
        ConfigError: the model has no classes, or one only; a setting out of range.
    """
    if not 0 <= config.risk < 1:
        raise ConfigError(f"--risk is a chance in [0, 1), got {config.risk}.")
    return DiffusionClassifier(
        model.denoiser,
        Candidates.of_model(model.denoiser, model.class_names),
        grid=LevelGrid.log_normal(config.levels, mean=config.sigma_mean, std=config.sigma_std),
        elimination=AtRisk(risk=config.risk) if config.risk > 0 else Full(),
        config=ErrorConfig(weighting=config.weighting, seed=config.seed, batch_size=config.batch_size),  # type: ignore[arg-type]
        encode=model.encode,
    )


def match_labels(class_names: Sequence[str], data: ImageDataset) -> Tensor | None:
    """Labels of images in the numbering of `class_names`, by name; None where the images have other classes or none."""
    labels = data.labels(torch.arange(len(data)))
    known = {name: k for k, name in enumerate(class_names)}
    if labels is None or data.class_names is None or not set(data.class_names) <= set(known):
        return None
    return torch.tensor([known[name] for name in data.class_names])[labels]
