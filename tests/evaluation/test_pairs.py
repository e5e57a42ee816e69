"""Scores of pairs: known errors, intervals of means, texts of images, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.tiny_clip import save_tiny_clip
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.evaluation import (
    CLIPFeatures,
    Features,
    Score,
    clip_scores,
    extract_features,
    mean_error,
    pair_measure,
    psnr,
    psnr_values,
    score_reconstructions,
    score_texts,
    ssim,
    ssim_values,
)
from pagoda.evaluation.intervals import Z_95


def images(count: int = 12, seed: int = 0, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def reconstruct(made: Tensor, originals: Tensor, *metrics: str) -> list[Score]:
    measures = [pair_measure(metric, image_size=originals.shape[-1]) for metric in metrics]
    return score_reconstructions(
        measures, lambda rows: made[rows], lambda rows: originals[rows], len(made), reference="r", image_size=16
    )


def test_values_of_single_images_have_the_mean_as_their_score() -> None:
    noisy = images() + 0.1 * images(seed=1)
    assert psnr(noisy, images()) == pytest.approx(float(psnr_values(noisy, images()).mean()), rel=1e-12)
    assert ssim(noisy, images()) == pytest.approx(float(ssim_values(noisy, images()).mean()), rel=1e-12)
    assert psnr_values(noisy, images())[3] == psnr(noisy[3:4], images()[3:4])
    assert ssim_values(noisy, images())[3] == pytest.approx(ssim(noisy[3:4], images()[3:4]), rel=1e-12)


def test_scores_are_means_over_pairs_with_the_interval_of_a_mean() -> None:
    noisy = images() + 0.1 * images(seed=1)
    first, second = reconstruct(noisy, images(), "psnr", "ssim")
    values = psnr_values(noisy, images())
    assert first.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert first.low is not None
    assert first.value - first.low == pytest.approx(Z_95 * mean_error(values), rel=1e-4)
    assert second.value == pytest.approx(ssim(noisy, images()), rel=1e-6)
    assert (first.metric, first.better, first.floor, first.count_fake) == ("PSNR", "higher", None, 12)
    assert (first.extractor, first.resize) == ("pixels", "none")


def test_the_batch_moves_no_score() -> None:
    noisy = images() + 0.1 * images(seed=1)
    measures = [pair_measure("psnr", image_size=16)]
    one, many = (
        score_reconstructions(
            measures,
            lambda rows: noisy[rows],
            lambda rows: images()[rows],
            12,
            reference="r",
            image_size=16,
            batch_size=size,
        )[0]
        for size in (12, 5)
    )
    assert one.value == many.value


def test_a_perfect_reconstruction_has_no_interval_but_a_score() -> None:
    (score,) = reconstruct(images(), images(), "psnr")
    assert (score.value, score.low, score.high) == (math.inf, None, None)
    (score,) = reconstruct(images(), images(), "ssim")
    assert score.value == pytest.approx(1)


def test_more_noise_is_worse_by_every_measure() -> None:
    found = [reconstruct(images() + level * images(seed=1), images(), "psnr", "ssim") for level in (0.02, 0.08, 0.2)]
    for column in (0, 1):
        values = [scores[column].value for scores in found]
        assert values == sorted(values, reverse=True)


def test_reconstructions_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        reconstruct(images() * torch.nan, images(), "psnr")
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        reconstruct(images() * 4, images(), "psnr")
    with pytest.raises(ShapeError, match="their originals"):
        reconstruct(images()[..., :8, :8], images(), "psnr")
    with pytest.raises(ShapeError, match="windows of 11 pixels, these images have 8"):
        pair_measure("ssim", image_size=8)
    with pytest.raises(ConfigError, match="psnr, ssim or lpips"):
        pair_measure("lpips", image_size=16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> CLIPFeatures:
    pytest.importorskip("transformers")
    return CLIPFeatures(save_tiny_clip(tmp_path_factory.mktemp("clip")))


def features(clip: CLIPFeatures, batch: Tensor) -> Features:
    return Features(extract_features(clip, [batch]))


def test_the_clip_score_is_the_mean_cosine_of_each_image_with_its_own_text(clip: CLIPFeatures) -> None:
    texts = ["a", "dog", "a", "cat"]
    made, real = features(clip, images(4)), features(clip, images(4, seed=1))
    score = score_texts(clip, made, real, texts, image_size=16)
    values = clip_scores(made.values, clip.embed_texts(texts))
    assert score.value == pytest.approx(float(values.mean()), abs=1e-4)
    assert score.floor == pytest.approx(float(clip_scores(real.values, clip.embed_texts(texts)).mean()), abs=1e-4)
    assert score.metric == "CLIP score[clip-16d8]"
    assert score.extractor_fingerprint == clip.fingerprint
    assert score.notes == ()
    other = score_texts(clip, made, real, texts[::-1], image_size=16)
    assert other.reference_fingerprint != score.reference_fingerprint


def test_an_image_made_to_fit_its_text_scores_higher_than_one_that_is_not(clip: CLIPFeatures) -> None:
    text = clip.embed_texts(["dog"])
    fitting, foreign = Features(text.expand(3, -1).clone()), Features(-text.expand(3, -1))
    score = score_texts(clip, fitting, foreign, ["dog"] * 3, image_size=16)
    assert score.value == pytest.approx(100, abs=1e-3)
    assert score.floor == 0


def test_texts_that_are_cut_are_counted(clip: CLIPFeatures) -> None:
    made = features(clip, images(2))
    score = score_texts(clip, made, made, ["dog", "abcdefghijklmnopqrstuvwxyz"], image_size=16)
    assert score.notes == ("1 of 2 texts are longer than the 24 tokens that CLIP reads, and were cut.",)


def test_texts_are_needed_one_an_image_and_not_empty(clip: CLIPFeatures) -> None:
    made = features(clip, images(2))
    with pytest.raises(DataError, match="got 1"):
        score_texts(clip, made, made, ["dog"], image_size=16)
    with pytest.raises(DataError, match="1 of 2 texts are empty, the first is that of image 1"):
        score_texts(clip, made, made, ["dog", " "], image_size=16)


def test_a_clip_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = save_tiny_clip(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match="CLIPTokenizer"):
        CLIPFeatures(folder).embed_texts(["dog"])
