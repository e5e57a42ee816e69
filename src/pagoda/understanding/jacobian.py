"""The Jacobian of a denoiser, read by products with vectors only: singular triplets, numerical rank, intrinsic dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagoda.diffusion import UNCONDITIONAL, Condition, Denoiser
from pagoda.errors import ConfigError, ResourceError, ShapeError
from pagoda.training import noise_of_seeds
from pagoda.understanding.levels import check_sigmas, noise_range
from pagoda.understanding.taps import reading

_DENSE_LIMIT = 4096


@dataclass(frozen=True, eq=False)
class Triplets:
    """The k largest singular triplets of a matrix (m, n).

    Attributes:
        u: (m, k) left vectors. v: (n, k) right vectors. s: (k,) values, falling; all float64.
        residual: Largest |J^T u - s v| relative to the largest value.
        products: Products with vectors that it took, both ways counted.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    residual: float
    products: int


@dataclass(frozen=True)
class RankEstimate:
    """Numerical rank.

    Attributes:
        rank: The smallest r whose r largest values hold more than `eta` of the Frobenius norm.
        is_lower_bound: Whether the search ended at its limit before it found the rank.
        participation: (sum s^2)^2 / sum s^4 over the values that were found and what is left, a rank without a threshold.
        norm: Frobenius norm.
    """

    rank: int
    is_lower_bound: bool
    participation: float
    norm: float


