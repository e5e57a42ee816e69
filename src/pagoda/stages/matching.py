"""Distribution matching: samples of the prior follow the difference between the teacher's score and that of the samples themselves.

    x = G(z, c),  z ~ N(0, I),    y = x + sigma n,  ln sigma ~ U(ln sigma_min, ln sigma_max)
    dL_M/dx = (D_fake(y; sigma, c) - D(y; sigma, c)) / mean |x - D(y; sigma, c)|

D is the teacher, under the guidance weight of the sample where there is one. D_fake starts as its copy and learns to denoise the
samples, in every step in which the generator moves, so that the difference is sigma^2 times that of the two scores: the gradient of
KL(samples | teacher) at noise level sigma. No image is needed, and nothing is tied to single latents: this is what tells a generator
about the noise between few encoded images.

Source: Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv:2311.18828, eq. 7 and 8 (its gradient, with
a normaliser of its own for each sample); the term without it is that of Luo et al. 2023, Diff-Instruct, arXiv:2305.18455. Neither is a
part of PaGoDA, whose samples are told by a discriminator alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, PreconditionedDenoiser, per_sample
from pagoda.networks import DiffusersNetwork
from pagoda.networks.calling import disable_dropout
from pagoda.networks.guided_network import GuidedNetwork
from pagoda.stages.config import MatchingConfig
from pagoda.stages.guidance import guided
from pagoda.training import StepRandom, Trainable

_SMALLEST = 1e-3
"""Of the normaliser, so that a sample that the teacher would hardly change is not pulled without bound."""


@dataclass(frozen=True)
class Pull:
    """Where samples should move, and what the copy learns from the same noise.

    Attributes:
        gradient: Of the term with respect to the samples (B, C, H, W): its mean over samples and pixels is descended.
        size: Mean absolute gradient of each sample (B,): the figure to log, 0 where the two estimates agree.
        denoising: EDM's denoising loss of the copy (B,), with its graph.
    """

    gradient: Tensor
    size: Tensor
    denoising: Tensor


class DistributionMatching:
    """The teacher, its copy that learns the samples, and the gradient between the two.

    Args:
        teacher: Frozen here.
        config: Weight, noise levels, and the optimiser of the copy.
        steps: Steps of the stage.
        sigma_data: Standard deviation of the data, for the weight of noise levels in the copy's loss.
        guidance_max: Largest guidance weight of the samples, which follow the guided teacher and whose weight the copy is told (by an
            embedding that is drawn from torch's global generator); None for a run without guidance.
    """

    def __init__(
        self,
        teacher: PreconditionedDenoiser,
        config: MatchingConfig,
        steps: int,
        sigma_data: float,
        guidance_max: float | None = None,
    ) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        self.fake = copy.deepcopy(teacher).requires_grad_(True).train()
        network = self.fake.network
        assert isinstance(network, nn.Module)
        disable_dropout(network)  # else the copy differs from the teacher by more than what it learned
        if guidance_max is not None:
            assert isinstance(network, DiffusersNetwork)
            self.fake.network = GuidedNetwork(network, guidance_max).to(next(network.parameters()).device)
        self.config = config
        self.sigma_data = sigma_data
        self.first_step = round(config.start * steps)
        self.ramp_steps = round(config.ramp * steps)

    def is_due(self, step: int) -> bool:
        """Whether a step has the term."""
        return step >= self.first_step

    def weight(self, step: int) -> float:
        """Of the gradient in a step that has the term: rises in a straight line over the ramp, from 0 in the first one."""
        if self.ramp_steps == 0:
            return self.config.weight
        return self.config.weight * min(1.0, (step - self.first_step) / self.ramp_steps)

    @property
    def trainable(self) -> Trainable:
        """The copy."""
        network = self.fake.network
        assert isinstance(network, nn.Module)
        return Trainable(network, self.config.optimizer)

    def pull(self, samples: Tensor, condition: Condition, random: StepRandom) -> Pull:
        """The gradient at samples (B, C, H, W), which need no gradient themselves, and the copy's loss on them."""
        samples, config = samples.detach(), self.config
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        sigma = (low + (high - low) * random.uniform("matching-sigma")).exp().to(samples)
        noise = random.normal("matching-noise", *samples.shape[1:]).to(samples)
        noisy = samples + per_sample(sigma, samples) * noise
        with torch.no_grad():
            real = guided(self.teacher, condition)(noisy, sigma, condition).float()
        fake = self.fake(noisy, sigma, condition).float()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoising = weight * (fake - samples).square().flatten(1).mean(1)
        distance = (samples - real).abs().flatten(1).mean(1).clamp_min(_SMALLEST)
        gradient = (fake.detach() - real) / per_sample(distance, samples)
        return Pull(gradient, gradient.abs().flatten(1).mean(1), denoising)
