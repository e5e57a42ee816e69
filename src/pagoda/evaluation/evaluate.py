"""From images to a score that carries its provenance: features, halves of the real data, distance and floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation.extractors import FeatureExtractor
from pagoda.evaluation.frechet import FeatureMoments, class_balanced, frechet_bias, frechet_distance


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """One score and everything that decides whether it may stand beside another one."""

    metric: str
    """What was measured, with the extractor in its name: "FD[classifier]"."""
    value: float
    """The score of the generated images."""
    floor: float
    """The same metric between two disjoint sets of real images, at the same counts."""
    count_real: int
    """Number of real images in the reference."""
    count_fake: int
    """Number of generated images, and of the real ones that stand in for them in the floor."""
    extractor: str
    """Name of the feature extractor."""
    extractor_fingerprint: str
    """Hash of its weights and settings."""
    reference_fingerprint: str
    """Hash of the moments of the reference."""
    image_size: int
    """Height and width of the images that were compared, in pixels."""
    seed: int
    """Decides how the real images were split and which generated ones were taken."""
    notes: tuple[str, ...] = ()
    """What a reader should know before trusting the value."""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def comparable_with(self, other: ScoreReport) -> bool:
        """Whether the two values may stand in one table: same metric, features, reference, size and counts."""
        names = (
            "metric",
            "count_real",
            "count_fake",
            "extractor",
            "extractor_fingerprint",
            "reference_fingerprint",
            "image_size",
        )
        return all(getattr(self, name) == getattr(other, name) for name in names)


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
    features: list[Tensor] = []
    done = 0
    for batch in batches:
        features.append(extractor(batch).float().cpu())
        done += len(batch)
        if progress is not None:
            progress(done)
    if done == 0:
        raise DataError("there are no images to take features of.")
    return torch.cat(features)


def split_real(labels: Tensor, *, seed: int, per_class: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint sets of real images with the same number of each class: a reference and a stand-in.

    Args:
        labels: (N,) integers from 0; all 0 for data without classes.
        seed: Decides the split.
        per_class: Images per class in each set (class-balanced); half of each class, in the data's own proportions, when
            None.

    Raises:
        DataError: a class has fewer than `2 * per_class` images, or all classes have one.
    """
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    if per_class is not None:
        both = class_balanced(labels, num_classes=num_classes, per_class=2 * per_class, generator=generator)
        pairs = both.reshape(num_classes, 2, per_class)
        return pairs[:, 0].flatten(), pairs[:, 1].flatten()
    first, second = [], []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        half = len(members) // 2
        first.append(members[:half])
        second.append(members[half : 2 * half])
    if sum(map(len, first)) < 2:
        raise DataError(f"{len(labels)} real images cannot be split into two sets of at least 2; give more.")
    return torch.cat(first), torch.cat(second)


def score_frechet(
    extractor: FeatureExtractor,
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    *,
    seed: int = 0,
    per_class: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ScoreReport:
    """Fréchet distance of generated images to real ones, with its real-versus-real floor at the same counts.

    The real images are split into a reference and a stand-in of equal size. The distance and the floor both go to the same
    reference, from the same number of images: that of the stand-in, or of the generated images when they are fewer. Ideally
    generate as many images as `split_real` gives, with the same number of each class.

    Args:
        real: Real images (N, C, S, S), uint8 or floats in [-1, 1].
        real_labels: (N,) integers from 0; all 0 for data without classes.
        fake: Generated images of the same shape, uint8 or floats in [-1, 1].
        seed: Decides the split, and which images are taken from the larger side.
        per_class: Real images per class in each half; see `split_real`.
        progress: Called with the number of images done.

    Raises:
        ShapeError: real and generated images have different sizes or channels, or labels another number.
        DataError: too few images, or images that the extractor refuses.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise ShapeError(
            f"real images are {tuple(real.shape[1:])}, generated ones {tuple(fake.shape[1:])}: bring both to one size "
            "with one kernel first, or the score measures the kernel."
        )
    if len(real) != len(real_labels):
        raise ShapeError(f"{len(real)} real images need as many labels, got {len(real_labels)}.")
    reference_rows, other_rows = split_real(real_labels, seed=seed, per_class=per_class)
    count = min(len(other_rows), len(fake))
    generator = torch.Generator().manual_seed(seed + 1)
    other_rows = other_rows[torch.randperm(len(other_rows), generator=generator)[:count]]
    fake_rows = torch.randperm(len(fake), generator=generator)[:count]

    done = 0

    def moments(images: Tensor) -> FeatureMoments:
        nonlocal done
        start = done
        report = None if progress is None else (lambda n: progress(start + n))
        features = extract_features(extractor, image_batches(images), progress=report)
        done += len(images)
        return FeatureMoments.from_features(features)

    reference = moments(real[reference_rows])
    value = frechet_distance(reference, moments(fake[fake_rows]))
    floor = frechet_distance(reference, moments(real[other_rows]))
    notes = []
    if count <= extractor.dim or reference.count <= extractor.dim:
        notes.append(
            f"{reference.count} real and {count} generated images are few for {extractor.dim} features: the distance is "
            f"biased upwards by about {frechet_bias(extractor.dim, count):.2g} feature variances; read it beside the floor."
        )
    return ScoreReport(
        metric=f"FD[{extractor.name}]",
        value=value,
        floor=floor,
        count_real=reference.count,
        count_fake=count,
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        reference_fingerprint=reference.fingerprint(),
        image_size=real.shape[-1],
        seed=seed,
        notes=tuple(notes),
    )
