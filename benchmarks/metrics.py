"""Figures about images that several benchmarks report."""

from __future__ import annotations

from torch import Tensor

from pagoda.evaluation import FeatureExtractor, contrast, score_frechet, sharpness


def score_images(
    extractor: FeatureExtractor,
    real_images: Tensor,
    real_labels: Tensor,
    fake_images: Tensor,
    floor_split_seed: int,
    *,
    per_class: int | None = None,
) -> dict[str, float]:
    """Fréchet distance with its floor, and how contrast and sharpness of generated images compare with real ones.

    Args:
        extractor: Independent of every generator that is compared.
        real_images: (N, C, S, S), uint8 or floats in [-1, 1]; half of them is the reference, half makes the floor.
        real_labels: (N,) integers from 0; all 0 for data without classes.
        fake_images: Like `real_images`; N / 2 of them, with the labels of half of the data, make the most of it.
        floor_split_seed: Decides the halves.
        per_class: Real images of each class in each half; half of each class when None.

    Returns:
        `distance`, `floor` (real against real, at the same counts), `contrast_ratio` (mean within-image standard deviation,
        generated / real) and `sharpness_ratio` (mean absolute Laplacian, generated / real).

    Raises:
        ShapeError, DataError: as `pagoda.evaluation.score_frechet`.
    """
    report = score_frechet(
        extractor, real_images, real_labels, fake_images, seed=floor_split_seed, per_class=per_class
    )
    real, fake = _as_float(real_images), _as_float(fake_images)
    return {
        "distance": report.value,
        "floor": report.floor,
        "contrast_ratio": contrast(fake).per_image / contrast(real).per_image,
        "sharpness_ratio": sharpness(fake) / sharpness(real),
    }


def _as_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.double() / 127.5 - 1
