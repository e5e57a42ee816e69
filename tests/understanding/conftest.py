"""Tiny real networks behind denoisers of both kinds, with random weights, so that no identity holds by accident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pagoda.diffusion import Denoiser, DiscreteVPSchedule, EDMDenoiser, ScheduledDenoiser
from pagoda.networks import BackboneConfig, DiffusersNetwork, build_backbone

NUM_CLASSES = 4
SIZE = 8
TINY_UNET = BackboneConfig(channels=(16, 32), head_dim=16)
TINY_DIT = BackboneConfig(kind="dit", hidden_size=32, depth=3, head_dim=16)


def make_network(kind: str, *, num_classes: int = NUM_CLASSES, dropout: float = 0.0) -> DiffusersNetwork:
    config = TINY_UNET if kind == "unet" else TINY_DIT
    config = BackboneConfig(**{**vars(config), "dropout": dropout})
    model = build_backbone(config, image_size=SIZE, in_channels=3, num_classes=num_classes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return DiffusersNetwork(model).eval().requires_grad_(False)


def edm(network: nn.Module) -> Denoiser:
    return EDMDenoiser(network, noise_scale=25.0).eval()


def vp(network: nn.Module) -> Denoiser:
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return ScheduledDenoiser(network, DiscreteVPSchedule(table), "eps").eval()


WRAPPERS: dict[str, Callable[[nn.Module], Denoiser]] = {"edm": edm, "vp": vp}


@pytest.fixture(params=["unet-edm", "unet-vp", "dit-edm", "dit-vp"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    """Both kinds of network behind both kinds of denoiser."""
    kind, wrapper = request.param.split("-")
    return WRAPPERS[wrapper](make_network(kind))


@pytest.fixture
def unet() -> Denoiser:
    return edm(make_network("unet"))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