class DenoiserJacobian:
    """J = dD(x; sigma) / dx at one image, or its rows inside of a mask.

    Products are computed for many vectors at a time, as rows of a batch, by reverse passes through a graph that is made once and kept as
    long as this object (PyTorch's forward mode does not know every layer of diffusers' networks). Attention runs in its plain form
    meanwhile, because fused kernels have no second derivative.

    Args:
        denoiser: Without operations that look across the batch.
        x: Canonical state (C, H, W) or (1, C, H, W).
        sigma: Its noise level.
        condition: One row, or nothing.
        mask: bool, broadcasts to (C, H, W); True = outputs that count. None counts all.
        batch_size: Vectors a pass; memory holds the activations of as many images.

    Raises:
        ShapeError: more than one image, or a mask that does not fit.
        ConfigError: an empty mask, or a noise level that the model does not know.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: float,
        *,
        condition: Condition = UNCONDITIONAL,
        mask: Tensor | None = None,
        batch_size: int = 16,
    ) -> None:
        x = x if x.ndim == 4 else x[None]
        if x.ndim != 4 or len(x) != 1 or condition.batch_size not in (None, 1):
            raise ShapeError(f"the Jacobian is taken at one image (C, H, W) with one condition, got {tuple(x.shape)}.")
        self.sigma = check_sigmas(sigma, noise_range(denoiser))[0]
        self.denoiser, self.x, self.condition, self.batch_size = denoiser, x.detach(), condition, batch_size
        self.shape = tuple(x.shape[1:])
        self.size = math.prod(self.shape)
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        self.mask: Tensor | None = None
        if mask is not None:
            self.mask = check_mask(mask, self.shape).to(x)

    def jvp(self, vectors: Tensor) -> Tensor:
        """J V, (n, k) float64, of V (n, k)."""
        return self._columns(vectors, True)

    def vjp(self, vectors: Tensor) -> Tensor:
        """J^T U, (n, k) float64, of U (n, k)."""
        return self._columns(vectors, False)

    def dense(self) -> Tensor:
        """The whole matrix (n, n), float64, for tests and small images.

        Raises:
            ResourceError: images of more than 4,096 values.
        """
        if self.size > _DENSE_LIMIT:
            raise ResourceError(
                f"a dense Jacobian of {self.size}^2 values is refused; use `svd`, which never makes it."
            )
        return self.jvp(torch.eye(self.size, dtype=torch.float64))

    def svd(
        self,
        rank: int,
        *,
        oversample: int = 5,
        tolerance: float = 1e-4,
        max_blocks: int = 30,
        seed: int = 0,
        start: Tensor | None = None,
    ) -> Triplets:
        """The `rank` largest singular triplets by randomised block Krylov iteration.

        Blocks J^T J V are orthogonalised against all before them; the values are those of J on the space that they span.

        Args:
            rank: k.
            oversample: Vectors a block beyond k.
            tolerance: Stop when |J^T u - s v| < tolerance * s_1 for all k.
            max_blocks: Stop there in any case; `residual` says how good it is.
            seed: Draws the start.
            start: Directions (n, j) to begin with, such as those of a neighbouring noise level.

        Raises:
            ConfigError: a rank outside of 1 .. n.

        Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061; Musco and Musco 2015, arXiv:1504.05477.
        """
        if not 1 <= rank <= self.size:
            raise ConfigError(f"the rank must lie in 1..{self.size}, got {rank}.")
        width = min(rank + oversample, self.size)
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(self.size, width, generator=generator, dtype=torch.float64)
        if start is not None:
            block[:, : min(width, start.shape[1])] = start[:, :width]
        basis = torch.linalg.qr(block).Q
        images = self.jvp(basis)  # J of every basis vector so far
        products, newest = width, images
        while True:
            u, s, zh = torch.linalg.svd(images, full_matrices=False)
            left, right = u[:, :rank], basis @ zh[:rank].T
            pulled = self.vjp(torch.cat([left, newest], 1))
            products += pulled.shape[1]
            error = (pulled[:, :rank] - right * s[:rank]).norm(dim=0).max() / s[0].clamp_min(1e-300)
            room = self.size - basis.shape[1]
            if float(error) < tolerance or room == 0 or basis.shape[1] >= max_blocks * width:
                return Triplets(left, s[:rank], right, float(error), products)
            block = pulled[:, rank:]
            for _ in range(2):  # twice is enough (Kahan and Parlett)
                block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block).Q[:, : min(width, room)]
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
            newest = self.jvp(block)
            products += block.shape[1]
            basis, images = torch.cat([basis, block], 1), torch.cat([images, newest], 1)

    def trace(self, *, probes: int = 32, seed: int = 0) -> float:
        """Trace of J by Hutchinson's estimate with random signs: the degrees of freedom that the denoiser keeps at this noise.

        For data on a d-dimensional manifold it is close to d where sigma is small against the data and large against the noise
        that the data themselves have.
        """
        signs = self._signs(probes, seed)
        return float((signs * self.jvp(signs)).sum(0).mean())

    def numerical_rank(
        self, *, eta: float = 0.99, start_rank: int = 16, max_rank: int = 256, probes: int = 16, seed: int = 0
    ) -> RankEstimate:
        """The smallest r with sqrt(s_1^2 + ... + s_r^2) > eta |J|_F.

        The largest values are found exactly; what they leave of |J|_F^2 is estimated from random vectors outside of their span
        (Hutch++, Meyer et al. 2021), whose variance is small because the large values are gone. The number of values doubles until they
        are enough.

        Args:
            eta: Share of the amplitude, in (0, 1).
            start_rank: Values to begin with.
            max_rank: Values to end with; the answer is then a lower bound.
            probes: Random vectors.

        Raises:
            ConfigError: eta outside (0, 1).

        Source: the definition of Wang et al. 2024, arXiv:2409.02426 (eta = 0.99 there).
        """
        if not 0 < eta < 1:
            raise ConfigError(f"eta must lie in (0, 1), got {eta}.")
        limit = min(max_rank, self.size)
        rank, start = min(start_rank, limit), None
        while True:
            found = self.svd(rank, tolerance=1e-3, max_blocks=4, seed=seed, start=start)
            energy = found.s.square()
            signs = self._signs(probes, seed)
            outside = signs - found.v @ (found.v.T @ signs)
            rest = float(self.jvp(outside).square().sum(0).mean()) if rank < self.size else 0.0
            total = float(energy.sum()) + rest
            cumulative = energy.cumsum(0).sqrt()
            enough = (cumulative > eta * math.sqrt(total)).nonzero().flatten()
            if len(enough) or rank == limit:
                # What is left is spread over the other directions; its fourth powers are small against those of the values found.
                left = self.size - rank
                fourth = float(energy.square().sum()) + (rest**2 / left if left else 0.0)
                participation = total**2 / fourth if fourth > 0 else 0.0
                reached = len(enough) > 0 or rank == self.size
                value = int(enough[0]) + 1 if len(enough) else rank
                return RankEstimate(value, not reached, participation, math.sqrt(total))
            rank, start = min(2 * rank, limit), found.v

    def _signs(self, probes: int, seed: int) -> Tensor:
        if probes < 1:
            raise ConfigError(f"probes must be at least 1, got {probes}.")
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randint(0, 2, (self.size, probes), generator=generator).double() * 2 - 1

    def _columns(self, vectors: Tensor, forward: bool) -> Tensor:
        if vectors.ndim != 2 or len(vectors) != self.size:
            raise ShapeError(f"vectors must be columns ({self.size}, k), got {tuple(vectors.shape)}.")
        parts = []
        for part in vectors.split(self.batch_size, 1):
            point, weights, output, pulled = self._graph(forward)
            rows = torch.zeros(self.batch_size, *self.shape, dtype=self.x.dtype, device=self.x.device)
            rows[: part.shape[1]] = part.T.reshape(-1, *self.shape).to(self.x)
            # J v is the derivative of J^T w by w, along v: two reverse passes, the first of which is kept.
            if forward:
                (product,) = torch.autograd.grad(pulled, weights, rows, retain_graph=True)
            else:
                (product,) = torch.autograd.grad(output, point, rows, retain_graph=True)
            parts.append(product[: part.shape[1]].flatten(1).T.double().cpu())
        return torch.cat(parts, 1)

    def _graph(self, second: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The network's graph at the image, `batch_size` times side by side, made once: every product is then a reverse pass alone.

        With `second`, the graph of J^T w as a function of w too.
        """
        if self._kept is None or (second and self._kept[3] is None):
            with reading(self.denoiser), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                point = self.x.expand(self.batch_size, -1, -1, -1).contiguous().requires_grad_(True)
                condition: Any = self.condition.map(lambda value: value.expand(self.batch_size, *value.shape[1:]))
                output = self.denoiser(point, self.sigma, condition)
                output = output if self.mask is None else self.mask * output
                weights = torch.zeros_like(output, requires_grad=True)
                pulled = None
                if second:
                    (pulled,) = torch.autograd.grad(output, point, weights, create_graph=True)
                self._kept = (point, weights, output, pulled)
        point, weights, output, kept = self._kept
        return point, weights, output, output if kept is None else kept


