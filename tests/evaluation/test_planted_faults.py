"""Planted faults move exactly the metrics that should move, in the features of a trained judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.data import Downsampler, ShapesSource, prepare_images
from pagoda.evaluation import ClassifierFeatures, Score, ScoreOptions, score_features, train_classifier
from pagoda.evaluation.collect import Features, collect_features

METRICS = ["fd", "kd", "precision", "recall", "density", "coverage", "is", "memorised"]
COUNT = 400


@pytest.fixture(scope="module")
def judge() -> ClassifierFeatures:
    images, labels = shapes(COUNT, 100)
    return ClassifierFeatures(train_classifier(images, labels, num_classes=10, steps=120, input_size=16))


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    data = prepare_images(
        ShapesSource(count=count, seed=seed), sizes=[16], downsampler=Downsampler(), cache_dir=None, progress=False
    )
    rows = torch.arange(count)
    labels = data.labels(rows)
    assert labels is not None
    return data.images(rows, 16), labels


def scores(judge: ClassifierFeatures, fake: Tensor) -> dict[str, Score]:
    def features(images: Tensor) -> Features:
        return collect_features(judge, lambda rows: images[rows], len(images))

    reference, stand_in = shapes(COUNT, 0)[0], shapes(COUNT, 1)[0]
    found = score_features(
        METRICS,
        judge,
        features(reference),
        features(fake),
        features(stand_in),
        image_size=16,
        options=ScoreOptions(resamples=0),
    )
    return dict(zip(METRICS, found, strict=True))


@pytest.fixture(scope="module")
def good(judge: ClassifierFeatures) -> dict[str, Score]:
    return scores(judge, shapes(COUNT, 2)[0])


def test_fresh_real_images_score_like_the_floor_in_everything(good: dict[str, Score]) -> None:
    for name, score in good.items():
        assert score.floor is not None
        if name in ("fd", "kd"):
            assert score.value < 3 * abs(score.floor) + 0.02
        else:
            assert score.value == pytest.approx(score.floor, rel=0.2, abs=0.05), name


def test_a_dropped_class_lowers_recall_and_coverage_and_leaves_precision(
    judge: ClassifierFeatures, good: dict[str, Score]
) -> None:
    images, labels = shapes(2 * COUNT, 2)
    found = scores(judge, images[labels < 5][:COUNT])
    assert found["fd"].value > 5 * good["fd"].value
    assert found["coverage"].value < 0.75 * good["coverage"].value
    assert found["recall"].value < 0.85 * good["recall"].value
    assert found["is"].value < 0.8 * good["is"].value
    assert found["precision"].value == pytest.approx(good["precision"].value, abs=0.06)
    assert found["memorised"].value < 0.04


@pytest.mark.parametrize("fault", ["blur", "noise"])
def test_degraded_images_lower_precision_and_every_distance_grows_with_the_fault(
    judge: ClassifierFeatures, good: dict[str, Score], fault: str
) -> None:
    images = shapes(COUNT, 2)[0]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def degrade(level: int) -> Tensor:
        if fault == "noise":
            return (images + 0.25 * level * noise).clamp(-1, 1)
        side = {0: 16, 1: 8, 2: 4}[level]
        return F.interpolate(F.interpolate(images, size=(side, side), mode="area"), size=(16, 16), mode="bilinear")

    found = [good, *(scores(judge, degrade(level).clamp(-1, 1)) for level in (1, 2))]
    for metric in ("fd", "kd"):
        values = [f[metric].value for f in found]
        assert values == sorted(values), metric
    assert found[2]["fd"].value > 5 * good["fd"].value
    assert found[2]["precision"].value < 0.9 * good["precision"].value
    assert found[2]["density"].value < 0.8 * good["density"].value
    assert found[2]["memorised"].value < 0.05


def test_copies_of_the_reference_are_seen_by_nothing_but_the_search_for_copies(
    judge: ClassifierFeatures, good: dict[str, Score]
) -> None:
    copies = shapes(COUNT, 0)[0]
    found = scores(judge, copies)
    assert found["memorised"].value == 1
    assert found["precision"].value == 1  # looks perfect
    assert found["fd"].value < good["fd"].value
