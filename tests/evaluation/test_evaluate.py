"""Scores: the right images go to the right side, floors are at equal counts, and planted faults show."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

import pagoda.errors
import pagoda.evaluation
from pagoda.errors import DataError, ShapeError
from pagoda.evaluation import (
    METRICS,
    FeatureMoments,
    Score,
    ScoreOptions,
    extract_features,
    image_batches,
    metric_name,
    score_images,
    split_real,
)


class Pooled:
    """A transparent extractor: mean colour of each quarter of the image, (B, 4 C)."""

    name, dim, input_size, resize, fingerprint = "pooled", 12, 2, "mean", "0" * 16

    def __call__(self, images: Tensor) -> Tensor:
        pagoda.evaluation.check_images(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


def real(count: int = 400) -> tuple[Tensor, Tensor]:
    """Two classes, dark and light, uint8."""
    labels = torch.arange(count) % 2
    noise = 20 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (noise + 64 + 128 * labels.reshape(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8), labels


def fake(count: int = 200, seed: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    noise = 20 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (noise + 64 + 128 * labels.reshape(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8), labels


def score(images: Tensor, **options: int) -> Score:
    (found,) = score_images(Pooled(), *real(), images, **options)
    return found


def test_every_public_name_is_exported() -> None:
    assert all(hasattr(pagoda.evaluation, name) for name in pagoda.evaluation.__all__)


def test_features_do_not_depend_on_the_batch_size_and_progress_counts_images() -> None:
    images, seen = real()[0], []
    whole = extract_features(Pooled(), image_batches(images, 400))
    pieces = extract_features(Pooled(), image_batches(images, 150), progress=seen.append)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert seen == [150, 300, 400]


def test_eight_bit_images_and_their_floats_have_equal_features() -> None:
    images = real()[0]
    floats = images.float() / 127.5 - 1
    assert torch.equal(
        extract_features(Pooled(), image_batches(images)), extract_features(Pooled(), image_batches(floats))
    )


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        extract_features(Pooled(), [])


@pytest.mark.parametrize("per_class", [None, 20])
def test_halves_are_disjoint_and_alike_in_classes(per_class: int | None) -> None:
    labels = torch.tensor([0] * 101 + [1] * 50)
    first, second = split_real(labels, seed=0, per_class=per_class)
    assert not set(first.tolist()) & set(second.tolist())
    expected = [50, 25] if per_class is None else [20, 20]
    assert torch.bincount(labels[first]).tolist() == expected
    assert torch.bincount(labels[second]).tolist() == expected
    assert torch.equal(first, split_real(labels, seed=0, per_class=per_class)[0])
    assert not torch.equal(first, split_real(labels, seed=1, per_class=per_class)[0])


def test_splits_that_the_data_cannot_give_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be split"):
        split_real(torch.tensor([0, 1, 2]), seed=0)
    with pytest.raises(DataError, match=r"\{1: 5\}"):
        split_real(torch.tensor([0] * 10 + [1] * 5), seed=0, per_class=3)


def test_same_call_gives_the_same_report_to_the_last_digit() -> None:
    assert score(fake()[0]) == score(fake()[0])
    assert score(fake()[0], seed=1).value != score(fake()[0]).value


def test_report_is_the_distance_of_the_split_that_it_names() -> None:
    images, labels = real()
    report = score(fake()[0])
    first, second = split_real(labels, seed=0)
    moments = [
        FeatureMoments.from_features(extract_features(Pooled(), image_batches(x)))
        for x in (images[first], images[second], fake()[0])
    ]
    reference, other, generated = moments
    assert report.floor == pytest.approx(pagoda.evaluation.frechet_distance(reference, other), rel=1e-6)
    assert report.value == pytest.approx(pagoda.evaluation.frechet_distance(reference, generated), rel=1e-6)
    assert report.reference_fingerprint == reference.fingerprint()
    assert (report.count_real, report.count_fake, report.image_size) == (200, 200, 8)


def test_fewer_generated_images_lower_the_counts_of_both_distances() -> None:
    report = score(fake(80)[0])
    assert (report.count_real, report.count_fake) == (200, 80)
    assert score(fake(500)[0]).count_fake == 200


def test_good_images_score_like_the_floor() -> None:
    report = score(fake()[0])
    assert report.value < 3 * report.floor


@pytest.mark.parametrize("fault", ["a class is missing", "low contrast", "brighter", "blocks of noise"])
def test_planted_faults_score_far_above_the_floor(fault: str) -> None:
    images, labels = fake(400)
    floats = images.float() / 127.5 - 1
    if fault == "a class is missing":
        floats = floats[labels == 0]
    elif fault == "low contrast":
        floats = floats * 0.7
    elif fault == "brighter":
        floats = (floats + 0.2).clamp(-1, 1)
    else:
        floats = (floats + 0.5 * torch.randn(400, 3, 1, 1, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    report = score(floats)
    assert report.value > 10 * report.floor


def test_few_samples_for_the_features_are_noted() -> None:
    assert score(fake()[0]).notes == ()
    (note,) = score(fake(10)[0]).notes
    assert "200 real and 10 generated images are few for 12 features" in note


def test_report_is_json_with_all_of_its_provenance() -> None:
    report = score(fake()[0])
    record = json.loads(report.to_json())
    assert record.keys() == {field.name for field in dataclasses.fields(report)}
    assert record["metric"] == "FD[pooled]"
    assert record["value"] == report.value


def test_scores_of_other_counts_or_references_do_not_compare() -> None:
    report = score(fake()[0])
    assert report.comparable_with(score(fake(seed=6)[0]))
    assert not report.comparable_with(score(fake(80)[0]))
    assert not report.comparable_with(score(fake()[0], seed=1))


def test_images_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\), generated ones \(3, 4, 4\)"):
        score(fake()[0][..., :4, :4])
    with pytest.raises(DataError, match="NaN"):
        score(torch.full((50, 3, 8, 8), float("nan")))
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        score(fake()[0].float())
    with pytest.raises(ShapeError, match="as many labels"):
        score_images(Pooled(), real()[0], real()[1][:-1], fake()[0])


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 4)])
def test_layouts_other_than_square_batches_are_refused(images: Tensor) -> None:
    with pytest.raises(ShapeError, match="B, 1 or 3, S, S"):
        pagoda.evaluation.check_images(images)


def test_integers_are_refused_by_extractors() -> None:
    with pytest.raises(DataError, match="uint8"):
        pagoda.evaluation.check_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


EVERY = [name for name, metric in METRICS.items() if not metric.needs_logits]


@pytest.mark.parametrize("metric", EVERY)
def test_every_metric_has_floor_interval_and_provenance(metric: str) -> None:
    (found,) = score_images(Pooled(), *real(), fake()[0], metrics=[metric], options=ScoreOptions(resamples=10))
    assert found.metric == f"{METRICS[metric].symbol}[pooled]"
    assert found.floor is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert (found.extractor, found.resize, found.image_size) == ("pooled", "mean", 8)
    assert Score.from_dict(json.loads(found.to_json())) == dataclasses.replace(found, settings=dict(found.settings))


@pytest.mark.parametrize("metric", EVERY)
def test_the_same_evaluation_twice_agrees_to_the_last_digit(metric: str) -> None:
    first, second = (
        score_images(Pooled(), *real(), fake()[0], metrics=[metric], options=ScoreOptions(resamples=5))
        for _ in range(2)
    )
    assert first == second


def test_no_interval_is_estimated_where_none_is_wanted() -> None:
    scores = score_images(Pooled(), *real(), fake()[0], metrics=EVERY, options=ScoreOptions(resamples=0))
    assert all(found.low is None and found.high is None for found in scores)


def test_published_names_belong_to_the_features_that_they_were_published_with() -> None:
    assert metric_name("fd", "inception-2015") == "FID"
    assert metric_name("kd", "inception-2015") == "KID"
    assert metric_name("fd", "inception-2015-spatial") == "sFID"
    assert metric_name("fd", "classifier") == "FD[classifier]"
    assert metric_name("is", "cifar10-resnet20") == "IS[cifar10-resnet20]"


def test_unknown_metrics_and_those_without_logits_are_refused() -> None:
    with pytest.raises(pagoda.errors.ConfigError, match=r"unknown metric 'fdi'. Did you mean"):
        score_images(Pooled(), *real(), fake()[0], metrics=["fdi"])
    with pytest.raises(pagoda.errors.ConfigError, match="`is` needs features of a classifier"):
        score_images(Pooled(), *real(), fake()[0], metrics=["is"])
