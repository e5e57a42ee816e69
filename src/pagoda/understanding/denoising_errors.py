"""How well each condition explains an image: denoising errors under shared noise, the one quantity that the classifier uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser, per_sample
from pagoda.errors import ConfigError, ShapeError
from pagoda.training import derive_seed, noise_of_seeds
from pagoda.understanding.candidates import Candidates
from pagoda.understanding.levels import LevelGrid, check_sigmas, noise_range
from pagoda.understanding.taps import reading

Weighting = Literal["elbo", "eps", "edm", "x0"]
"""Weight of |D - x_0|^2 at a noise level, before the average over levels.

elbo: 1 / (sigma^2 q(ln sigma)), q the density of the levels: the average is -ln p(x | c) in nats up to a constant.
eps: 1 / sigma^2, the error of predicted noise, as in the paper. edm: (sigma^2 + s^2) / (sigma s)^2 with s = 0.5. x0: 1.
"""
Loss = Literal["l2", "l1"]

_EDM_STD = 0.5


@dataclass(frozen=True, kw_only=True)
class ErrorConfig:
    """Which error is compared."""

    weighting: Weighting = "eps"
    """See `Weighting`."""
    loss: Loss = "l2"
    """l2: sum over pixels of w d^2. l1: sum of sqrt(w) |d|, less sensitive to single pixels."""
    seed: int = 0
    """Decides the noise, with the number of each image."""
    share_noise: bool = False
    """All images get the same noise at each level. Cheaper to draw; errors of images are then no longer independent."""
    batch_size: int = 256
    """Rows of a network call; a row is one image with one candidate at one noise level."""

    def __post_init__(self) -> None:
        for name, accepted in (("weighting", get_args(Weighting)), ("loss", get_args(Loss))):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}.")


class DenoisingErrors:
    """Errors of one model for images, candidates and noise levels.

    The noise of an image at a level depends on the seed, the image's number and the level's place in the grid alone. So every
    candidate sees the same noise, and only the difference that the condition makes remains in a difference of errors.

    Args:
        denoiser: Any conditional denoiser. Guidance belongs off: it sharpens samples and spoils likelihoods.
        grid: Noise levels.
        config: Weights and noise.
        encode: Turns images into what the model reads; give the mean of a latent's posterior, not a draw.
        noise_range: Noise levels that are accepted; those the model was trained for when None.

    Raises:
        ConfigError: a noise level that the model does not know.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        grid: LevelGrid,
        config: ErrorConfig | None = None,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        sigma_range: tuple[float, float] | None = None,
    ) -> None:
        self.denoiser, self.grid = denoiser, grid
        self.config = config or ErrorConfig()
        self.encode = encode
        check_sigmas(grid.sigmas, noise_range(denoiser) if sigma_range is None else sigma_range)
        self.weights = level_weights(grid, self.config.weighting)

    @torch.no_grad()
    def pairs(
        self, clean: Tensor, seeds: Sequence[int], candidates: Candidates, wanted: Tensor, levels: Sequence[int]
    ) -> Tensor:
        """Errors of chosen pairs of image and candidate.

        Args:
            clean: What the model reads, (B, C, H, W).
            seeds: A number for each image.
            wanted: bool (B, K), the pairs.
            levels: Places in the grid.

        Returns:
            (P, len(levels)) float64 for the P pairs, in the order of `wanted.nonzero()`. P x len(levels) rows are computed.

        Raises:
            ShapeError: seeds or `wanted` do not fit.
        """
        if len(seeds) != len(clean) or wanted.shape != (len(clean), len(candidates)):
            raise ShapeError(
                f"{len(clean)} images need as many seeds and a table {(len(clean), len(candidates))}, got {len(seeds)} and "
                f"{tuple(wanted.shape)}."
            )
        which = wanted.nonzero()  # (P, 2)
        rows = torch.arange(len(which) * len(levels))
        noise = self._noise(seeds, levels, tuple(clean.shape[1:])).to(clean)  # (B, m, C, H, W)
        found = []
        with reading(self.denoiser):
            for part in rows.split(self.config.batch_size):
                pair, step = part // len(levels), part % len(levels)
                image, candidate = which[pair].unbind(1)
                place = torch.tensor(levels)[step]
                condition = candidates.condition[candidate].to(clean.device)
                found.append(
                    self._rows(
                        clean[image.to(clean.device)],
                        noise[image.to(noise.device), step.to(noise.device)],
                        place,
                        condition,
                    )
                )
        return torch.cat(found).reshape(len(which), len(levels)) if found else torch.zeros(0, len(levels)).double()

    def __call__(
        self, images: Tensor, candidates: Candidates, *, seeds: Sequence[int], levels: Sequence[int] | None = None
    ) -> Tensor:
        """Errors (B, K, M) float64 of every image under every candidate at every level (or at the places `levels`)."""
        clean = self.prepare(images)
        levels = range(len(self.grid)) if levels is None else levels
        wanted = torch.ones(len(clean), len(candidates), dtype=torch.bool)
        return self.pairs(clean, seeds, candidates, wanted, levels).reshape(len(clean), len(candidates), len(levels))

    def prepare(self, images: Tensor) -> Tensor:
        """Images as the model reads them."""
        with torch.no_grad(), reading(self.denoiser):
            return images if self.encode is None else self.encode(images)

    def _rows(self, clean: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        sigma = self.grid.sigmas[place].to(clean)
        estimate = self.denoiser(clean + per_sample(sigma, clean) * noise, sigma, condition)
        difference = (estimate - clean).double().flatten(1)
        weight = self.weights[place].to(difference.device)
        if self.config.loss == "l2":
            return (weight * difference.square().sum(1)).cpu()
        return (weight.sqrt() * difference.abs().sum(1)).cpu()

    def _noise(self, seeds: Sequence[int], levels: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Unit noise (B, m, *shape)."""
        numbers = [0] * len(seeds) if self.config.share_noise else list(seeds)
        drawn = {
            number: noise_of_seeds(
                [derive_seed("classify", self.config.seed, number, level) for level in levels], shape
            )
            for number in dict.fromkeys(numbers)
        }
        return torch.stack([drawn[number] for number in numbers])


def level_weights(grid: LevelGrid, weighting: Weighting) -> Tensor:
    """Weight of |D - x_0|^2 at each level of a grid, (M,) float64.

    With "elbo", the mean over levels estimates the integral of |D - x_0|^2 / sigma^2 over ln sigma, which is -ln p(x) in nats up to
    a constant that no condition changes (Guo, Shamai and Verdu 2005, pointwise; Kong et al. 2023, arXiv:2302.03792).
    """
    variance = grid.sigmas**2
    if weighting == "elbo":
        return 1 / (variance * grid.density)
    if weighting == "eps":
        return 1 / variance
    if weighting == "edm":
        return (variance + _EDM_STD**2) / (variance * _EDM_STD**2)
    return torch.ones_like(variance)
