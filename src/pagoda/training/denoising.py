"""Stage 1's objective: denoising at random noise levels, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, EDMDenoiser, per_sample, sample
from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork
from pagoda.networks.recording import RecordingNetwork, shift_class_embedding
from pagoda.training.noise import NoiseLaw
from pagoda.training.objective import Losses, Objective, Trainable
from pagoda.training.randomness import StepRandom
from pagoda.training.runtime import Runtime
from pagoda.training.technique import NoisyInputs, Techniques, TrainedTogether, network_of

__all__ = ["WEIGHTINGS", "DenoisingBatch", "DenoisingObjective", "NoiseLaw"]

WEIGHTINGS = ("edm", "flow")
"""Weights of the denoising loss by noise level."""


@dataclass(frozen=True)
class DenoisingBatch:
    """Clean images, what they are conditioned on, and which ones of the data set they are."""

    images: Tensor
    condition: Condition
    indices: Tensor
    flips: Tensor


class DenoisingObjective(Objective[DenoisingBatch]):
    """E over sigma, noise of w(sigma) |D(x + sigma n; sigma) - x|^2 with w = (sigma^2 + sd^2) / (sigma sd)^2.

    Args:
        denoiser: The model under training, EDM-preconditioned.
        trainable: Its network with the optimiser and the average; with techniques, `techniques.together(network)`.
        load: `load(indices, flips) -> (images, condition)`, on the CPU.
        noise: Law of the noise level.
        condition_dropout: Chance per sample to train without its condition.
        mirror: Mirror half of the samples.
        weighting: "edm": w as above. "flow": w = ((1 + sigma) / sigma)^2, which makes it the loss of flow matching on the linear
            path between data and noise, |v - (n - x)|^2, with t = sigma / (1 + sigma); its usual law of t, logit-normal, is
            ln sigma ~ N(0, 1) (Esser et al. 2024, arXiv:2403.03206, eq. 19).
        preview_noise: Unit noise (N, C, H, W) and `preview_condition` for the grids; None draws none.
        techniques: What else the network learns, or sees; they have prepared already.

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
        weighting: str = "edm",
        preview_noise: Tensor | None = None,
        preview_condition: Condition | None = None,
        techniques: Techniques | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.trainable = trainable
        self.load = load
        self.noise = noise
        self.condition_dropout = condition_dropout
        self.mirror = mirror
        if weighting not in WEIGHTINGS:
            raise ConfigError(f"the weighting of denoising must be one of {WEIGHTINGS}, got {weighting!r}.")
        self.weighting = weighting
        self.preview_noise = preview_noise
        self.preview_condition = preview_condition or Condition()
        self.techniques = techniques or Techniques()
        self._averaged: nn.Module | None = None

    def trainables(self) -> Mapping[str, Trainable]:
        return {"teacher": self.trainable}

    def receive_averages(self, averages: Mapping[str, nn.Module]) -> None:
        self._averaged = averages.get("teacher")

    def batch(self, indices: Tensor, random: StepRandom) -> DenoisingBatch:
        flips = random.uniform("flip") < (0.5 if self.mirror else 0.0)
        images, condition = self.load(indices, flips)
        if condition.batch_size is not None:
            condition = condition.drop_rows(random.uniform("condition") < self.condition_dropout)
        return DenoisingBatch(images, condition, indices, flips)

    def losses(self, name: str, batch: DenoisingBatch, random: StepRandom, runtime: Runtime) -> Losses:
        images = batch.images.to(runtime.device)
        sigma = self.noise.draw(random.normal("sigma")).to(runtime.device)
        noise = random.normal("noise", *images.shape[1:]).to(runtime.device)
        inputs = NoisyInputs(
            images=images,
            noise=noise,
            sigma=sigma,
            quantile=self.noise.quantile(sigma),
            condition=batch.condition.to(runtime.device),
            indices=batch.indices,
            flips=batch.flips,
        )
        inputs = self.techniques.perturb(inputs, random)
        with self.techniques.watch(self.network) as watched:
            denoised, taps = self._denoise(inputs, self.techniques.taps(random.step))
        images, sigma, data_std = inputs.images, inputs.sigma, self.denoiser.sigma_data
        edm = (sigma**2 + data_std**2) / (sigma * data_std) ** 2
        weight = ((1 + sigma) / sigma) ** 2 if self.weighting == "flow" else edm
        loss = weight * (denoised - images).square().flatten(1).mean(1)  # (B,)
        total, named = loss.mean(), {"denoising": loss}
        if self.techniques.members:
            penalties = self.techniques.penalties(
                inputs,
                random,
                runtime,
                noise_input=self.denoiser.noise_input(sigma),
                taps=taps,
                watched=watched,
                network=self.network,
                averaged=self._averaged,
            )
            for key, penalty in penalties.items():
                named[key] = penalty.value
                if penalty.weight:
                    total = total + penalty.weight * penalty.value.mean()
        return Losses(total, named)

    @property
    def network(self) -> DiffusersNetwork:
        """The network under training, without what techniques train beside it."""
        return network_of(self.trainable.module)

    def _denoise(self, inputs: NoisyInputs, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The estimate of the clean images, and the outputs of the named parts."""
        noisy = inputs.images + per_sample(inputs.sigma, inputs.images) * inputs.noise
        if not names and inputs.class_shift is None:
            return self.denoiser(noisy, inputs.sigma, inputs.condition), {}
        denoiser, found = self.denoiser, {}
        if names:
            recording = RecordingNetwork(self.network, names)
            denoiser = EDMDenoiser(
                recording, sigma_data=self.denoiser.sigma_data, noise_scale=self.denoiser.noise_scale
            )
            found = recording.found
        with shift_class_embedding(self.network, inputs.class_shift):
            return denoiser(noisy, inputs.sigma, inputs.condition), found

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        if self.preview_noise is None:
            return None
        network = averaged["teacher"]
        if isinstance(network, TrainedTogether):
            network = network.network
        training = network.training
        network.eval()
        model = EDMDenoiser(network, sigma_data=self.denoiser.sigma_data, noise_scale=self.denoiser.noise_scale)
        device = next(network.parameters()).device
        with torch.no_grad():
            images = sample(model, self.preview_noise.to(device), condition=self.preview_condition.to(device))
        network.train(training)
        return images
