"""Training steps of a small DiT as our loop takes them, to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pagoda.data.order import batch_indices
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import BackboneConfig, DiffusersNetwork, build_backbone
from pagoda.pretraining import TechniqueConfig, build_techniques
from pagoda.training import LoopConfig, NoiseLaw, OptimizerConfig, Runtime, Setup, Trainable, Trainer
from pagoda.training.denoising import DenoisingObjective

LAW = NoiseLaw()
COUNT = 128
"""Images of the set, all in memory."""


def trained_steps(
    backbone: BackboneConfig,
    technique: TechniqueConfig | None = None,
    *,
    size: int,
    channels: int,
    num_classes: int,
    batch: int,
    folder: Path,
    seed: int,
) -> Callable[[int], float]:
    """A function that trains some steps, with Adam, clipping and averaged weights, and returns the seconds that one took."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(COUNT, channels, size, size, generator=generator) * 2 - 1

    def load(indices: Tensor, flips: Tensor) -> tuple[Tensor, Condition]:
        return images[indices], Condition.of_labels(indices % num_classes)

    runtime = Runtime("cpu")
    setup = Setup(
        image_size=size,
        channels=channels,
        num_classes=num_classes,
        steps=10**6,
        seed=seed,
        noise=LAW,
        noise_scale=25.0,
        sigma_data=0.5,
        count=COUNT,
        load=load,
        mirror=False,
        runtime=runtime,
    )
    torch.manual_seed(seed)
    network = DiffusersNetwork(build_backbone(backbone, image_size=size, in_channels=channels, num_classes=num_classes))
    techniques = build_techniques([] if technique is None else [technique])
    network = techniques.prepare(network, setup)
    objective = DenoisingObjective(
        EDMDenoiser(network, noise_scale=25.0),
        Trainable(techniques.together(network), OptimizerConfig(lr=1e-4), 0.99),
        load,
        noise=LAW,
        mirror=False,
        techniques=techniques,
    )
    trainer = Trainer(
        objective,
        LoopConfig(steps=1, batch_size=batch, preview_every=0, checkpoint_every=10**9, log_every=10**9),
        runtime=runtime,
        folder=folder,
        stage="cost",
        seed=seed,
        order=lambda step, count: batch_indices(seed, step, count, COUNT),
    )
    trainer.save = lambda: None  # type: ignore[method-assign]  # a checkpoint every few hundred steps is not a step's cost

    def run(steps: int) -> float:
        trainer.step = 0
        trainer.config = LoopConfig(
            steps=steps, batch_size=batch, preview_every=0, checkpoint_every=10**9, log_every=10**9
        )
        start = time.perf_counter()
        trainer._train()
        return (time.perf_counter() - start) / steps

    return run
