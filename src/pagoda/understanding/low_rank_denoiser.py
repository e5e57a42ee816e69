"""The low-rank denoiser: a model of K subspaces whose training is subspace clustering."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, Denoiser, per_sample
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
        flat = x.flatten(1)
        code = torch.einsum("bn,knd->bkd", flat, bases)
        gain = self.variance / (self.variance + sigma**2)  # (B,)
        energy = code.square().sum(2)  # (B, K)
        if self.hard:
            weight = nn.functional.one_hot(energy.argmax(1), bases.shape[0]).to(x)
        else:
            weight = (energy * (gain / (2 * sigma**2))[:, None]).softmax(1)
        estimate = torch.einsum("bkd,knd->bn", code * weight[..., None], bases)
        return per_sample(gain, x) * estimate.reshape(x.shape)


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
    restarts: int = 8
    """Random starts; the one that denoises best is kept."""
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
    if data.ndim != 4 or len(data) == 0 or not bool(data.isfinite().all()):
        raise DataError(f"training needs finite images (N, C, H, W), got {tuple(data.shape)}.")
    data = data.double()
    shape = (data.shape[1], data.shape[2], data.shape[3])
    variance = float(data.flatten(1).square().sum(1).mean()) / config.rank
    best: tuple[float, LowRankDenoiser] | None = None
    for start in range(config.restarts):
        generator = torch.Generator().manual_seed(1000 * config.seed + start)
        model = LowRankDenoiser(shape, config.num_subspaces, config.rank, generator, variance=variance)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        tail = 0.0
        for step in range(config.steps):
            # Constant, because a direction that both subspaces share is a saddle that takes long to leave; down at the end.
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 4 * (1 - step / config.steps))
            model.hard = step >= config.hard_from * config.steps
            reach = (config.sigma_max / config.sigma_min) ** (0.5 if model.hard else 1.0)
            sigma = config.sigma_min * reach ** torch.rand(len(data), generator=generator, dtype=data.dtype)
            noise = torch.randn(data.shape, generator=generator, dtype=data.dtype)
            estimate = model(data + per_sample(sigma, data) * noise, sigma)
            loss = (estimate - data).square().sum() / len(data)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():  # judged without noise: what the subspaces leave out of the data
            bases = model.bases()
            energy = torch.einsum("bn,knd->bkd", data.flatten(1), bases).square().sum(2)
            tail = float((data.flatten(1).square().sum(1) - energy.amax(1)).mean())
        if best is None or tail < best[0]:
            best = (tail, model)
    if best is None:
        raise ConfigError(f"restarts must be at least 1, got {config.restarts}.")
    model = best[1].requires_grad_(False)
    return model, assign(data, list(model.bases()))
