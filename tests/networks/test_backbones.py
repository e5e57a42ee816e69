"""Presets and the networks built of them."""

import pytest
import torch

from pagoda.diffusion.denoiser import EDMDenoiser
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import (
    PRESETS,
    BackboneConfig,
    DiffusersNetwork,
    anatomy,
    backbone_preset,
    build_backbone,
    model_hash,
)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("tiny", 8, 1.17),
        ("tiny", 16, 1.17),
        ("small", 16, 2.07),
        ("dit_tiny", 8, 2.1),
        ("dit_nano", 8, 0.4),
        ("dit_s", 16, 35.2),
        ("base", 64, 266),
        ("base", 32, 336),
    ],
)
def test_presets_have_the_size_that_the_docs_say(name, size, millions):
    with torch.device("meta"):  # shapes only
        model = build_backbone(backbone_preset(name, size), image_size=size, num_classes=10)
    assert count(model) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "small", "dit_tiny"])
@pytest.mark.parametrize("size", [8, 12, 28, 32])
def test_presets_run_at_their_size(name, size):
    network = DiffusersNetwork(
        build_backbone(backbone_preset(name, size), image_size=size, in_channels=1, num_classes=3)
    )
    assert network(torch.randn(2, 1, size, size), torch.ones(2)).shape == (2, 1, size, size)
    assert (network.in_channels, network.num_classes, network.sample_size) == (1, 3, size)


def test_unet_presets_attend_at_the_deepest_level_only():
    parts = anatomy(build_backbone(backbone_preset("tiny", 16), image_size=16))
    attended = {
        parts.level(name)
        for name in parts.names()
        if name.startswith("encoder.") and any(type(module).__name__ == "Attention" for module in parts.part(name))
    }
    assert attended == {parts.stride}


def test_fresh_denoiser_returns_the_skip_only():
    for name in ("tiny", "dit_tiny"):
        network = DiffusersNetwork(build_backbone(backbone_preset(name, 8), image_size=8))
        x = torch.randn(2, 3, 8, 8)
        c_skip = 0.25 / (4 + 0.25)
        assert torch.allclose(EDMDenoiser(network)(x, 2.0), c_skip * x, atol=1e-6)


def test_save_and_load_is_bit_exact(tmp_path):
    for name in ("tiny", "dit_tiny"):
        model = build_backbone(backbone_preset(name, 8), image_size=8, num_classes=3)
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name, local_files_only=True)
        assert model_hash(loaded) == model_hash(model)
        assert [path.suffix for path in (tmp_path / name).iterdir() if path.suffix != ".json"] == [".safetensors"]


def test_size_that_the_stride_does_not_divide_names_accepted_sizes():
    with pytest.raises(ShapeError, match=r"image_size=10 .*stride 4.*4, 8, 16, 32"):
        build_backbone(BackboneConfig(channels=(16, 32, 32)), image_size=10)
    with pytest.raises(ShapeError, match="presets take even sizes"):
        backbone_preset("tiny", 9)


def test_null_row_is_added_for_classes_only():
    assert build_backbone(BackboneConfig(), image_size=8).class_embedding is None
    assert build_backbone(BackboneConfig(), image_size=8, num_classes=4).class_embedding.num_embeddings == 5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "unett"}, ConfigError, "Did you mean `unet`"),
        ({"channels": ()}, ConfigError, "channels is empty"),
        ({"channels": (48, 100)}, ShapeError, "norm_groups=16 does not divide the width 100"),
        ({"attention_levels": (2,)}, ConfigError, "attention level 2 does not exist"),
        ({"head_dim": 36}, ShapeError, "head_dim=36 does not divide the attended width 96"),
        ({"dropout": 1.0}, ConfigError, r"dropout must lie in \[0, 1\)"),
        ({"layers_per_block": 0}, ConfigError, "layers_per_block must be at least 1"),
        ({"kind": "dit", "hidden_size": 100}, ShapeError, "head_dim=32 does not divide hidden_size=100"),
    ],
)
def test_impossible_configs_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        BackboneConfig(**changes)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `small`"):
        backbone_preset("smal", 16)
    with pytest.raises(ConfigError, match="use `small`"):
        backbone_preset("base", 16)
    assert PRESETS == ("tiny", "small", "base", "dit_nano", "dit_tiny", "dit_s", "dit_b", "dit_l", "dit_xl")
