"""A cascade of diffusion models, to compare with: a base model, and for each octave one that is told the enlarged image below.

The image that it is told carries Gaussian noise, in training and in sampling alike, so that a model learns to mend what the model below
it does wrong (conditioning augmentation, Ho et al. 2021, Cascaded Diffusion Models, arXiv:2106.15282, section 4).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.diffusion import Condition, Denoiser, EDMDenoiser, sample
from pagoda.networks import DiffusersNetwork, backbone_preset, build_backbone
from pagoda.networks.counting import MultiplyAdds
from pagoda.stages.context import StageContext
from pagoda.training import Trainable, Trainer, noise_of_seeds, seeded_generator
from pagoda.training.denoising import DenoisingObjective
from pagoda.training.technique import network_of

TOLD_NOISE = 0.1
"""Standard deviation of the noise on the enlarged image, which lies in [-1, 1]."""
BATCH = 64
"""Images a network call when sampling."""


def told(small: Tensor, size: int, noise: Tensor) -> Tensor:
    """What a model of `size` is told: images (N, C, s, s) enlarged, and noise (N, C, size, size) of unit variance."""
    enlarged = F.interpolate(small, size=(size, size), mode="bicubic", antialias=False).clamp(-1, 1)
    return enlarged + TOLD_NOISE * noise


@dataclass(frozen=True)
class Trained:
    """A model and what it took."""

    denoiser: EDMDenoiser
    steps: int
    multiply_adds: float
    seconds: float


def train_for(
    context: StageContext, size: int, *, preset: str, multiply_adds: float, lower: int | None, folder: Path
) -> Trained:
    """Train a diffusion model of images of `size` with so much work, and the settings of the run's `teach`.

    Args:
        context: Of a run on these data, for images, labels and settings.
        preset: Its backbone.
        multiply_adds: How much; the cosine of the learning rate ends there. One step is counted beforehand, of a model that is thrown away.
        lower: Side of the images that it is told (`told`); None for a model that is told labels alone.
        folder: For its checkpoints.
    """
    config = context.config
    data_std = float(context.data.images(torch.arange(min(2048, len(context.data))), size).std())

    def load(indices: Tensor, flips: Tensor) -> tuple[Tensor, Condition]:
        images, condition = context.load(size, indices, flips)
        if lower is None:
            return images, condition
        below = context.load(lower, indices, flips)[0]
        draws = seeded_generator(config.seed, "told", *indices[:4].tolist(), size)  # another draw in every batch
        return images, replace(condition, image=told(below, size, torch.randn(images.shape, generator=draws)))

    def trainer(steps: int, name: str) -> Trainer[object]:
        torch.manual_seed(config.seed)
        channels = context.data.channels
        model = build_backbone(
            backbone_preset(preset, size),
            image_size=size,
            in_channels=channels if lower is None else 2 * channels,
            out_channels=channels,
            num_classes=context.num_classes,
        )
        network = DiffusersNetwork(model)
        objective = DenoisingObjective(
            EDMDenoiser(network, sigma_data=data_std, noise_scale=config.noise_scale),
            Trainable(network, config.teach.optimizer, config.teach.ema),
            load,
            noise=config.teach.noise,
            condition_dropout=0.0,
            mirror=config.mirror,
        )
        loop = replace(config.teach.loop, steps=steps, preview_every=0, checkpoint_every=10**9)
        return Trainer(  # type: ignore[return-value]
            objective,  # type: ignore[arg-type]
            loop,
            runtime=context.runtime,
            folder=folder / name,
            stage=name,
            seed=config.seed,
            order=context.order(f"cascade-{size}"),
        )

    with MultiplyAdds() as step:
        trainer(1, f"counted-{size}").run()
    steps = max(2, round(multiply_adds / step.total))
    whole = trainer(steps, f"model-{size}")
    started = time.monotonic()
    averaged = network_of(whole.run()["teacher"]).eval()
    denoiser = EDMDenoiser(averaged, sigma_data=data_std, noise_scale=config.noise_scale)
    return Trained(denoiser, steps, steps * step.total, time.monotonic() - started)


@torch.no_grad()
def draw(
    denoiser: Denoiser, seeds: list[int], labels: list[int], shape: tuple[int, ...], below: Tensor | None
) -> Tensor:
    """Samples (N, C, size, size) in [-1, 1] by Heun at 18 levels; `below` are those of the octave below, (N, C, s, s)."""
    made = []
    for rows in torch.arange(len(seeds)).split(BATCH):
        chosen = [seeds[i] for i in rows.tolist()]
        condition = Condition.of_labels([labels[i] for i in rows.tolist()])
        if below is not None:
            noise = noise_of_seeds([seed + 10**9 for seed in chosen], shape)  # not the noise that is denoised
            condition = replace(condition, image=told(below[rows], shape[-1], noise))
        made.append(sample(denoiser, noise_of_seeds(chosen, shape), condition=condition).clamp(-1, 1))
    return torch.cat(made)
