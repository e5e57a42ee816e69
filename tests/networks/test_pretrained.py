"""Networks from outside as feature stacks: tiny models in local folders; what is missing is named with the place where it belongs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, MissingExtraError, ShapeError
from pagoda.networks import FeatureConfig, RandomFeatures, TransformersFeatures, build_features, check_features
from pagoda.networks.pretrained import check_timm, open_timm, open_transformers

transformers = pytest.importorskip("transformers")
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
VIT = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[tuple[int, int]]]] = {
    "Dinov2": ("Dinov2Model", {**VIT, "image_size": 32, "mlp_ratio": 2}, [(16, 4)] * 4),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", {**VIT, "image_size": 24, "mlp_ratio": 2}, [(16, 3)] * 4),
    "ViT": ("ViTModel", {**VIT, "image_size": 32}, [(16, 4)] * 4),
    "DeiT": ("DeiTModel", {**VIT, "image_size": 32}, [(16, 4)] * 4),
    "SiglipVision": ("SiglipVisionModel", {**VIT, "image_size": 32}, [(16, 4)] * 4),
    "CLIPVision": ("CLIPVisionModel", {**VIT, "image_size": 32}, [(16, 4)] * 4),
    "ConvNext": (
        "ConvNextModel",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 64},
        [(8, 16), (12, 8), (16, 4), (20, 2)],
    ),
    "ResNet": (
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        [(8, 56), (16, 28)],
    ),
    "Swin": (
        "SwinModel",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 4},
        [(16, 4), (16, 4)],
    ),
}


def make(family: str) -> Any:
    kind, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("Dinov2").save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def teacher() -> Any:
    raise AssertionError("nobody asked for the teacher")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_layers_become_maps(family: str) -> None:
    stack = TransformersFeatures(make(family))
    maps = stack(IMAGES)
    assert [(m.shape[1], m.shape[-1]) for m in maps] == FAMILIES[family][2][-len(maps) :]
    assert stack.channels == [m.shape[1] for m in maps]
    assert all(bool(m.isfinite().all()) for m in maps)


def test_a_map_is_the_hidden_state_of_its_patches_in_their_order() -> None:
    model = make("Dinov2")
    stack = TransformersFeatures(model, layers=[2], size=32)
    pixels = stack.pixels(IMAGES)
    tokens = model(pixel_values=pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    torch.testing.assert_close(stack(IMAGES)[0][:, :, 1, 3], tokens[:, 1 * 4 + 3])


def test_images_are_normalised_as_the_model_was_trained() -> None:
    stack = TransformersFeatures(make("ViT"), statistics={"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    white = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(stack.pixels(white), torch.full((1, 3, 32, 32), 2.0))
    assert stack.pixels(IMAGES).shape == (2, 3, 32, 32)


def test_grey_images_are_repeated() -> None:
    model = make("ViT")
    grey, colour = TransformersFeatures(model, in_channels=1), TransformersFeatures(model)
    assert torch.equal(grey(IMAGES[:, :1])[0], colour(IMAGES[:, :1].expand(-1, 3, -1, -1))[0])
    with pytest.raises(ShapeError, match="reads images of 1 channels, got 3"):
        grey(IMAGES)


def test_another_size_gives_more_patches_where_the_model_can() -> None:
    assert TransformersFeatures(make("Dinov2"), size=48)(IMAGES)[0].shape[-1] == 6
    with pytest.raises(ConfigError, match="multiple of the model's patches of 8 px; use 32"):
        TransformersFeatures(make("Dinov2"), size=33)
    with pytest.raises(ConfigError, match=r"hidden layers 0 to 5"):
        TransformersFeatures(make("Dinov2"), layers=[6])
    with pytest.raises(ConfigError, match="5 channels"):
        TransformersFeatures(make("Dinov2"), in_channels=5)


def test_fingerprints_tell_layers_sizes_and_weights_apart() -> None:
    model = make("Dinov2")
    stacks = [
        TransformersFeatures(model, layers=[2]),
        TransformersFeatures(model),
        TransformersFeatures(model, size=48),
    ]
    found = {stack.fingerprint for stack in stacks}
    other = make("Dinov2")
    with torch.no_grad():
        other.layernorm.bias.add_(1)
    assert len(found | {TransformersFeatures(other).fingerprint}) == 4


def test_a_folder_is_opened_by_its_name_with_its_statistics(folder: Path) -> None:
    config = FeatureConfig(networks=(f"transformers:{folder}",), layers=("1", "3"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    check_features(config)
    stack = build_features(config, teacher=teacher, in_channels=3, seed=0)
    assert stack.channels == [16, 16]
    assert float(stack.mean.mean()) == pytest.approx(0.1)


def test_several_networks_are_joined_and_mixed(folder: Path) -> None:
    config = FeatureConfig(networks=(f"transformers:{folder}", "random:3"), mixing=True)
    stack = build_features(config, teacher=teacher, in_channels=3, seed=1)
    assert len(stack.channels) == 4 + 3
    again = build_features(config, teacher=teacher, in_channels=3, seed=1)
    assert stack.fingerprint == again.fingerprint
    assert stack.fingerprint != build_features(config, teacher=teacher, in_channels=3, seed=2).fingerprint


def test_clip_is_read_without_its_text_part(tmp_path: Path) -> None:
    both = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**both, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**both, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    model, _ = open_transformers(tmp_path)
    stack = TransformersFeatures(model)
    assert stack(IMAGES)[-1].shape == (2, 16, 2, 2)
    assert not any("text" in name for name in stack.state_dict())


def test_missing_files_are_named_with_their_place(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.json\. Put config\.json and model\.safetensors there"):
        check_features(FeatureConfig(networks=(f"transformers:{tmp_path}",)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no safetensors weights.*Put model\.safetensors there"):
        check_features(FeatureConfig(networks=(f"transformers:{folder}",)))
    with pytest.raises(ArtifactError, match=r"(?s)no config\.json in the hub's cache.*huggingface\.co/pagoda/nowhere"):
        check_features(FeatureConfig(networks=("transformers:pagoda/nowhere",)))
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        check_features(FeatureConfig(networks=("transformers:./nowhere",)))


def test_without_timm_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> Any:
        raise ImportError(message)

    monkeypatch.setattr(importlib, "import_module", fail)
    message = "No module named 'timm'"
    with pytest.raises(MissingExtraError, match="pip install --no-deps timm"):
        check_timm("resnet18.a1_in1k")
    message = "No module named 'torchvision'"
    with pytest.raises(
        MissingExtraError, match=r"without the torchvision of this torch.*whl/cpu.*use transformers:FOLDER"
    ):
        check_timm("resnet18.a1_in1k")


@pytest.fixture
def timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(f"needs timm with the torchvision of this torch ({error})")


def save_timm(timm: Any, architecture: str, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    facts = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit", "test_convnext"])
def test_timm_models_are_read_from_a_folder(timm: Any, architecture: str, tmp_path: Path) -> None:
    save_timm(timm, architecture, tmp_path / "net")
    size = 160 if architecture == "test_vit" else 64
    stack = open_timm(str(tmp_path / "net"), size=size)
    images = IMAGES.clone().requires_grad_(True)
    maps = stack(images)
    assert [m.shape[1] for m in maps] == stack.channels
    total: Tensor = sum(m.square().mean() for m in maps)  # type: ignore[assignment]
    total.backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
    assert stack.fingerprint == open_timm(str(tmp_path / "net"), size=size).fingerprint


def test_timm_weights_are_loaded_and_their_absence_is_named(timm: Any, tmp_path: Path) -> None:
    save_timm(timm, "test_convnext", tmp_path / "net")
    first = open_timm(str(tmp_path / "net"), size=64)(IMAGES)[0]
    torch.manual_seed(5)
    assert torch.equal(open_timm(str(tmp_path / "net"), size=64)(IMAGES)[0], first)
    (tmp_path / "net" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"Put model\.safetensors there"):
        open_timm(str(tmp_path / "net"))


def test_a_network_is_never_trained_by_what_reads_it(folder: Path) -> None:
    stack = build_features(FeatureConfig(networks=(f"transformers:{folder}",)), teacher=teacher, in_channels=3, seed=0)
    assert not any(p.requires_grad for p in stack.parameters())
    assert not any(m.training for m in stack.train().modules())
    assert isinstance(
        build_features(FeatureConfig(networks=("random",)), teacher=teacher, in_channels=3, seed=0), RandomFeatures
    )
