"""The low-rank denoiser: a model of K subspaces whose training is subspace clustering."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, Denoiser
from pagoda.errors import ConfigError, DataError
from pagoda.understanding.subspaces import assign


class LowRankDenoiser(Denoiser):
    """D(x; s) = v / (v + s^2) sum_k w_k(x) U_k U_k^T x, with U_k orthonormal by QR at every call.

    Args:
        shape: (C, H, W) of one image.
        num_subspaces: K.
        rank: d, of every subspace.
        generator: Draws the start.
        hard: Weights are 1 for the subspace that holds most of x, as in the paper's equivalence; otherwise the posterior of a
            mixture of Gaussians with these subspaces, which lets gradients reach all of them.
        variance: v, of the data along each direction.

    Raises:
        ConfigError: a number that does not fit.

    Source: Wang et al. 2024, arXiv:2409.02426, eq. 8 and theorem 3.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_subspaces: int,
        rank: int,
        generator: torch.Generator,
        *,
        hard: bool = False,
        variance: float = 1.0,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        if num_subspaces < 1 or not 1 <= rank <= size or variance <= 0:
            raise ConfigError(
                f"need num_subspaces >= 1, 1 <= rank <= {size} and variance > 0, got {num_subspaces}, {rank}, {variance}."
            )
        self.shape, self.hard, self.variance = shape, hard, variance
        start = torch.randn(num_subspaces, size, rank, generator=generator, dtype=torch.float64)
        self.raw = nn.Parameter(torch.linalg.qr(start).Q)

    def bases(self) -> Tensor:
        """The orthonormal bases (K, n, d)."""
        return torch.linalg.qr(self.raw).Q

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        bases = self.bases().to(x)
        rows = low_rank_estimate(bases[None], x.flatten(1)[None], sigma[None], self.variance, hard=self.hard)
        return rows[0].reshape(x.shape)


def low_rank_estimate(bases: Tensor, x: Tensor, sigma: Tensor, variance: float, *, hard: bool) -> Tensor:
    """The denoised rows of several models at once.

    Args:
        bases: (R, K, n, d), the orthonormal bases of R models.
        x: (R, B, n).
        sigma: (R, B).
        variance: v, of the data along each direction.
        hard: See `LowRankDenoiser`.

    Returns:
        (R, B, n).
    """
    code = torch.einsum("rbn,rknd->rbkd", x, bases)
    gain = variance / (variance + sigma**2)
    energy = code.square().sum(3)  # (R, B, K)
    if hard:
        weight = nn.functional.one_hot(energy.argmax(2), bases.shape[1]).to(x)
    else:
        weight = (energy * (gain / (2 * sigma**2))[..., None]).softmax(2)
    return gain[..., None] * torch.einsum("rbkd,rknd->rbn", code * weight[..., None], bases)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """How a low-rank denoiser is trained."""

    num_subspaces: int
    """K."""
    rank: int
    """d."""
    steps: int = 600
    """Gradient steps of each start, on all samples at once."""
    lr: float = 0.05
    """Rate of Adam; falls to zero over the last quarter."""
    restarts: int = 20
    """Random starts, trained side by side; the one that denoises best is kept. As many as `k_subspaces` has."""
    sigma_min: float = 0.1
    """Noise levels are drawn evenly in ln sigma from here ..."""
    sigma_max: float = 1.0
    """... to here."""
    hard_from: float = 0.4
    """Share of the steps after which weights are hard, as in the paper's equivalence, and noise stays in the lower half of its range (in
    ln sigma): soft weights find the clusters, hard ones fit the subspaces."""
    seed: int = 0
    """Decides starts and noise."""


@torch.enable_grad()
def train_low_rank(data: Tensor, config: LowRankConfig) -> tuple[LowRankDenoiser, Tensor]:
    """Train by the denoising loss alone; labels are never seen.

    Args:
        data: (N, C, H, W).

    Returns:
        The denoiser, and the subspace of each sample (N,) int64: where most of its energy lies.

    Raises:
        DataError: no data, or data that are not finite.
        ConfigError: numbers that do not fit.
    """
    if config.restarts < 1 or config.steps < 1:
        raise ConfigError(f"steps and restarts must be at least 1, got {config.steps} and {config.restarts}.")
    if data.ndim != 4 or len(data) == 0 or not bool(data.isfinite().all()):
        raise DataError(f"training needs finite images (N, C, H, W), got {tuple(data.shape)}.")
    data = data.double()
    shape = (data.shape[1], data.shape[2], data.shape[3])
    flat = data.flatten(1)
    variance = float(flat.square().sum(1).mean()) / config.rank
    generators = [torch.Generator().manual_seed(1000 * config.seed + start) for start in range(config.restarts)]
    models = [
        LowRankDenoiser(shape, config.num_subspaces, config.rank, generator, variance=variance)
        for generator in generators
    ]
    # A start's noise and gradients are its own, so that more starts change nothing for the first ones.
    raw = nn.Parameter(torch.stack([model.raw.detach() for model in models]))
    optimizer = torch.optim.Adam([raw], lr=config.lr)
    for step in range(config.steps):
        # Constant, because a direction that both subspaces share is a saddle that takes long to leave; down at the end.
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 4 * (1 - step / config.steps))
        hard = step >= config.hard_from * config.steps
        reach = (config.sigma_max / config.sigma_min) ** (0.5 if hard else 1.0)
        drawn = [torch.rand(len(data), generator=generator, dtype=data.dtype) for generator in generators]
        noise = [torch.randn(flat.shape, generator=generator, dtype=data.dtype) for generator in generators]
        sigma = config.sigma_min * reach ** torch.stack(drawn)
        noisy = flat + sigma[..., None] * torch.stack(noise)
        estimate = low_rank_estimate(torch.linalg.qr(raw).Q, noisy, sigma, variance, hard=hard)
        loss = (estimate - flat).square().sum() / len(data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # judged without noise: what the subspaces leave out of the data
        energy = torch.einsum("bn,rknd->rbkd", flat, torch.linalg.qr(raw).Q).square().sum(3)
        best = int((flat.square().sum(1) - energy.amax(2)).mean(1).argmin())
        model = models[best].requires_grad_(False)
        model.raw.copy_(raw[best])
        model.hard = True
    return model, assign(data, list(model.bases()))
