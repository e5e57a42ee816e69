"""Frozen encoders whose features a network under training is compared with, by name.

| name | encoder |
|---|---|
| `classifier` | a small classifier that is trained on the run's own labelled images first, for a minute |
| `transformers:FOLDER` | a vision model of transformers (DINOv2, CLIP, ViT, ...) in a local folder |
| `network:FOLDER` | a diffusion model that pagoda trained, such as `runs/photos/teacher`, read at a small noise level |
| `random` | a random convolutional network: a control that should not help |

`ENCODERS` is open: `ENCODERS["mine"] = factory` adds a name.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ArtifactError, ConfigError, ShapeError, did_you_mean
from pagoda.evaluation import SmallClassifier, hash_weights, resize_images, train_classifier
from pagoda.files import hash_json
from pagoda.networks import FeatureStack, RandomFeatures, TeacherFeatures, load_model
from pagoda.networks.outside import IMAGENET
from pagoda.networks.pretrained import open_transformers
from pagoda.networks.teachers import preconditioning_of
from pagoda.training import Setup, derive_seed

CLASSIFIER_STEPS = 300
"""Steps that the encoder `classifier` is trained for, and `CLASSIFIER_IMAGES` the most images it is trained on."""
CLASSIFIER_IMAGES = 20_000


class TargetEncoder(nn.Module, ABC):
    """Clean images -> a map of features. Frozen: in evaluation mode for good, and without gradients."""

    dim: int
    """Width of a feature vector."""

    @abstractmethod
    def forward(self, images: Tensor, side: int) -> Tensor:
        """Features (B, dim, h, w) of images (B, C, H, W) in [-1, 1]; h and w are near `side` where the encoder can choose."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the features."""

    def train(self, mode: bool = True) -> TargetEncoder:
        """Does nothing: a frozen encoder stays in evaluation mode."""
        return super().train(False)


class StackEncoder(TargetEncoder):
    """One map of a `FeatureStack`.

    Args:
        stack: Frozen.
        index: Which of its maps.
    """

    def __init__(self, stack: FeatureStack, index: int = -1) -> None:
        super().__init__()
        self.stack, self.index = stack, index
        self.dim = stack.channels[index]
        freeze(self)

    def forward(self, images: Tensor, side: int) -> Tensor:
        if images.shape[1] != self.stack.in_channels:
            raise ShapeError(f"the encoder takes {self.stack.in_channels} channels, images have {images.shape[1]}.")
        return self.stack(images)[self.index]

    @property
    def fingerprint(self) -> str:
        return hash_json([self.stack.fingerprint, self.index])


