"""A small classifier trained on the user's own labelled images, whose features measure generated ones.

It is trained on real data only and takes no part in training any generator, so that its features are an independent judge. A
distance in these features is never called FID: it compares only with distances in the features of the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.evaluation.extractors import RESIZE, check_images, hash_weights, resize_images
from pagoda.evaluation.frechet import count_labels
from pagoda.files import hash_json, load_tensors, save_tensors, write_text_atomic

_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Architecture of a `SmallClassifier`."""

    num_classes: int
    """Number of classes."""
    input_size: int = 32
    """Height and width that images are resized to, in pixels, 8 to 64; a multiple of 8."""
    channels: int = 3
    """Colour channels of the images: 3, or 1 for grey."""
    widths: tuple[int, ...] = (24, 48, 96)
    """Channels of each stage, multiples of 8; each stage after the first halves the image. The last is the feature width."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ConfigError(f"a classifier needs at least 2 classes, got {self.num_classes}.")
        if self.input_size % 8 or not 8 <= self.input_size <= 64:
            raise ConfigError(f"input_size must be a multiple of 8 from 8 to 64, got {self.input_size}.")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels must be 1 or 3, got {self.channels}.")
        if not self.widths or any(width < 1 or width % _GROUPS for width in self.widths):
            raise ConfigError(f"widths must be multiples of {_GROUPS}, got {self.widths}.")


class _ResBlock(nn.Module):
    """x -> shortcut(x) + conv(act(norm(conv(act(norm(x)))))), halved by the first convolution when `stride` is 2."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1)
        self.norm2 = nn.GroupNorm(_GROUPS, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        x = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return self.shortcut(x) + h


class SmallClassifier(nn.Module):
    """A residual network of about 170,000 parameters. `accuracy` is the share of held-out images that it gets right."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.accuracy: float | None = None
        widths = config.widths
        # Larger inputs are halved by the stem, for a quarter of the cost; its overlapping windows still see every pixel.
        halved = config.input_size > 16
        self.stem = nn.Conv2d(config.channels, widths[0], 4 if halved else 3, 2 if halved else 1, 1)
        self.stages = nn.ModuleList(
            _ResBlock(widths[max(i - 1, 0)], width, 1 if i == 0 else 2) for i, width in enumerate(widths)
        )
        self.norm = nn.GroupNorm(_GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, widths[-1]) of images (B, C, H, W) in [-1, 1] of any square size; raises like `maps`."""
        return self.maps(images).mean((2, 3))

    def maps(self, images: Tensor) -> Tensor:
        """Features before pooling (B, widths[-1], h, w) of images (B, C, H, W) in [-1, 1] of any square size.

        Raises:
            ShapeError: another number of channels than the classifier was trained on.
        """
        if images.shape[1] != self.config.channels:
            raise ShapeError(
                f"this classifier was trained on images of {self.config.channels} channel(s), got {images.shape[1]}."
            )
        h = self.stem(resize_images(images, self.config.input_size))
        for stage in self.stages:
            h = stage(h)
        return F.silu(self.norm(h))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(images))

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        folder = Path(folder)
        record = {"config": asdict(self.config), "accuracy": self.accuracy, "weights": hash_weights(self)}
        save_tensors(folder / "model.safetensors", self.state_dict(), {"weights": hash_weights(self)})
        write_text_atomic(folder / "config.json", json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> SmallClassifier:
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged, or weights and configuration do not belong together.
        """
        folder = Path(folder)
        tensors, _ = load_tensors(folder / "model.safetensors")
        path = folder / "config.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            config = record["config"]
            classifier = cls(ClassifierConfig(**{**config, "widths": tuple(config["widths"])}))
            classifier.load_state_dict(tensors)
            accuracy, expected = record["accuracy"], record["weights"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ArtifactError(
                f"`{path}` and its weights are not a complete SmallClassifier ({error}). Train it again."
            ) from error
        if hash_weights(classifier) != expected:
            raise ArtifactError(
                f"the weights in `{folder}` have hash {hash_weights(classifier)}, its config.json says {expected}: "
                "the two files are from different trainings. Train it again."
            )
        classifier.accuracy = accuracy
        return classifier.eval()


class ClassifierFeatures:
    """The pooled features of a `SmallClassifier` as a `FeatureExtractor`; the classifier is put in evaluation mode."""

    def __init__(self, classifier: SmallClassifier) -> None:
        self.classifier = classifier.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return "classifier"

    @property
    def dim(self) -> int:
        return self.classifier.config.widths[-1]

    @property
    def input_size(self) -> int:
        return self.classifier.config.input_size

    @property
    def resize(self) -> str:
        return RESIZE

    @property
    def fingerprint(self) -> str:
        return hash_json([asdict(self.classifier.config), hash_weights(self.classifier)])

    def __call__(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and logits (B, num_classes)."""
        check_images(images)
        features = self.classifier.features(images.to(self.classifier.head.weight.device, torch.float32))
        return features, self.classifier.head(features)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    input_size: int | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    held_out: float = 0.1,
    augment: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> SmallClassifier:
    """A classifier of real images; the same arguments give the same weights on one machine.

    Args:
        images: (N, C, S, S), uint8 or floats in [-1, 1]; real ones only.
        labels: (N,) integers in 0..num_classes-1.
        input_size: Size that the classifier works at; the images' own, at most 64, when None.
        steps: Optimiser steps, AdamW with a warm-up and a cosine decay to 0.
        held_out: Share of the images that is kept for measuring accuracy, in (0, 1).
        augment: Shift training images by up to an eighth of their size, edges repeated. Nothing else: features that had
            learned to ignore flips, colour, contrast or noise could not see a generator get them wrong.
        seed: Decides the weights at the start, the held-out images, the batches and the shifts.
        device: Where to train; every draw is made on the CPU, so that it is the same everywhere.
        progress: Called with (step, loss) after every step.

    Returns:
        The classifier in evaluation mode, with `accuracy` on the held-out images.

    Raises:
        DataError: labels out of range, of another number than the images, a held-out share that leaves nothing.
    """
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images need as many labels, got {len(labels)}.")
    count_labels(labels, num_classes)
    pixels = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    check_images(pixels)
    num_held_out = round(len(images) * held_out)
    if not 0 < num_held_out < len(images):
        raise DataError(f"holding out {held_out:g} of {len(images)} images leaves nothing on one side.")
    if steps < 1 or batch_size < 1:
        raise ConfigError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}.")
    size = min(images.shape[-1], 64) if input_size is None else input_size
    config = ClassifierConfig(num_classes=num_classes, input_size=size, channels=images.shape[1])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        classifier = SmallClassifier(config).to(device)

    pixels = resize_images(pixels, size)
    order = torch.randperm(len(images), generator=generator)
    held, kept = order[:num_held_out], order[num_held_out:]
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.02)
    classifier.train()
    for step in range(steps):
        rate = learning_rate * min(1.0, (step + 1) / (0.05 * steps + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = kept[torch.randint(len(kept), (batch_size,), generator=generator)]
        batch = _shift(pixels[rows], size // 8, generator) if augment else pixels[rows]
        loss = F.cross_entropy(classifier(batch.to(device)), labels[rows].long().to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    classifier.eval()
    classifier.accuracy = _accuracy(classifier, pixels[held], labels[held])
    return classifier


def _shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels in both axes, with its edges repeated."""
    size = images.shape[-1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator)
    span = torch.arange(size)
    rows = (top[:, None] + span)[:, None, :, None]
    columns = (left[:, None] + span)[:, None, None, :]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(len(images))[:, None, None, None], channel, rows, columns]


@torch.no_grad()
def _accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    device = classifier.head.weight.device
    guesses = torch.cat([classifier(batch.to(device)).argmax(1).cpu() for batch in images.split(256)])
    return float((guesses == labels).double().mean())
