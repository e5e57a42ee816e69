"""Denoisers known in closed form, on which solvers, inversion and losses are tested exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.diffusion.conditions import Condition
from pagoda.diffusion.denoiser import Denoiser, per_sample
from pagoda.diffusion.solvers import expand_sigma


class GaussianDenoiser(Denoiser):
    """Data N(mean, std^2) per pixel, independent: D(x; s) = (std^2 x + s^2 mean) / (std^2 + s^2).

    Args:
        mean: Mean image, broadcasts against (B, C, H, W).
        std: Standard deviation, likewise, > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | float, std: Tensor | float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        s2 = per_sample(sigma, x) ** 2
        variance = self.std.to(x) ** 2
        return (variance * x + s2 * self.mean.to(x)) / (variance + s2)

    def flow_map(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Where the exact ODE carries `x` from `sigma` to `sigma_next`. Source: arXiv:2510.21890."""
        mean, variance = self.mean.to(x), self.std.to(x) ** 2
        return mean + ((variance + sigma_next**2) / (variance + sigma**2)).sqrt() * (x - mean)


class GaussianMixtureDenoiser(Denoiser):
    """Data from a mixture of isotropic Gaussians: posterior-weighted Gaussian denoisers.

    A label in the condition restricts the mixture to the components of that class, so that conditional and guided
    fields are exact too; the null label means the whole mixture.

    Args:
        means: (K, C, H, W).
        stds: (K,), > 0.
        weights: (K,), > 0; normalised here. Equal when None.
        labels: Class of each component, (K,) int64; one class each when None.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    labels: Tensor

    def __init__(
        self, means: Tensor, stds: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        super().__init__()
        count = len(means)
        weights = torch.ones(count, dtype=means.dtype) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("labels", torch.arange(count) if labels is None else labels)

    def posterior(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Probability of each component given the noisy image, (B, K)."""
        variance = self.stds.to(x)[None] ** 2 + sigma[:, None] ** 2  # (B, K)
        distance = (x[:, None] - self.means.to(x)[None]).flatten(2).square().sum(-1)  # (B, K)
        dim = x[0].numel()
        logits = self.log_weights.to(x) - distance / (2 * variance) - dim / 2 * variance.log()
        if condition.label is not None:
            other = (self.labels[None] != condition.label[:, None]) & (condition.label[:, None] >= 0)
            logits = logits.masked_fill(other, -torch.inf)
        return logits.softmax(-1)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        s2 = expand_sigma(sigma, x)[:, None] ** 2  # (B, 1, 1, 1, 1)
        variance = self.stds.to(x).reshape(1, -1, 1, 1, 1) ** 2
        each = (variance * x[:, None] + s2 * self.means.to(x)[None]) / (variance + s2)  # (B, K, C, H, W)
        weight = self.posterior(x, sigma, condition)
        return torch.einsum("bk,bkchw->bchw", weight, each)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` images of the mixture and their labels."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[component] + per_sample(self.stds[component], noise) * noise, self.labels[component]
