"""Semantic directions: what a denoiser's Jacobian moves most, inside a mask and as little as possible outside of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pagoda.diffusion import UNCONDITIONAL, Condition, Denoiser, Solver, karras_sigmas, solve
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.files import load_tensors, save_tensors
from pagoda.understanding.jacobian import DenoiserJacobian, check_mask
from pagoda.understanding.taps import reading


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit directions of the canonical state at one noise level; they add, scale, and move other images too.

    Attributes:
        vectors: (r, C, H, W), each of unit norm unless scaled or added.
        gains: (r,), how far the estimate of the image inside the mask moves per unit step along each.
        sigma: Noise level that they belong to.
        mask: bool (C, H, W), what they were made to move.
    """

    vectors: Tensor
    gains: Tensor
    sigma: float
    mask: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> Directions:
        """One of them."""
        return replace(self, vectors=self.vectors[index][None], gains=self.gains[index][None])

    def __mul__(self, strength: float) -> Directions:
        """All of them `strength` times as long."""
        return replace(self, vectors=strength * self.vectors, gains=strength * self.gains)

    def __add__(self, other: Directions) -> Directions:
        """Both moves in one: vectors of the same number and noise level are added.

        Raises:
            ConfigError: another noise level.
            ShapeError: another number or shape.
        """
        if abs(self.sigma - other.sigma) > 1e-9 * self.sigma:
            raise ConfigError(
                f"directions at sigma {self.sigma:.4g} and {other.sigma:.4g} do not add; make both at one level."
            )
        if self.vectors.shape != other.vectors.shape:
            raise ShapeError(f"directions of {tuple(self.vectors.shape)} and {tuple(other.vectors.shape)} do not add.")
        return Directions(
            self.vectors + other.vectors, (self.gains**2 + other.gains**2).sqrt(), self.sigma, self.mask | other.mask
        )

    def save(self, path: Path | str) -> None:
        """Write them as one safetensors file."""
        tensors = {"vectors": self.vectors, "gains": self.gains, "mask": self.mask.to(torch.uint8)}
        save_tensors(path, tensors, {"pagoda_directions": json.dumps({"sigma": self.sigma})})

    @classmethod
    def load(cls, path: Path | str) -> Directions:
        """What `save` wrote.

        Raises:
            ArtifactError: something else.
        """
        tensors, metadata = load_tensors(path)
        try:
            sigma = float(json.loads(metadata["pagoda_directions"])["sigma"])
            return cls(tensors["vectors"], tensors["gains"], sigma, tensors["mask"].bool())
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"`{path}` holds no directions of pagoda ({error!r}).") from error


def find_directions(
    denoiser: Denoiser,
    state: Tensor,
    sigma: float,
    *,
    mask: Tensor | None = None,
    rank: int = 3,
    null_rank: int = 5,
    condition: Condition = UNCONDITIONAL,
    tolerance: float = 1e-3,
) -> Directions:
    """Top right singular vectors of the Jacobian's rows inside of a mask, without what moves the rest most.

    Args:
        state: Canonical state (1, C, H, W) at `sigma`, such as `to_level` gives.
        sigma: Noise level; LOCO-Edit takes 0.5 to 0.7 of a VP schedule's time, that is sigma of about 1 to 4.
        mask: bool, broadcasts to (C, H, W); None means the whole image, and nothing is projected away.
        rank: Directions.
        null_rank: Directions of the rest that are projected away; 0 projects nothing.
        condition: One row, or nothing.
        tolerance: Of the singular vectors.

    Raises:
        ConfigError: an empty mask, or a full one with `null_rank` > 0: there is no rest that could stay as it is.

    Source: Chen et al. 2024, LOCO-Edit, arXiv:2409.02374, algorithm 1.
    """
    shape = tuple(state.shape[-3:])
    full = torch.ones(shape, dtype=torch.bool) if mask is None else check_mask(mask.cpu(), shape)
    inside = DenoiserJacobian(denoiser, state, sigma, condition=condition, mask=full)
    vectors = inside.svd(rank, tolerance=tolerance).v  # (n, r)
    if mask is not None and null_rank > 0:
        if bool(full.all()):
            raise ConfigError(
                "the mask selects everything, so no rest could stay as it is; give mask=None or null_rank=0."
            )
        outside = DenoiserJacobian(denoiser, state, sigma, condition=condition, mask=~full)
        null = outside.svd(null_rank, tolerance=tolerance).v
        vectors = vectors - null @ (null.T @ vectors)
        lengths = vectors.norm(dim=0)
        if float(lengths.min()) < 1e-3:
            raise ConfigError(
                "what moves the masked part moves the rest just as well; lower null_rank or change the mask."
            )
        vectors = vectors / lengths
    gains = inside.jvp(vectors).norm(dim=0)
    return Directions(vectors.T.reshape(-1, *shape).to(state), gains, float(sigma), full)


@torch.no_grad()
def to_level(
    denoiser: Denoiser,
    images: Tensor,
    sigma: float,
    *,
    condition: Condition = UNCONDITIONAL,
    sigma_min: float = 0.02,
    steps: int = 16,
    solver: Solver | None = None,
) -> Tensor:
    """Images carried up to a noise level by the ODE (deterministic, so that `from_level` brings them back).

    Raises:
        ConfigError: not sigma_min < sigma.
    """
    with reading(denoiser):
        return solve(denoiser, images, _grid(sigma_min, sigma, steps).flip(0), condition=condition, solver=solver)


@torch.no_grad()
def from_level(
    denoiser: Denoiser,
    states: Tensor,
    sigma: float,
    *,
    condition: Condition = UNCONDITIONAL,
    sigma_min: float = 0.02,
    steps: int = 16,
    solver: Solver | None = None,
) -> Tensor:
    """States at a noise level carried down to images by the ODE.

    Raises:
        ConfigError: not sigma_min < sigma.
    """
    with reading(denoiser):
        return solve(denoiser, states, _grid(sigma_min, sigma, steps), condition=condition, solver=solver)


def edit_images(
    denoiser: Denoiser,
    images: Tensor,
    directions: Directions,
    strengths: Sequence[float],
    *,
    condition: Condition = UNCONDITIONAL,
    sigma_min: float = 0.02,
    steps: int = 16,
) -> Tensor:
    """Images moved along the first direction: up to its noise level, a step, and down again.

    Strength 0 gives the round trip alone, which is the reference to compare with: what it loses is the solver's, not the edit's.

    Args:
        images: (B, C, H, W): those that the directions were found at, or others.
        directions: Found by `find_directions`.
        strengths: Steps in units of the state, of the order of sigma times a few; a unit direction of n values has norm 1, the noise
            there has norm sigma sqrt(n).

    Returns:
        (len(strengths), B, C, H, W).

    Raises:
        ShapeError: directions of another shape than the images.
    """
    if directions.vectors.shape[1:] != images.shape[1:]:
        raise ShapeError(
            f"directions of {tuple(directions.vectors.shape[1:])} do not fit images of {tuple(images.shape[1:])}."
        )
    states = to_level(denoiser, images, directions.sigma, condition=condition, sigma_min=sigma_min, steps=steps)
    step = directions.vectors[:1].to(states)
    return torch.stack(
        [
            from_level(
                denoiser, states if strength == 0 else states + strength * step, directions.sigma,
                condition=condition, sigma_min=sigma_min, steps=steps,
            )
            for strength in strengths
        ]
    )  # fmt: skip


def _grid(sigma_min: float, sigma: float, steps: int) -> Tensor:
    return karras_sigmas(steps + 1, sigma_min=sigma_min, sigma_max=sigma)
