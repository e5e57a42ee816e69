"""Stage 1's objective: denoising at random noise levels, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, EDMDenoiser, per_sample, sample
from pagoda.errors import ConfigError
from pagoda.training.objective import Losses, Objective, Trainable
from pagoda.training.randomness import StepRandom
from pagoda.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class NoiseLaw:
    """The law of the noise level in training: ln sigma ~ N(mean, std^2). Source: Karras et al. 2022, table 1."""

    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"the std of ln sigma must be > 0, got {self.std}.")

    def draw(self, normal: Tensor) -> Tensor:
        """Noise levels from unit Gaussian draws."""
        return (self.mean + self.std * normal).exp()


@dataclass(frozen=True)
class DenoisingBatch:
    """Clean images and what they are conditioned on."""

    images: Tensor
    condition: Condition


class DenoisingObjective(Objective[DenoisingBatch]):
    """E over sigma, noise of w(sigma) |D(x + sigma n; sigma) - x|^2 with w = (sigma^2 + sd^2) / (sigma sd)^2.

    Args:
        denoiser: The model under training, EDM-preconditioned.
        trainable: Its network with the optimiser and the average.
        load: `load(indices, flips) -> (images, condition)`, on the CPU.
        noise: Law of the noise level.
        condition_dropout: Chance per sample to train without its condition.
        mirror: Mirror half of the samples.
        preview_noise: Unit noise (N, C, H, W) and `preview_condition` for the grids; None draws none.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 8.
    """

    def __init__(
        self,
        denoiser: EDMDenoiser,
        trainable: Trainable,
        load: Callable[[Tensor, Tensor], tuple[Tensor, Condition]],
        *,
        noise: NoiseLaw,
        condition_dropout: float = 0.1,
        mirror: bool = True,
        preview_noise: Tensor | None = None,
        preview_condition: Condition | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.trainable = trainable
        self.load = load
        self.noise = noise
        self.condition_dropout = condition_dropout
        self.mirror = mirror
        self.preview_noise = preview_noise
        self.preview_condition = preview_condition or Condition()

    def trainables(self) -> Mapping[str, Trainable]:
        return {"teacher": self.trainable}

    def batch(self, indices: Tensor, random: StepRandom) -> DenoisingBatch:
        flips = random.uniform("flip") < (0.5 if self.mirror else 0.0)
        images, condition = self.load(indices, flips)
        if condition.batch_size is not None:
            condition = condition.drop_rows(random.uniform("condition") < self.condition_dropout)
        return DenoisingBatch(images, condition)

    def losses(self, name: str, batch: DenoisingBatch, random: StepRandom, runtime: Runtime) -> Losses:
        images = batch.images.to(runtime.device)
        sigma = self.noise.draw(random.normal("sigma")).to(runtime.device)
        noise = random.normal("noise", *images.shape[1:]).to(runtime.device)
        denoised = self.denoiser(images + per_sample(sigma, images) * noise, sigma, batch.condition.to(runtime.device))
        data_std = self.denoiser.sigma_data
        weight = (sigma**2 + data_std**2) / (sigma * data_std) ** 2
        loss = weight * (denoised - images).square().flatten(1).mean(1)  # (B,)
        return Losses(loss.mean(), {"denoising": loss})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        if self.preview_noise is None:
            return None
        network = averaged["teacher"]
        training = network.training
        network.eval()
        model = EDMDenoiser(network, sigma_data=self.denoiser.sigma_data, noise_scale=self.denoiser.noise_scale)
        device = next(network.parameters()).device
        with torch.no_grad():
            images = sample(model, self.preview_noise.to(device), condition=self.preview_condition.to(device))
        network.train(training)
        return images.clamp(-1, 1)
