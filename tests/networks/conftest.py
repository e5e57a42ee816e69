"""Tiny real networks of every kind, with random non-zero weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers.models import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from pagoda.diffusion.conditions import Condition
from pagoda.networks import DiffusersNetwork

NUM_CLASSES = 5
BATCH = 3


class Case(NamedTuple):
    """A network with inputs that suit it."""

    network: DiffusersNetwork
    x: Tensor
    t: Tensor
    condition: Condition


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random non-zero weights everywhere, so that no identity holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_unet(**changes: object) -> UNet2DModel:
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "num_class_embeds": NUM_CLASSES + 1,
    }
    return randomise(UNet2DModel(**{**settings, **changes}))


def make_dit(**changes: object) -> DiTTransformer2DModel:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": NUM_CLASSES,
    }
    return randomise(DiTTransformer2DModel(**{**settings, **changes}))


def make_text_unet(**changes: object) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 6,
    }
    return randomise(UNet2DConditionModel(**{**settings, **changes}))


DEEP = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 2,
}
CONSISTENCY = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
"""As diffusers writes consistency models."""
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "resnet_skip_time_act": True,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
"""As DeepFloyd IF."""
KINDS: dict[str, Callable[[], nn.Module]] = {
    "unet": make_unet,
    "unet-deep": lambda: make_unet(**DEEP),
    "unet-resnet-resampling": lambda: make_unet(**DEEP, downsample_type="resnet", upsample_type="resnet"),
    "unet-resnet-blocks": lambda: make_unet(**CONSISTENCY),
    "unet-without-middle": lambda: make_unet(mid_block_type=None, center_input_sample=True),
    "unet-fourier": lambda: make_unet(time_embedding_type="fourier", num_class_embeds=None),
    "unet-scale-shift": lambda: make_unet(resnet_time_scale_shift="scale_shift"),
    "text-unet": make_text_unet,
    "text-unet-labels": lambda: make_text_unet(num_class_embeds=NUM_CLASSES + 1, class_embeddings_concat=True),
    "text-unet-simple": lambda: make_text_unet(**SIMPLE),
    "dit": make_dit,
}


def make_case(kind: str, size: int = 8) -> Case:
    network = DiffusersNetwork(KINDS[kind]())
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, -1, NUM_CLASSES - 1]) if network.num_classes else None
    tokens = mask = None
    if kind.startswith("text"):
        tokens = torch.randn(BATCH, 4, 6, generator=generator)
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    condition = Condition(label=labels, tokens=tokens, tokens_mask=mask)
    x = torch.randn(BATCH, 3, size, size, generator=generator)
    return Case(network, x, torch.rand(BATCH, generator=generator) * 10 + 1, condition)


@pytest.fixture(params=list(KINDS))
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of network in turn."""
    return make_case(request.param)


@pytest.fixture
def unet() -> nn.Module:
    return make_unet()


@pytest.fixture
def dit() -> nn.Module:
    return make_dit()


@pytest.fixture
def text_unet() -> nn.Module:
    return make_text_unet()


@pytest.fixture(params=["unet", "dit"])
def teacher(request: pytest.FixtureRequest) -> nn.Module:
    """A class-conditional teacher of 8 px."""
    return KINDS[request.param]()


@pytest.fixture
def odd_text_case() -> Case:
    """A text U-Net on images whose side its stride does not divide."""
    return make_case("text-unet", size=7)


@pytest.fixture
def make_unet_with() -> Callable[..., nn.Module]:
    return make_unet


@pytest.fixture
def deep_case() -> Case:
    """A U-Net of three levels with two layers in each block."""
    return make_case("unet-deep")