class ClassifierEncoder(TargetEncoder):
    """The last map of a `SmallClassifier`."""

    def __init__(self, classifier: SmallClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.dim = classifier.config.widths[-1]
        freeze(self)

    def forward(self, images: Tensor, side: int) -> Tensor:
        return self.classifier.maps(images)

    @property
    def fingerprint(self) -> str:
        return hash_json(["classifier", hash_weights(self.classifier), self.classifier.config.input_size])


class TransformersEncoder(TargetEncoder):
    """Patch tokens of a vision model of transformers. Images are resized so that it makes `side` x `side` patches.

    Args:
        model: A vision model with `config.patch_size` that returns `last_hidden_state`.
        statistics: `image_mean` and `image_std` of images in [0, 1]; ImageNet's when absent.

    Raises:
        ConfigError: a model without patches.
    """

    def __init__(self, model: Any, statistics: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model: Any = getattr(model, "vision_model", model)
        config = getattr(model.config, "vision_config", model.config)
        if not isinstance(getattr(config, "patch_size", None), int):
            raise ConfigError(f"`{type(model).__name__}` has no patches; an encoder needs a vision transformer.")
        self.patch, self.dim = int(config.patch_size), int(config.hidden_size)
        statistics = {**IMAGENET, **(statistics or {})}
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(statistics[f"image_{name}"]).reshape(1, -1, 1, 1))
        self._fingerprint = ""
        freeze(self)

    def forward(self, images: Tensor, side: int) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        if images.shape[1] != 3:
            raise ShapeError(f"the encoder takes grey or RGB images, got {images.shape[1]} channels.")
        pixels = (resize_images(images, side * self.patch) + 1) / 2
        hidden = self.model((pixels - self.mean) / self.std, interpolate_pos_encoding=True).last_hidden_state
        patches = hidden[:, -side * side :]  # the class token and registers come first
        return patches.transpose(1, 2).unflatten(2, (side, side))

    @property
    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = hash_json(["transformers", hash_weights(self), self.patch])
        return self._fingerprint


def freeze(encoder: nn.Module) -> None:
    """Stop gradients to the parameters, and leave training mode."""
    encoder.requires_grad_(False)
    encoder.eval()


def check_frozen(encoder: nn.Module) -> None:
    """Refuse an encoder that would be trained, or that behaves as in training.

    Raises:
        ConfigError: it is in training mode, or a parameter wants a gradient.
    """
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained or any(module.training for module in encoder.modules()):
        reason = f"parameters such as `{trained[0]}` want gradients" if trained else "it is in training mode"
        raise ConfigError(f"an encoder of targets must be frozen, but {reason}. Call `freeze(encoder)` first.")


def _classifier(argument: str, setup: Setup, side: int) -> TargetEncoder:
    if argument:
        return ClassifierEncoder(SmallClassifier.load(argument))
    if setup.num_classes < 2:
        raise ConfigError(
            "the encoder `classifier` is trained on the run's own labels, and this run has fewer than two classes. "
            "Choose another encoder, such as `transformers:FOLDER`."
        )
    folder = None if setup.folder is None else setup.folder / "classifier"
    if folder is not None and (folder / "config.json").is_file():
        return ClassifierEncoder(SmallClassifier.load(folder))
    indices = torch.linspace(0, setup.count - 1, min(setup.count, CLASSIFIER_IMAGES)).long()
    parts = [setup.load(rows, torch.zeros(len(rows), dtype=torch.bool)) for rows in indices.split(1024)]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1].label for p in parts if p[1].label is not None])
    classifier = train_classifier(
        images,
        labels,
        num_classes=setup.num_classes,
        # Its last map has a quarter of this side up to 16 px, an eighth above: 4 x 4 vectors up to 32 px.
        input_size=min(64, max(16, 8 * round(setup.image_size / 8))),
        steps=CLASSIFIER_STEPS,
        seed=derive_seed(setup.seed, "encoder") % 2**32,
        device=setup.runtime.device,
    )
    setup.runtime.barrier()  # nobody reads what is still being written
    if folder is not None and setup.runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        classifier.save(folder)
    setup.runtime.barrier()
    return ClassifierEncoder(classifier)


def _transformers(argument: str, setup: Setup, side: int) -> TargetEncoder:
    model, statistics = open_transformers(argument)
    return TransformersEncoder(model, statistics)


def _network(argument: str, setup: Setup, side: int) -> TargetEncoder:
    path = Path(argument) / "denoiser.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{argument} holds no diffusion model of pagoda ({error}); name a run's `teacher`."
        ) from error
    return StackEncoder(TeacherFeatures(load_model(argument), **preconditioning_of(facts, argument)))


def _random(argument: str, setup: Setup, side: int) -> TargetEncoder:
    return StackEncoder(RandomFeatures(setup.channels, seed=int(argument or 0)))


ENCODERS: dict[str, Callable[[str, Setup, int], TargetEncoder]] = {
    "classifier": _classifier,
    "transformers": _transformers,
    "network": _network,
    "random": _random,
}
"""Factories by name: (what follows the colon, the run, the side of the grid that is wanted) -> encoder."""


def check_encoder_name(spec: str) -> None:
    """Refuse a name that no factory knows.

    Raises:
        ConfigError: naming those that are known.
    """
    name = spec.partition(":")[0]
    if name not in ENCODERS:
        raise ConfigError(f"unknown encoder `{name}`. {did_you_mean(name, ENCODERS)}")


def open_encoder(spec: str, setup: Setup, side: int) -> TargetEncoder:
    """An encoder by its name, frozen.

    Args:
        spec: `NAME` or `NAME:ARGUMENT` (see the module).
        setup: The run that it is for.
        side: Vectors per side that its map should have.

    Raises:
        ConfigError: an unknown name, or an encoder that is not frozen.
        ArtifactError: the folder holds no such model.
        MissingExtraError: transformers is not installed.
    """
    check_encoder_name(spec)
    name, _, argument = spec.partition(":")
    encoder = ENCODERS[name](argument, setup, side).to(setup.runtime.device)
    check_frozen(encoder)
    return encoder


def match_grid(features: Tensor, side: int) -> Tensor:
    """A map (B, d, h, w) with `side` x `side` vectors: means of areas when it shrinks, bilinear when it grows; itself at equal size."""
    if features.shape[-2:] == (side, side):
        return features
    if features.shape[-1] >= side and features.shape[-2] >= side:
        return F.interpolate(features, size=(side, side), mode="area")
    return F.interpolate(features, size=(side, side), mode="bilinear", align_corners=False)
