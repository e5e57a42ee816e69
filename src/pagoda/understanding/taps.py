"""Features of a frozen diffusion model: outputs of named parts at any noise level, pooled, as tokens or as maps.

The network runs part by part (see `networks.anatomy`) and stops after the last part that was asked for. Nothing is hooked, no
weight and no mode is left changed, so that the model's own outputs are the same bits before and after.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.diffusion import UNCONDITIONAL, Condition, Denoiser
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.files import hash_json
from pagoda.networks import anatomy, model_hash
from pagoda.networks.anatomy import features
from pagoda.training import derive_seed, noise_of_seeds
from pagoda.understanding.levels import check_sigmas, noise_range

Pool = Literal["mean", "grid", "tokens", "map"]
"""mean: (B, C). grid: means over g x g windows, (B, C g g). tokens: (B, h w, C). map: (B, C, h, w)."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Where features come from. Heads remember it, and refuse features of another model, part or noise level."""

    model: str
    """Hash of the network's weights."""
    tap: str
    """Name of the part."""
    sigma: float
    """Canonical noise level."""
    pool: Pool = "mean"
    grid: int = 2
    """Windows a side of the pool `grid`; 2 for every other pool."""
    seed: int = 0
    """Decides the noise of each image, with the image's own number."""
    draws: int = 1
    """Noises that are averaged over."""


@dataclass(frozen=True)
class TapInfo:
    """A part that can be tapped."""

    name: str
    channels: int
    stride: int
    """Factor by which the part's output is smaller than the input."""


class Taps:
    """Features of one model: named parts, one or more noise levels, one kind of pooling.

    Args:
        denoiser: A denoiser around one network that has an anatomy (`EDMDenoiser`, `ScheduledDenoiser`).
        names: Parts, such as `encoder.2`, `middle`, `decoder.1`, `block.7`; see `describe_taps`.
        pool: What is made of a map; computed in float32.
        grid: Windows a side for the pool `grid`.
        seed: Decides the noise, with the number of each image.
        draws: Noises a feature is averaged over.
        sigma_range: Noise levels that are accepted; those the model was trained for when None.
        encode: Turns images into what the network reads, for models of latents; None reads images.

    Raises:
        ConfigError: a denoiser without a network to read, an unknown part (the nearest are named), an unknown pool.

    Source: Xiang et al. 2023, DDAE, arXiv:2303.09769; Mukhopadhyay et al. 2023, arXiv:2307.08702.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        names: Sequence[str],
        *,
        pool: Pool = "mean",
        grid: int = 2,
        seed: int = 0,
        draws: int = 1,
        sigma_range: tuple[float, float] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if pool not in get_args(Pool):
            raise ConfigError(f"unknown pool {pool!r}; accepted are {', '.join(get_args(Pool))}.")
        if grid < 1 or draws < 1:
            raise ConfigError(f"grid and draws must be at least 1, got {grid} and {draws}.")
        self.denoiser = denoiser
        self.network = network_of(denoiser)
        self.names = [_check_name(self.network, name) for name in names]
        if not self.names:
            raise ConfigError(f"no part was named; choose some of {', '.join(anatomy(self.network).names())}.")
        self.pool, self.seed, self.draws, self.encode = pool, seed, draws, encode
        self.grid = grid if pool == "grid" else 2
        self.sigma_range = noise_range(denoiser) if sigma_range is None else sigma_range
        self._hash: str | None = None

    def __call__(
        self,
        images: Tensor,
        sigmas: float | Sequence[float] | Tensor,
        *,
        seeds: Sequence[int] | None = None,
        noise: Tensor | None = None,
        condition: Condition = UNCONDITIONAL,
        grad: bool = False,
    ) -> dict[str, Tensor]:
        """Features of a batch.

        All noise levels go through the network together, in one call of B x levels x draws rows.

        Args:
            images: (B, C, H, W) in [-1, 1]; latents, if there is no `encode` and the model reads latents.
            sigmas: One noise level, or several.
            seeds: A number for each image that decides its noise, so that its features do not depend on its batch.
            noise: Unit noise in place of `seeds`, shaped like what the network reads, or with `draws` in front of it.
            condition: One row per image; nothing means that the model gets no class.
            grad: Keep the graph, to differentiate features by images or weights.

        Returns:
            By part: features of `pool`, with the levels in front where several were given.

        Raises:
            ConfigError: a noise level that the model does not know; both or neither of `seeds` and `noise`.
            ShapeError: seeds, noise or condition do not fit the images.
        """
        several = isinstance(sigmas, Sequence) or (isinstance(sigmas, Tensor) and sigmas.ndim > 0)
        levels = check_sigmas(sigmas, self.sigma_range)
        if (seeds is None) == (noise is None):
            raise ConfigError("give `seeds`, a number for each image, or `noise`; one of the two.")
        with reading(self.denoiser), torch.set_grad_enabled(grad):
            clean = images if self.encode is None else self.encode(images)
            if noise is None:
                assert seeds is not None
                noise = self.noise(seeds, tuple(clean.shape[1:])).to(clean)
            noise = noise if noise.ndim == clean.ndim + 1 else noise[None]
            if noise.shape != (self.draws, *clean.shape):
                raise ShapeError(f"noise must be {(self.draws, *clean.shape)}, got {tuple(noise.shape)}.")
            if condition.batch_size not in (None, len(clean)):
                raise ShapeError(f"the condition has {condition.batch_size} rows for {len(clean)} images.")
            maps = self._walk(clean, levels, noise, condition)
        return {name: value if several else value[0] for name, value in maps.items()}

    def _walk(self, clean: Tensor, levels: list[float], noise: Tensor, condition: Condition) -> dict[str, Tensor]:
        count, copies = len(clean), len(levels) * self.draws
        sigma = torch.tensor(levels, dtype=clean.dtype, device=clean.device)
        sigma = sigma[:, None, None].expand(-1, self.draws, count)  # (L, draws, B)
        x = (clean + sigma.reshape(*sigma.shape, *[1] * (clean.ndim - 1)) * noise).flatten(0, 2)
        scaled, time = self._network_input(x, sigma.flatten())
        rows = condition if copies == 1 else condition.map(lambda value: value.repeat(copies, *[1] * (value.ndim - 1)))
        maps = features(self.network, scaled, time, rows, names=list(dict.fromkeys(self.names)))
        pooled = {name: pool_map(value, self.pool, self.grid) for name, value in maps.items()}
        return {
            name: value.unflatten(0, (len(levels), self.draws, count)).mean(1) if self.draws > 1
            else value.unflatten(0, (len(levels), count))
            for name, value in pooled.items()
        }  # fmt: skip

    def _network_input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoiser: Any = self.denoiser
        result: tuple[Tensor, Tensor] = denoiser.network_input(x, sigma)
        return result

    def noise(self, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Unit noise (draws, B, *shape) of numbered images: the same whatever batch they come in."""
        return torch.stack(
            [
                noise_of_seeds([derive_seed("taps", self.seed, draw, seed) for seed in seeds], shape)
                for draw in range(self.draws)
            ]
        )

    def spec(self, name: str, sigma: float) -> FeatureSpec:
        """Where the features of a part at a noise level come from."""
        if name not in self.names:
            raise ConfigError(f"`{name}` is not tapped here; these are: {', '.join(self.names)}.")
        if self._hash is None:
            self._hash = model_hash(self.network)
        return FeatureSpec(
            model=self._hash, tap=name, sigma=float(sigma), pool=self.pool, grid=self.grid, seed=self.seed, draws=self.draws
        )  # fmt: skip

    def fingerprint(self, sigmas: Sequence[float]) -> str:
        """Hash of everything that decides the features of an image, apart from the image and its number."""
        return hash_json([vars(self.spec(name, sigma)) for name in self.names for sigma in sigmas])


