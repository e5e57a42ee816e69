"""From features to scores that carry their provenance: halves of the real data, metrics, floors and intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.evaluation.collect import Features, collect_features
from pagoda.evaluation.extractors import FeatureExtractor
from pagoda.evaluation.frechet import FeatureMoments, class_balanced
from pagoda.evaluation.intervals import interval
from pagoda.evaluation.measures import METRICS, ScoreOptions, Sides, metric_name, notes_of
from pagoda.evaluation.scores import Score


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


def score_features(
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    reference: Features,
    fake: Features,
    stand_in: Features,
    *,
    image_size: int,
    seed: int = 0,
    options: ScoreOptions | None = None,
    made_by: Mapping[str, Any] | None = None,
    training: Features | None = None,
    held_out: bool = True,
    statistics: FeatureMoments | None = None,
) -> list[Score]:
    """Scores of generated images from the features of three sets.

    Args:
        metrics: Names of `METRICS`.
        extractor: What made the features; only its facts are read.
        reference: Real images that both others are compared with.
        fake: Generated images.
        stand_in: Other real images; the first `len(fake)` of them make the floor. At least as many as the generated ones.
        image_size: Side of the images in pixels.
        seed: For the record, and for the resampling.
        options: Settings of the metrics.
        made_by: What made the generated images, for the record.
        training: Images that the model was trained on, for `memorised`; the reference where None.
        held_out: Whether the stand-ins are none of these.
        statistics: Moments of the reference (`load_stats`) in place of `reference`, which is then not read.

    Raises:
        ConfigError: an unknown metric, one that needs a classifier, or one that needs more than moments of the reference.
        DataError: too few images, or fewer stand-ins than generated ones.
    """
    if len(stand_in) < len(fake):
        raise DataError(
            f"{len(stand_in)} real images cannot stand in for {len(fake)} generated ones: the floor must be at the same count. "
            f"Score {len(stand_in)} generated images, or give more real ones."
        )
    others = stand_in[torch.arange(len(fake))]
    sides = Sides(extractor, reference, fake, others, options or ScoreOptions(), seed, training, held_out, statistics)
    names = [metric_name(metric, extractor.name) for metric in metrics]
    for metric in metrics:
        if METRICS[metric].needs_logits and fake.logits is None:
            raise ConfigError(f"`{metric}` needs features of a classifier; `{extractor.name}` gives no logits.")
        if statistics is not None and not METRICS[metric].of_moments:
            raise ConfigError(
                f"`{metric}` compares with single images, and the reference is a file of statistics; with that only "
                f"{', '.join(m for m in METRICS if METRICS[m].of_moments)} can be measured."
            )
    moments = sides.reference_moments
    scores = []
    for metric, name in zip(metrics, names, strict=True):
        found = METRICS[metric].measure(sides)
        low, high = (None, None) if found.error is None else interval(found.value, found.error)
        scores.append(
            Score(
                metric=name,
                value=found.value,
                floor=found.floor,
                low=low,
                high=high,
                better=METRICS[metric].better,
                count_real=moments.count,
                count_fake=len(fake),
                extractor=extractor.name,
                extractor_fingerprint=extractor.fingerprint,
                resize=extractor.resize,
                reference_fingerprint=moments.fingerprint(),
                image_size=image_size,
                seed=seed,
                settings=found.settings,
                made_by=made_by or {},
                notes=notes_of(metric, sides),
            )
        )
    return scores


def score_images(
    extractor: FeatureExtractor,
    real: Tensor,
    real_labels: Tensor,
    fake: Tensor,
    *,
    metrics: Sequence[str] = ("fd",),
    seed: int = 0,
    per_class: int | None = None,
    options: ScoreOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores of generated images, with their real-versus-real floors at the same counts.

    The real images are split into a reference and a stand-in of equal size. Score and floor both go to the same
    reference, from the same number of images: that of the stand-in, or of the generated images when they are fewer. Ideally
    generate as many images as `split_real` gives, with the same number of each class.

    Args:
        real: Real images (N, C, S, S), uint8 or floats in [-1, 1].
        real_labels: (N,) integers from 0; all 0 for data without classes.
        fake: Generated images of the same shape, uint8 or floats in [-1, 1].
        metrics: Names of `METRICS`.
        seed: Decides the split, and which images are taken from the larger side.
        per_class: Real images per class in each half; see `split_real`.
        options: Settings of the metrics.
        progress: Called with the number of images done.

    Raises:
        ShapeError: real and generated images have different sizes or channels, or labels another number.
        DataError: too few images, or images that the extractor refuses.
        ConfigError: an unknown metric.
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

    def features(images: Tensor) -> Features:
        nonlocal done
        start = done
        report = None if progress is None else (lambda n: progress(start + n))
        done += len(images)
        return collect_features(extractor, lambda rows: as_floats(images[rows]), len(images), progress=report)

    reference, made, other = (features(x) for x in (real[reference_rows], fake[fake_rows], real[other_rows]))
    size = real.shape[-1]
    return score_features(metrics, extractor, reference, made, other, image_size=size, seed=seed, options=options)


def as_floats(images: Tensor) -> Tensor:
    """Images in [-1, 1]; 8-bit ones are converted."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
