"""Extractors by one text, for the command line and for configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagoda.errors import ConfigError, did_you_mean
from pagoda.evaluation.cifar_resnet import CIFARResNetFeatures
from pagoda.evaluation.classifier import ClassifierFeatures, SmallClassifier
from pagoda.evaluation.extractors import FeatureExtractor, StackFeatures
from pagoda.evaluation.inception import InceptionFeatures
from pagoda.evaluation.transformers import CLIPFeatures, DINOv2Features
from pagoda.networks import RandomFeatures


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an extractor works and what it may do."""

    channels: int = 3
    """Colour channels of the images."""
    device: torch.device | str = "cpu"
    """Where to compute."""
    allow_download: bool = False
    """Whether weights of the hub may be fetched."""


def _classifier(path: str, place: Place) -> FeatureExtractor:
    return ClassifierFeatures(SmallClassifier.load(path).to(place.device))


def _cifar(model: str) -> Callable[[str, Place], FeatureExtractor]:
    def build(path: str, place: Place) -> FeatureExtractor:
        extractor = CIFARResNetFeatures(path, model=model)
        extractor.network.to(place.device)
        return extractor

    return build


def _random(seed: str, place: Place) -> FeatureExtractor:
    if seed and not seed.isdecimal():
        raise ConfigError(f"`random:{seed}`: the seed must be a whole number.")
    stack = RandomFeatures(place.channels, seed=int(seed or 0))
    torch.nn.Module.to(stack, place.device)
    return StackFeatures(stack, name="random")


EXTRACTORS: dict[str, tuple[str, Callable[[str, Place], FeatureExtractor]]] = {
    "classifier": ("classifier:FOLDER, a classifier that pagoda trained", _classifier),
    "cifar10-resnet20": ("cifar10-resnet20:FOLDER, with its architecture.json", _cifar("resnet20")),
    "cifar10-resnet56": ("cifar10-resnet56:FOLDER, with its architecture.json", _cifar("resnet56")),
    "random": ("random or random:SEED, a fixed random network", _random),
    "inception-2015": (
        "inception-2015 or inception-2015:FILE, FID's own",
        lambda path, place: InceptionFeatures(path or None, device=place.device),
    ),
    "inception-2015-spatial": (
        "inception-2015-spatial, sFID's own",
        lambda path, place: InceptionFeatures(path or None, features="spatial", device=place.device),
    ),
    "dinov2": (
        "dinov2:FOLDER or dinov2:facebook/dinov2-large",
        lambda path, place: DINOv2Features(
            path or "facebook/dinov2-large", allow_download=place.allow_download, device=place.device
        ),
    ),
    "clip": (
        "clip:FOLDER or clip:openai/clip-vit-base-patch32",
        lambda path, place: CLIPFeatures(
            path or "openai/clip-vit-base-patch32", allow_download=place.allow_download, device=place.device
        ),
    ),
}
"""By the first word of the text: how it is written, and what builds it."""

_NEEDS_PATH = ("classifier", "cifar10-resnet20", "cifar10-resnet56")


def open_extractor(text: str, place: Place | None = None) -> FeatureExtractor:
    """The extractor that a text stands for, such as `classifier:judges/photos` or `random`.

    Raises:
        ConfigError: an unknown name, or a folder is missing in the text.
        ArtifactError: weights that are missing, damaged or not the published ones.
        MissingExtraError: a package is missing.
    """
    name, _, path = text.partition(":")
    if name not in EXTRACTORS:
        written = "; ".join(how for how, _ in EXTRACTORS.values())
        raise ConfigError(f"unknown features `{text}`. {did_you_mean(name, EXTRACTORS)} Written: {written}.")
    if name in _NEEDS_PATH and not path:
        raise ConfigError(f"`{text}` needs a folder: {EXTRACTORS[name][0]}.")
    return EXTRACTORS[name][1](path, place or Place())