def pool_map(value: Tensor, pool: Pool, grid: int = 2) -> Tensor:
    """A map (B, C, h, w) as features (see `Pool`), in float32 at least, so that means of half precision do not overflow.

    Raises:
        ShapeError: the pool `grid` has more windows than the map has pixels.
    """
    value = value if value.dtype == torch.float64 else value.float()
    if pool == "mean":
        return value.mean((2, 3))
    if pool == "grid":
        if grid > min(value.shape[-2:]):
            raise ShapeError(f"a map of {tuple(value.shape[-2:])} cannot be pooled to {grid} x {grid}; lower `grid`.")
        return F.adaptive_avg_pool2d(value, grid).flatten(1)
    return value.flatten(2).transpose(1, 2) if pool == "tokens" else value


def describe_taps(denoiser: Denoiser) -> list[TapInfo]:
    """Every part of a denoiser's network that can be tapped, in the order in which they run.

    Raises:
        ConfigError: a denoiser without a network to read, or a network without an anatomy.
    """
    parts = anatomy(network_of(denoiser))
    return [TapInfo(name, parts.channels(name), parts.level(name)) for name in parts.names()]


def network_of(denoiser: Denoiser) -> nn.Module:
    """The network inside a denoiser.

    Raises:
        ConfigError: the denoiser has none of its own, as guidance, ensembles and oracles.
    """
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module) or not hasattr(denoiser, "network_input"):
        raise ConfigError(
            f"`{type(denoiser).__name__}` has no network of its own that could be read. Give the denoiser that wraps the "
            "network itself, an `EDMDenoiser` or a `ScheduledDenoiser`; of a guided one, the model inside."
        )
    return network


@contextlib.contextmanager
def reading(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is in the mode that it was in, after an error too."""
    before = [(part, part.training) for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def check_features(values: Tensor, what: str = "features") -> None:
    """Refuse features that are not finite.

    Raises:
        DataError: NaN or infinity; the first rows are named.
    """
    finite = values.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise DataError(
            f"{what} of {len(rows)} of {len(values)} images hold NaN or infinity, first in rows {rows[:5]}. The model has "
            "diverged, or the images are not finite; in half precision read the model in float32."
        )


def _check_name(network: nn.Module, name: str) -> str:
    known = anatomy(network).names()
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ConfigError(
        f"there is no part `{name}` in this network. Nearest: {', '.join(f'`{n}`' for n in near)}; it has {known[0]} to {known[-1]}, "
        f"{len(known)} in all (see `describe_taps`)."
    )
