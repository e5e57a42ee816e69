"""What every feature extractor keeps to: same image, same features; checked input; a hash that tells weights apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation import (
    CIFARResNet,
    ClassifierConfig,
    ClassifierFeatures,
    ClassifyingExtractor,
    CLIPFeatures,
    DINOv2Features,
    FeatureExtractor,
    SmallClassifier,
    StackFeatures,
)
from pagoda.networks import RandomFeatures, TeacherFeatures, build_backbone
from pagoda.networks.backbones import BackboneConfig

SIZE = 16


def classifier(seed: int, _: Path) -> FeatureExtractor:
    torch.manual_seed(seed)
    return ClassifierFeatures(SmallClassifier(ClassifierConfig(num_classes=3, input_size=SIZE, widths=(8, 16))))


def random_network(seed: int, _: Path) -> FeatureExtractor:
    return StackFeatures(RandomFeatures(seed=seed), name="random")


def random_network_resized(seed: int, _: Path) -> FeatureExtractor:
    return StackFeatures(RandomFeatures(seed=seed), name="random", input_size=8)


def teacher(seed: int, _: Path) -> FeatureExtractor:
    torch.manual_seed(seed)
    config = BackboneConfig(channels=(16, 32), head_dim=16)
    return StackFeatures(TeacherFeatures(build_backbone(config, image_size=SIZE, num_classes=3)), name="teacher")


def dinov2(seed: int, folder: Path) -> FeatureExtractor:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return DINOv2Features(folder, size=28)


def clip(seed: int, folder: Path) -> FeatureExtractor:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    both = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**both, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**both, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return CLIPFeatures(folder)


EXTRACTORS: dict[str, Callable[[int, Path], FeatureExtractor]] = {
    "classifier": classifier,
    "random": random_network,
    "random-resized": random_network_resized,
    "teacher": teacher,
    "dinov2": dinov2,
    "clip": clip,
}


@pytest.fixture(params=list(EXTRACTORS))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], FeatureExtractor]:
    def build(seed: int) -> FeatureExtractor:
        return EXTRACTORS[request.param](seed, tmp_path / str(seed))

    return build


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_have_the_promised_shape_and_are_finite(make: Callable[[int], FeatureExtractor]) -> None:
    extractor = make(0)
    features = extractor(images())
    assert features.shape == (6, extractor.dim)
    assert features.dtype == torch.float32
    assert bool(torch.isfinite(features).all())
    assert not features.requires_grad


def test_features_of_an_image_do_not_depend_on_its_batch(make: Callable[[int], FeatureExtractor]) -> None:
    extractor = make(0)
    alone = torch.cat([extractor(image[None]) for image in images()])
    torch.testing.assert_close(extractor(images()), alone, rtol=1e-4, atol=1e-5)


def test_different_images_have_different_features(make: Callable[[int], FeatureExtractor]) -> None:
    features = make(0)(images())
    assert float((features[0] - features[1]).abs().max()) > 1e-5


def test_the_hash_belongs_to_the_weights(make: Callable[[int], FeatureExtractor]) -> None:
    assert make(0).fingerprint == make(0).fingerprint
    assert make(0).fingerprint != make(1).fingerprint


def test_no_substitute_is_called_by_a_published_name(make: Callable[[int], FeatureExtractor]) -> None:
    extractor = make(0)
    assert "inception" not in extractor.name.lower()
    assert "fid" not in extractor.name.lower()
    assert extractor.resize


def test_what_is_no_batch_of_images_in_range_is_refused(make: Callable[[int], FeatureExtractor]) -> None:
    extractor = make(0)
    with pytest.raises(DataError, match="NaN"):
        extractor(images() * torch.nan)
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        extractor(images() * 3)
    with pytest.raises(DataError, match="uint8"):
        extractor(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    with pytest.raises(ShapeError):
        extractor(images().permute(0, 2, 3, 1))


def test_logits_come_with_the_same_features(make: Callable[[int], FeatureExtractor]) -> None:
    extractor = make(0)
    if isinstance(extractor, ClassifyingExtractor):
        features, logits = extractor.features_and_logits(images())
        assert torch.equal(features, extractor(images()))
        assert logits.shape[0] == 6


def test_the_cifar_network_and_the_small_classifier_classify() -> None:
    assert isinstance(classifier(0, Path()), ClassifyingExtractor)
    assert not isinstance(random_network(0, Path()), ClassifyingExtractor)
    assert CIFARResNet(3)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
