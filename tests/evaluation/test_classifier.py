"""The classifier that judges generated images: it learns, repeats itself, is stored whole, and refuses what it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.evaluation import ClassifierConfig, ClassifierFeatures, SmallClassifier, resize_images, train_classifier


def stripes(count: int = 240, size: int = 8) -> tuple[Tensor, Tensor]:
    """Horizontal stripes, vertical stripes, and a smooth field, under noise: uint8 (N, 3, S, S) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    wave = torch.where(torch.arange(size) % 2 == 0, 60.0, -60.0)
    patterns = torch.stack([wave[:, None].expand(size, size), wave.expand(size, size), torch.zeros(size, size)])
    noise = 10 * torch.randn(count, 3, size, size, generator=generator)
    return (patterns[labels][:, None] + 128 + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained() -> SmallClassifier:
    images, labels = stripes()
    return train_classifier(images, labels, num_classes=3, steps=40, batch_size=32)


def untrained(**options: int) -> SmallClassifier:
    torch.manual_seed(0)
    return SmallClassifier(ClassifierConfig(num_classes=3, **options)).eval()


def test_classifier_learns_classes_that_can_be_told_apart(trained: SmallClassifier) -> None:
    assert trained.accuracy is not None
    assert trained.accuracy > 0.9


def test_accuracy_is_measured_on_images_that_were_never_trained_on() -> None:
    # Pure noise with made-up labels can only be learnt by heart: the trained half is, the held-out half is not.
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 8, 8, generator=generator) * 2 - 1
    labels = torch.randint(3, (60,), generator=generator)
    options = {"num_classes": 3, "steps": 80, "batch_size": 16}
    classifier = train_classifier(images, labels, held_out=0.5, augment=False, **options)
    with torch.no_grad():
        overall = float((classifier(images).argmax(1) == labels).double().mean())
    assert classifier.accuracy is not None
    assert classifier.accuracy < 0.65  # chance is 1/3, and four standard deviations of 30 images are 0.34
    assert 2 * overall - classifier.accuracy > 0.9  # accuracy on the other half


def test_training_repeats_itself_and_leaves_the_global_generator_alone(trained: SmallClassifier) -> None:
    images, labels = stripes()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = train_classifier(images, labels, num_classes=3, steps=40, batch_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    assert ClassifierFeatures(again).fingerprint == ClassifierFeatures(trained).fingerprint
    floats = train_classifier(images.float() / 127.5 - 1, labels, num_classes=3, steps=40, batch_size=32)
    assert ClassifierFeatures(floats).fingerprint == ClassifierFeatures(trained).fingerprint
    other = train_classifier(images, labels, num_classes=3, steps=2, batch_size=32, seed=1)
    assert ClassifierFeatures(other).fingerprint != ClassifierFeatures(trained).fingerprint


def test_progress_is_told_every_step() -> None:
    images, labels = stripes(30)
    seen: list[int] = []
    train_classifier(
        images, labels, num_classes=3, steps=3, batch_size=4, progress=lambda step, loss: seen.append(step)
    )
    assert seen == [1, 2, 3]


def test_features_do_not_depend_on_the_rest_of_the_batch(trained: SmallClassifier) -> None:
    extractor = ClassifierFeatures(trained)
    images = stripes()[0][:16].float() / 127.5 - 1
    together = extractor(images)
    assert together.shape == (16, extractor.dim)
    assert together.dtype == torch.float32
    torch.testing.assert_close(extractor(images[3:4]), together[3:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("input_size", [8, 32, 64])
def test_images_of_other_sizes_are_resized_to_the_input_size(input_size: int) -> None:
    extractor = ClassifierFeatures(untrained(input_size=input_size))
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(extractor(images), extractor(resize_images(images, input_size)), rtol=0, atol=0)


def test_default_size_has_100_to_250_thousand_parameters() -> None:
    assert 100_000 < sum(p.numel() for p in untrained().parameters()) < 250_000


def test_grey_classifier_takes_grey_images_only() -> None:
    extractor = ClassifierFeatures(untrained(channels=1, input_size=8))
    assert extractor(torch.zeros(2, 1, 8, 8)).shape == (2, 96)
    with pytest.raises(ShapeError, match=r"1 channel\(s\), got 3"):
        extractor(torch.zeros(2, 3, 8, 8))


def test_saved_classifier_gives_the_same_features(tmp_path: Path, trained: SmallClassifier) -> None:
    trained.save(tmp_path)
    loaded = SmallClassifier.load(tmp_path)
    images = stripes()[0][:8].float() / 127.5 - 1
    assert torch.equal(ClassifierFeatures(loaded)(images), ClassifierFeatures(trained)(images))
    assert ClassifierFeatures(loaded).fingerprint == ClassifierFeatures(trained).fingerprint
    assert loaded.accuracy == trained.accuracy
    assert not loaded.training


@pytest.mark.parametrize(
    "damage", ["weights missing", "config missing", "config cut", "weights of another", "architecture"]
)
def test_damaged_classifiers_are_refused(tmp_path: Path, damage: str) -> None:
    untrained(input_size=8).save(tmp_path)
    config = tmp_path / "config.json"
    if damage == "weights missing":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "config missing":
        config.unlink()
    elif damage == "config cut":
        config.write_text(config.read_text()[:40])
    elif damage == "weights of another":
        other = tmp_path / "other"
        torch.manual_seed(1)
        SmallClassifier(ClassifierConfig(num_classes=3, input_size=8)).save(other)
        (other / "model.safetensors").rename(tmp_path / "model.safetensors")
    else:
        record = json.loads(config.read_text())
        record["config"]["num_classes"] = 4
        config.write_text(json.dumps(record))
    with pytest.raises(ArtifactError):
        SmallClassifier.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 3, "input_size": 12}, "multiple of 8"),
        ({"num_classes": 3, "input_size": 128}, "8 to 64"),
        ({"num_classes": 3, "channels": 4}, "1 or 3"),
        ({"num_classes": 3, "widths": (24, 20)}, "multiples of 8"),
    ],
)
def test_architectures_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifierConfig(**options)


def test_data_that_cannot_be_trained_on_is_refused() -> None:
    images, labels = stripes(30)
    with pytest.raises(DataError, match="as many labels"):
        train_classifier(images, labels[:-1], num_classes=3)
    with pytest.raises(DataError, match=r"0\.\.1"):
        train_classifier(images, labels, num_classes=2)
    with pytest.raises(DataError, match="leaves nothing"):
        train_classifier(images, labels, num_classes=3, held_out=0.0)
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        train_classifier(images.float(), labels, num_classes=3)
    with pytest.raises(ConfigError, match="steps"):
        train_classifier(images, labels, num_classes=3, steps=0)
