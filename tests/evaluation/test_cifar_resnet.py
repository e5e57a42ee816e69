"""The loader of CIFAR classifiers, on a random network written in the layout of the real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.evaluation import CIFARResNetFeatures
from pagoda.files import save_tensors

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BLOCKS = 2


def random_weights() -> dict[str, Tensor]:
    """Tensors by the names of the published files, without torch's batch counters."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def norm(name: str, width: int) -> None:
        for part, low in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.5)):
            weights[f"{name}.{part}"] = torch.rand(width, generator=generator) + low

    def conv(name: str, outer: int, inner: int) -> None:
        weights[f"{name}.weight"] = torch.randn(outer, inner, 3, 3, generator=generator) * (2 / (9 * inner)) ** 0.5

    conv("conv1", 16, 3)
    norm("bn1", 16)
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(BLOCKS):
            inner = width // 2 if block == 0 and stage > 1 else width
            conv(f"layer{stage}.{block}.conv1", width, inner)
            norm(f"layer{stage}.{block}.bn1", width)
            conv(f"layer{stage}.{block}.conv2", width, width)
            norm(f"layer{stage}.{block}.bn2", width)
    weights["linear.weight"] = torch.randn(10, 64, generator=generator) * 0.1
    weights["linear.bias"] = torch.randn(10, generator=generator) * 0.1
    return weights


def reference_features(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The network written a second time, with functions only, from the published description; pixels in 0..1."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{part}"][None, :, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = (pixels - torch.tensor(MEAN)[None, :, None, None]) / torch.tensor(STD)[None, :, None, None]
    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(BLOCKS):
            name, halve = f"layer{stage}.{block}", stage > 1 and block == 0
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=2 if halve else 1, padding=1)
            y = norm(y, f"{name}.bn1").relu()
            y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if halve:
                quarter = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
                x = torch.cat([quarter, x[:, :, ::2, ::2], quarter], dim=1)
            x = (x + y).relu()
    return x.mean((2, 3))


def write_folder(folder: Path) -> dict[str, Tensor]:
    weights = random_weights()
    ramp = (torch.arange(3072) / 3071).reshape(1, 3, 32, 32)
    logits = reference_features(weights, ramp) @ weights["linear.weight"].T + weights["linear.bias"]
    entry = {
        "file": "resnet14.safetensors",
        "blocks_per_stage": BLOCKS,
        "self_check": {"expected_logits_to_4_decimals": [round(v, 4) for v in logits[0].tolist()]},
    }
    description = {"input": {"mean": MEAN, "std": STD}, "models": {"resnet14": entry}}
    (folder / "architecture.json").write_text(json.dumps(description))
    save_tensors(folder / "resnet14.safetensors", weights)
    return weights


def test_features_equal_an_independent_writing_of_the_network(tmp_path: Path) -> None:
    weights = write_folder(tmp_path)
    extractor = CIFARResNetFeatures(tmp_path, model="resnet14")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference_features(weights, images / 2 + 0.5)
    assert extractor(images).shape == (3, extractor.dim)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    assert extractor.name == "cifar10-resnet14"


def test_grey_images_are_read_as_colour_images_without_colour(tmp_path: Path) -> None:
    write_folder(tmp_path)
    extractor = CIFARResNetFeatures(tmp_path, model="resnet14")
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tensor", ["conv1.weight", "layer2.1.bn2.running_var", "linear.bias"])
def test_changed_weights_fail_the_self_check(tmp_path: Path, tensor: str) -> None:
    weights = write_folder(tmp_path)
    fingerprint = CIFARResNetFeatures(tmp_path, model="resnet14").fingerprint
    assert len(fingerprint) == 16
    weights[tensor] = weights[tensor] * 1.5
    save_tensors(tmp_path / "resnet14.safetensors", weights)
    with pytest.raises(ArtifactError, match="self-check"):
        CIFARResNetFeatures(tmp_path, model="resnet14")


@pytest.mark.parametrize(
    "damage", ["a tensor is missing", "weights missing", "description missing", "description foreign"]
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    weights = write_folder(tmp_path)
    if damage == "a tensor is missing":
        weights.pop("bn1.weight")
        save_tensors(tmp_path / "resnet14.safetensors", weights)
    elif damage == "weights missing":
        (tmp_path / "resnet14.safetensors").unlink()
    elif damage == "description missing":
        (tmp_path / "architecture.json").unlink()
    else:
        (tmp_path / "architecture.json").write_text('{"models": {}}')
    with pytest.raises(ArtifactError):
        CIFARResNetFeatures(tmp_path, model="resnet14")


def test_unknown_models_and_foreign_images_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ConfigError, match="resnet14"):
        CIFARResNetFeatures(tmp_path, model="resnet20")
    extractor = CIFARResNetFeatures(tmp_path, model="resnet14")
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        extractor(torch.full((1, 3, 32, 32), 255.0))
