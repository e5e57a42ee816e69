"""Classify images by a run's own diffusion model, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import ImageDataset
from pagoda.errors import ConfigError, DataError
from pagoda.stages.answers import ClassifiedImages, PartialAnswers, join_answers
from pagoda.stages.reading import ReadableModel
from pagoda.understanding import (
    AtRisk,
    Candidates,
    DiffusionClassifier,
    ErrorConfig,
    Full,
    LevelGrid,
)

BATCH = 64
"""Images that are answered, and written down, at once."""
DEFAULT_PROMPTS = ("{}",)


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
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    """For a model of texts: the text of a class, {} standing for its name; of several, the one that fits best counts."""
    class_names: tuple[str, ...] = ()
    """For a model of texts: the classes; those of the images when empty."""


def classify_images(
    model: ReadableModel,
    data: ImageDataset,
    config: ClassifyConfig | None = None,
    *,
    calibrate_on: ImageDataset | None = None,
    out: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> ClassifiedImages:
    """The class of each image under which the model denoises it best.

    Args:
        calibrate_on: Labelled images, others than `data`, on which one temperature is fitted.
        out: JSON file of the answers. What is done lies beside it on the way, and the same call continues it.
        progress: Called with the number of images done.

    Raises:
        ConfigError: the model has no classes and reads no texts, or one class only; a setting out of range.
        DataError: `calibrate_on` has no labels of the classes, or images without class names for a model of texts.
        ArtifactError: what lies beside `out` is of another model, other images or other settings.
    """
    config = config or ClassifyConfig()
    candidates = open_candidates(model, data, config)
    classifier = build_classifier(model, config, candidates)
    names = list(candidates.names)
    partial = None
    if out is not None:
        facts = {
            "model": model.hash,
            "images": data.fingerprint,
            "calibrated_on": None if calibrate_on is None else calibrate_on.fingerprint,
            "class_names": names,
            **asdict(config),
        }
        partial = PartialAnswers(out, facts)
    rows: list[dict[str, Any]] = [] if partial is None else partial.rows
    if partial is not None and partial.temperature is not None:
        classifier.temperature = partial.temperature
    else:
        if calibrate_on is not None:
            _calibrate(model, classifier, calibrate_on)
        if partial is not None:
            partial.begin(classifier.temperature)
            rows = partial.rows
    for part in torch.arange(len(data)).split(BATCH)[len(rows) :]:
        images = data.images(part, model.size).to(model.device)
        found = classifier.predict(images, seeds=part.tolist())
        answers = (found.classes, found.probabilities, found.calls)
        if partial is not None:
            partial.add(*answers)
        else:
            rows.append(dict(zip(("classes", "probabilities", "calls"), (a.tolist() for a in answers), strict=True)))
        if progress is not None:
            progress(int(part[-1]) + 1)
    classes, probabilities, calls = join_answers(rows)
    finished = ClassifiedImages(
        names=list(data.sample_ids),
        classes=classes,
        probabilities=probabilities,
        class_names=names,
        calls=calls,
        truth=match_labels(names, data),
        calibrated=calibrate_on is not None,
    )
    if out is not None and partial is not None:
        finished.save(out)
        partial.remove()
    return finished


def _calibrate(model: ReadableModel, classifier: DiffusionClassifier, images: ImageDataset) -> None:
    truth = match_labels(classifier.candidates.names, images)
    if truth is None:
        raise DataError("the images to calibrate on have no labels that are classes of this model.")
    shown = images.images(torch.arange(len(images)), model.size).to(model.device)
    classifier.calibrate(shown, truth, seeds=range(len(images)))


def open_candidates(model: ReadableModel, data: ImageDataset, config: ClassifyConfig) -> Candidates:
    """What an image may be: the classes of the model, or, for a model of texts, prompts of the named classes.

    Raises:
        ConfigError: prompts or class names for a model of labels, or a prompt without a place for the name.
        DataError: a model of texts, and neither `class_names` nor classes of the images.
    """
    if model.embed is None:
        if config.prompts != DEFAULT_PROMPTS or config.class_names:
            raise ConfigError(
                "this model was trained on labels: it reads no --prompt, and its classes have their names."
            )
        return Candidates.of_model(model.denoiser, model.class_names)
    broken = [prompt for prompt in config.prompts if prompt.count("{}") != 1]
    if broken or not config.prompts:
        raise ConfigError(
            f"a prompt must hold {{}} once, where the class's name goes, got {broken or 'none'}. Example: 'a drawing of a {{}}'"
        )
    names = config.class_names or tuple(data.class_names or ())
    if not names:
        raise DataError(
            "this model reads texts, so classes need names: give --class-names, or images in a folder for each class."
        )
    pairs = [
        (k, prompt.replace("{}", name.replace("_", " "))) for k, name in enumerate(names) for prompt in config.prompts
    ]
    return Candidates(model.embed([text for _, text in pairs]), torch.tensor([k for k, _ in pairs]), tuple(names))


def build_classifier(
    model: ReadableModel, config: ClassifyConfig, candidates: Candidates | None = None
) -> DiffusionClassifier:
    """The classifier of a model with these settings; among its own classes when no candidates are given.

    Raises:
        ConfigError: the model has no classes, or one only; a setting out of range.
    """
    if not 0 <= config.risk < 1:
        raise ConfigError(f"--risk is a chance in [0, 1), got {config.risk}.")
    return DiffusionClassifier(
        model.denoiser,
        Candidates.of_model(model.denoiser, model.class_names) if candidates is None else candidates,
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
