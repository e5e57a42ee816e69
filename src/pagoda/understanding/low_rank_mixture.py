"""Mixtures of low-rank Gaussians: data on a union of subspaces, with the exact denoiser, score and density at every noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser, per_sample
from pagoda.errors import ConfigError, ShapeError


class LowRankMixture(Denoiser):
    """x_0 = U_k a + noise, a ~ N(0, diag(l_k)), k ~ weights: the data set and its denoiser E[x_0 | x] in one.

    With delta the std of the ambient noise and s the noise level, component k has D_k(x) = c x + U_k diag(r) U_k^T x, where
    c = delta^2 / (delta^2 + s^2) and r = (l + delta^2) / (l + delta^2 + s^2) - c; components are weighed by their posterior. A label in the
    condition restricts the mixture to one component.

    Args:
        bases: K matrices (n, d_k) with orthonormal columns, n = C H W.
        shape: (C, H, W) of one image.
        variances: l > 0: one number, or K tensors (d_k,).
        weights: (K,), > 0; normalised here, equal when None.
        noise: delta >= 0.

    Raises:
        ShapeError: bases that do not fit the shape.
        ConfigError: columns that are not orthonormal, or a value out of range.

    Source: Wang et al. 2024, arXiv:2409.02426, section 3 (there delta = 0 in the denoiser, l = 1).
    """

    def __init__(
        self,
        bases: Sequence[Tensor],
        shape: tuple[int, int, int],
        *,
        variances: float | Sequence[Tensor] = 1.0,
        weights: Tensor | None = None,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        if not bases or any(basis.ndim != 2 or len(basis) != size for basis in bases):
            raise ShapeError(f"bases must be matrices of {size} rows for images of {shape}.")
        for basis in bases:
            error = float((basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max())
            if error > 1e-4:
                raise ConfigError(
                    f"the columns of a basis must be orthonormal; they are off by {error:.2g}. Take a QR."
                )
        self.shape, self.noise = shape, noise
        self.ranks = [basis.shape[1] for basis in bases]
        spread = (
            [torch.full((d,), variances, dtype=bases[0].dtype) for d in self.ranks]
            if isinstance(variances, float)
            else list(variances)
        )
        if noise < 0 or any(bool((v <= 0).any()) for v in spread) or [len(v) for v in spread] != self.ranks:
            raise ConfigError("variances must be > 0, one for each direction, and the ambient noise >= 0.")
        weights = torch.ones(len(bases), dtype=bases[0].dtype) if weights is None else weights
        if weights.shape != (len(bases),) or bool((weights <= 0).any()):
            raise ConfigError(f"{len(bases)} components need as many weights > 0, got {weights.tolist()}.")
        self.register_buffer("basis", torch.cat(list(bases), 1))  # (n, sum of d_k)
        self.register_buffer("variance", torch.cat(spread))
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        owner = torch.repeat_interleave(torch.arange(len(bases)), torch.tensor(self.ranks))
        self.register_buffer("owner", owner)  # component of each column

    basis: Tensor
    variance: Tensor
    log_weights: Tensor
    owner: Tensor

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        ranks: Sequence[int],
        generator: torch.Generator,
        *,
        variances: float = 1.0,
        weights: Tensor | None = None,
        noise: float = 0.0,
        orthogonal: bool = True,
    ) -> LowRankMixture:
        """Random subspaces, orthogonal to each other unless told otherwise; float64.

        Raises:
            ConfigError: a rank below 1, or more dimensions in all than the images have.
        """
        size = math.prod(shape)
        if not ranks or min(ranks) < 1 or max(ranks) > size or (orthogonal and sum(ranks) > size):
            raise ConfigError(
                f"subspaces of {list(ranks)} dimensions do not fit {'side by side ' if orthogonal else ''}into {size}."
            )
        if orthogonal:
            gaussian = torch.randn(size, sum(ranks), generator=generator, dtype=torch.float64)
            bases = list(torch.linalg.qr(gaussian).Q.split(list(ranks), 1))
        else:
            bases = [torch.linalg.qr(torch.randn(size, d, generator=generator, dtype=torch.float64)).Q for d in ranks]
        return cls(bases, shape, variances=variances, weights=weights, noise=noise)

    @property
    def bases(self) -> list[Tensor]:
        """The K bases (n, d_k)."""
        return list(self.basis.split(self.ranks, 1))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` images (count, C, H, W) and the component of each, (count,) int64."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        code = torch.randn(count, len(self.owner), generator=generator, dtype=self.basis.dtype)
        code = code * self.variance.sqrt() * (self.owner == component[:, None])
        flat = code @ self.basis.T
        flat = flat + self.noise * torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
        return flat.reshape(count, *self.shape), component

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """ln p of states at noise level `sigma`, (B,): the density of x_0 + sigma n.

        Raises:
            ConfigError: neither ambient noise nor noise level is above 0, so that there is no density.
        """
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        if bool((level**2 + self.noise**2 <= 0).any()):
            raise ConfigError("a union of subspaces has no density without noise; give sigma > 0.")
        size = math.prod(self.shape)
        rest = level**2 + self.noise**2
        common = -x.flatten(1).square().sum(1) / (2 * rest) - size / 2 * (2 * math.pi * rest).log()
        return common + self._log_joint(x, level).logsumexp(1)

    def posterior(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Probability of each component given the noisy image, (B, K)."""
        joint = self._log_joint(x, sigma)
        if condition.label is not None:
            label = condition.label[:, None]
            other = (torch.arange(len(self.ranks), device=x.device)[None] != label) & (label >= 0)
            joint = joint.masked_fill(other, -torch.inf)
        return joint.softmax(1)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        basis, variance = self.basis.to(x), self.variance.to(x)
        rest = (sigma**2 + self.noise**2)[:, None]
        kept = self.noise**2 / rest  # (B, 1)
        gain = (variance + self.noise**2) / (variance + rest) - kept  # (B, sum d)
        code = x.flatten(1) @ basis * gain * self.posterior(x, sigma, condition)[:, self.owner]
        return (code @ basis.T).reshape(x.shape) + per_sample(kept, x) * x

    def _log_joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln of weight times likelihood of each component, up to what all share, (B, K)."""
        basis, variance = self.basis.to(x), self.variance.to(x)
        rest = (sigma**2 + self.noise**2)[:, None]
        code = (x.flatten(1) @ basis).square()
        each = (code * (1 / rest - 1 / (variance + rest)) - (1 + variance / rest).log()) / 2  # (B, sum d)
        total = torch.zeros(len(x), len(self.ranks), dtype=x.dtype, device=x.device).index_add(1, self.owner, each)
        return total + self.log_weights.to(x)
