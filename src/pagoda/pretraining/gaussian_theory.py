"""What perturbing the condition does to a model whose optimum is known: a mixture of Gaussians and a linear denoiser.

One class has n samples of N(mu, I); their empirical mean is m and their covariance (divided by n) is S. A denoiser that is
linear in x_t and in the one-hot class, trained with noise of std gamma on the one-hot vector and sampled along the
probability-flow ODE without it, generates N(m / (1 + gamma^2), A). The paper has A = S + k |m|^2 I with
k = gamma^2 / (1 + gamma^2). The exact least-squares optimum has A = S + k m m^T: the two agree in one dimension only.

Source: Chen et al. 2024, arXiv:2405.20494, section 4 and appendix A; the exact form is ours, from the normal equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pagoda.errors import ConfigError


@dataclass(frozen=True)
class GaussianLaw:
    """A Gaussian.

    Attributes:
        mean: (d,).
        covariance: (d, d).
    """

    mean: Tensor
    covariance: Tensor

    def entropy_gain(self, other: GaussianLaw) -> Tensor:
        """How much larger this law's differential entropy is than the other's, in nats."""
        return 0.5 * (torch.logdet(self.covariance) - torch.logdet(other.covariance))

    def wasserstein_squared(self, mean: Tensor) -> Tensor:
        """Squared 2-Wasserstein distance to N(mean, I): |m - mean|^2 + sum over eigenvalues of (sqrt(e) - 1)^2."""
        eigenvalues = torch.linalg.eigvalsh(self.covariance).clamp_min(0)
        return (self.mean - mean).square().sum() + (eigenvalues.sqrt() - 1).square().sum()


def perturbed_law(samples: Tensor, gamma: float, formula: Literal["exact", "paper"] = "exact") -> GaussianLaw:
    """What a model trained on `samples` (n, d) of one class with noise of size `gamma` on the class generates.

    Raises:
        ConfigError: a negative gamma, or an unknown formula.
    """
    if gamma < 0:
        raise ConfigError(f"gamma must be >= 0, got {gamma}.")
    if formula not in ("exact", "paper"):
        raise ConfigError(f"formula must be exact or paper, got {formula!r}.")
    mean = samples.mean(0)
    centred = samples - mean
    covariance = centred.T @ centred / len(samples)
    k = gamma**2 / (1 + gamma**2)
    added = torch.outer(mean, mean) if formula == "exact" else mean.square().sum() * torch.eye(len(mean)).to(mean)
    return GaussianLaw(mean / (1 + gamma**2), covariance + k * added)
