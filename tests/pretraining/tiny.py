"""A tiny training run with techniques, without a run folder: what the contract and the rooms' own tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data.order import batch_indices
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import BackboneConfig, DiffusersNetwork, build_backbone
from pagoda.pretraining import (
    CepConfig,
    DdaePlusConfig,
    DitMoeConfig,
    DtrConfig,
    RepaConfig,
    SwitchDitConfig,
    TechniqueConfig,
    build_techniques,
)
from pagoda.training import LoopConfig, NoiseLaw, OptimizerConfig, Runtime, Setup, Techniques, Trainable, Trainer
from pagoda.training.denoising import DenoisingObjective

COUNT, SIZE, CLASSES = 24, 8, 3
LAW = NoiseLaw(mean=-0.6, std=1.2)
DIT = BackboneConfig(kind="dit", patch_size=2, hidden_size=16, depth=4, head_dim=8)
UNET = BackboneConfig(channels=(8, 16), attention_levels=(1,), norm_groups=4, head_dim=8)

ACTIVE: dict[str, TechniqueConfig] = {
    "repa": RepaConfig(encoders=("random",), projector_dim=16),
    "cep": CepConfig(gamma=1.0),
    "dtr": DtrConfig(beta=0.6, num_tasks=50),
    "switch_dit": SwitchDitConfig(num_tasks=20, match_every=3),
    "dit_moe": DitMoeConfig(num_experts=4, width=1.0, balance_weight=0.05),
    "ddae_plus": DdaePlusConfig(contrastive=0.3, head_dim=8),
}
"""Each at work, small."""


def data(labelled: bool = True) -> tuple[Tensor, Tensor | None]:
    """Smooth random images (COUNT, 3, 8, 8) in [-1, 1] and classes."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(COUNT, 3, 2, 2, generator=generator).tanh()
    labels = torch.arange(COUNT) % CLASSES if labelled else None
    return torch.nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear"), labels


def load(indices: Tensor, flips: Tensor, labelled: bool = True) -> tuple[Tensor, Condition]:
    images, labels = data(labelled)
    chosen = torch.where(flips[:, None, None, None], images[indices].flip(-1), images[indices])
    return chosen, Condition.of_labels(None if labels is None else labels[indices])


def make_setup(steps: int = 6, *, labelled: bool = True, folder: Path | None = None) -> Setup:
    return Setup(
        image_size=SIZE,
        channels=3,
        num_classes=CLASSES if labelled else 0,
        steps=steps,
        seed=11,
        noise=LAW,
        noise_scale=25.0,
        sigma_data=0.5,
        count=COUNT,
        load=lambda indices, flips: load(indices, flips, labelled),
        mirror=True,
        runtime=Runtime("cpu"),
        folder=folder,
    )


def make_network(backbone: BackboneConfig = DIT, *, labelled: bool = True, random: bool = False) -> DiffusersNetwork:
    """A fresh network; `random` fills the layers that start at zero, which would hide a mistake."""
    torch.manual_seed(3)
    model = build_backbone(backbone, image_size=SIZE, num_classes=CLASSES if labelled else 0)
    if random:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return DiffusersNetwork(model)


def make_trainer(
    configs: Sequence[TechniqueConfig] | Techniques,
    folder: Path,
    *,
    backbone: BackboneConfig = DIT,
    steps: int = 6,
    labelled: bool = True,
    micro_batches: int = 1,
    ema: float | None = 0.9,
) -> Trainer:
    """A run of stage 1 on the tiny data."""
    setup = make_setup(steps, labelled=labelled, folder=folder / "techniques")
    techniques = configs if isinstance(configs, Techniques) else build_techniques(configs)
    network = techniques.prepare(make_network(backbone, labelled=labelled), setup)
    objective = DenoisingObjective(
        EDMDenoiser(network, sigma_data=0.5, noise_scale=25.0),
        Trainable(techniques.together(network), OptimizerConfig(lr=2e-3), ema),
        setup.load,
        noise=LAW,
        techniques=techniques,
    )
    return Trainer(
        objective,
        LoopConfig(steps=steps, batch_size=8, micro_batches=micro_batches, checkpoint_every=2, preview_every=0),
        runtime=setup.runtime,
        folder=folder,
        stage="teach",
        seed=11,
        order=lambda step, size: batch_indices(11, step, size, COUNT),
    )


def weights_of(trainer: Trainer, *, averaged: bool = False) -> dict[str, Tensor]:
    """Weights of the network alone, by name."""
    from pagoda.training.technique import network_of

    state = trainer.states["teacher"]
    module = state.ema.module if averaged and state.ema is not None else state.module
    return {name: value.clone() for name, value in network_of(module).model.state_dict().items()}