@dataclass(frozen=True, eq=False)
class RankProfile:
    """How many directions a denoiser keeps, over noise levels; each (L,) and a mean over images.

    Attributes:
        sigmas: L noise levels.
        rank: Numerical rank; where `is_lower_bound`, at least this.
        trace: Degrees of freedom kept.
        participation: Rank without a threshold.
    """

    sigmas: list[float]
    rank: Tensor
    is_lower_bound: Tensor
    trace: Tensor
    participation: Tensor
    size: int

    @property
    def intrinsic_dimension(self) -> float:
        """The smallest mean numerical rank over the levels where it is not a lower bound; NaN where there is none."""
        known = self.rank[~self.is_lower_bound]
        return float(known.min()) if len(known) else math.nan


def rank_profile(
    denoiser: Denoiser,
    images: Tensor,
    sigmas: Sequence[float],
    *,
    seeds: Sequence[int] | None = None,
    condition: Condition = UNCONDITIONAL,
    eta: float = 0.99,
    max_rank: int = 128,
    progress: Callable[[int], None] | None = None,
) -> RankProfile:
    """Numerical rank and trace of the Jacobian at noisy versions of images, level by level.

    Args:
        images: (B, C, H, W); a handful is enough.
        sigmas: Noise levels.
        seeds: A number for each image that decides its noise; 0, 1, ... when None.
        condition: One row per image, or nothing.
        eta: See `DenoiserJacobian.numerical_rank`.
        max_rank: Where the search for the rank ends.
        progress: Called with the number of Jacobians done.

    Raises:
        ConfigError: a noise level that the model does not know.
    """
    levels = check_sigmas(list(sigmas), noise_range(denoiser))
    noise = noise_of_seeds(list(range(len(images)) if seeds is None else seeds), tuple(images.shape[1:])).to(images)
    table = torch.zeros(4, len(levels), len(images), dtype=torch.float64)
    for i, sigma in enumerate(levels):
        for j in range(len(images)):
            row = condition[j : j + 1] if condition.batch_size is not None else condition
            jacobian = DenoiserJacobian(denoiser, images[j] + sigma * noise[j], sigma, condition=row)
            found = jacobian.numerical_rank(eta=eta, max_rank=max_rank)
            facts = [found.rank, found.is_lower_bound, jacobian.trace(), found.participation]
            table[:, i, j] = torch.tensor(facts, dtype=torch.float64)
            if progress is not None:
                progress(i * len(images) + j + 1)
    rank, bound, trace, participation = table
    return RankProfile(levels, rank.mean(1), bound.amax(1) > 0, trace.mean(1), participation.mean(1), images[0].numel())


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask as bool (C, H, W).

    Raises:
        ShapeError: it does not broadcast to the image.
        ConfigError: it selects nothing.
    """
    try:
        full = mask.bool().expand(shape)
    except RuntimeError as error:
        raise ShapeError(f"a mask of {tuple(mask.shape)} does not broadcast to images of {shape}.") from error
    if not bool(full.any()):
        raise ConfigError("the mask selects nothing; there is no direction that changes nothing.")
    return full
