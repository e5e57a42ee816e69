"""Where in a generator's noise an image lies, the ways between such places, and a call whose rows do not see each other.

Every place is a blend of the noise of seeds, so that what was found by walking can be written down and found again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import OneStepGenerator
from pagoda.networks.guidance import check_guidance_range
from pagoda.stages.sampling import check_labels, check_texts
from pagoda.training import derive_seed, noise_of_seeds

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class LatentPoint:
    """A blend of the noise of seeds: sum of w_i n_i over sqrt(sum of w_i^2), which is unit Gaussian noise again.

    A single seed gives `noise_of_seeds`, bit for bit.

    Args:
        seeds: One or more, each 0 to 2^63 - 1.
        weights: One per seed, finite; those of 0 are not drawn. All equal when empty.
        truncation: Threshold in standard deviations that noise is brought below, or None for noise as it is. Every value keeps
            its rank: the law of z becomes that of a truncated Gaussian, without drawing again.

    Raises:
        ConfigError: no seed, one out of range, another number of weights, weights that are all 0, a threshold not above 0.

    Source: Brock, Donahue and Simonyan 2019, BigGAN, arXiv:1809.11096, section 3.1 (the truncation trick, there by drawing again).
    """

    seeds: tuple[int, ...]
    weights: tuple[float, ...] = ()
    truncation: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("a point needs at least one seed, got none.")
        wrong = [seed for seed in self.seeds if not 0 <= seed <= MAX_SEED]
        if wrong:
            raise ConfigError(f"seeds must lie in 0..{MAX_SEED}, got {wrong[0]}.")
        if self.weights and len(self.weights) != len(self.seeds):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.seeds)} seeds; give one per seed.")
        if self.weights and not (all(map(math.isfinite, self.weights)) and any(self.weights)):
            raise ConfigError(f"weights must be finite and not all 0, got {self.weights}.")
        if self.truncation is not None and not self.truncation > 0:
            raise ConfigError(f"truncation must be > 0 standard deviations, got {self.truncation}.")

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Noise of this shape, float32, on the CPU."""
        weights = self.weights or (1.0,) * len(self.seeds)
        kept = [(seed, weight) for seed, weight in zip(self.seeds, weights, strict=True) if weight]
        length = math.sqrt(sum(weight * weight for _, weight in kept))
        drawn = noise_of_seeds([seed for seed, _ in kept], shape)
        z = drawn[0]
        if len(kept) > 1 or kept[0][1] < 0:
            share = torch.tensor([weight / length for _, weight in kept]).reshape(-1, *[1] * len(shape))
            z = (share * drawn).sum(0)
        return z if self.truncation is None else truncate(z, self.truncation)


def truncate(z: Tensor, threshold: float) -> Tensor:
    """Unit Gaussian values carried by rank to a Gaussian cut at +-`threshold`: Phi^-1(a + (1 - 2 a) Phi(z)), a = Phi(-threshold)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    wide = z.double()
    below = normal.cdf(torch.tensor(-threshold, dtype=torch.float64))
    # The lower half is mapped and mirrored: near 1 a distribution function has no digits left.
    lower = below + (1 - 2 * below) * normal.cdf(-wide.abs())
    return (-wide.sign() * normal.icdf(lower)).clamp(-threshold, threshold).to(z.dtype)


def walk(corners: Sequence[int], across: float, down: float = 0.0, *, truncation: float | None = None) -> LatentPoint:
    """A point on the way between two seeds, or inside of the square of four (left to right, then the lower row).

    The way is an arc: every point of it is as likely a noise as its ends, which are met exactly.

    Args:
        corners: Two or four seeds.
        across: 0 at the left to 1 at the right.
        down: 0 at the top to 1 at the bottom; of four corners only.
        truncation: See `LatentPoint`.

    Raises:
        ConfigError: another number of corners, or a position outside of [0, 1].
    """
    if len(corners) not in (2, 4):
        raise ConfigError(f"a walk goes between 2 or 4 images, got {len(corners)}.")
    if len(corners) == 2 and down:
        raise ConfigError(f"between two images there is no `down`, got {down}; pick four.")
    for name, value in (("across", across), ("down", down)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {value}.")
    (left, right), (top, bottom) = _arc(across), _arc(down)
    weights = (left, right) if len(corners) == 2 else (left * top, right * top, left * bottom, right * bottom)
    return LatentPoint(seeds=tuple(corners), weights=weights, truncation=truncation)


def variation(point: LatentPoint, index: int, strength: float) -> LatentPoint:
    """A neighbour of a point: turned towards noise of its own by `strength` quarter turns.

    Args:
        point: The centre.
        index: Which neighbour.
        strength: 0 is the point itself, 1 has nothing in common with it.

    Raises:
        ConfigError: a strength outside of [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"the strength of a variation must lie in [0, 1], got {strength}.")
    near, far = _arc(strength)
    weights = point.weights or (1.0,) * len(point.seeds)
    length = math.sqrt(sum(weight * weight for weight in weights))
    other = derive_seed("variation", *point.seeds, index)
    return LatentPoint(
        seeds=(*point.seeds, other),
        weights=(*(near * weight / length for weight in weights), far),
        truncation=point.truncation,
    )


def _arc(position: float) -> tuple[float, float]:
    """Cosine and sine of a quarter turn, exact at its ends."""
    if position in (0, 1):
        return 1.0 - position, float(position)
    return math.cos(position * math.pi / 2), math.sin(position * math.pi / 2)


@torch.no_grad()
def render_points(
    generator: OneStepGenerator,
    points: Sequence[LatentPoint],
    labels: Sequence[int] | None,
    *,
    condition: Condition | None = None,
    sizes: Sequence[int] | None = None,
    guidance: float = 1.0,
) -> dict[int, Tensor]:
    """Images of points at one or more sizes, by one call of the generator (two with guidance that it was not trained for).

    Args:
        points: One per image.
        labels: One class per image, or None (a class by the first seed of each where the generator has classes).
        condition: Embedded texts, one row per point, for a generator that reads them.
        sizes: Sides of the images; the largest when None. All of them come out of the same call.
        guidance: The weight, from 1 to its `guidance_max`, of a generator that was trained with weights; of others w in
            G_w = G_null + w (G - G_null). 1 is the generator itself, bit for bit.

    Returns:
        Side -> images (N, C, side, side) in [-1, 1], on the CPU; of a generator of latents, decoded.

    Raises:
        ConfigError: labels or texts that do not fit, guidance where there are neither, or a weight outside of the range that was
            trained.
        ShapeError: a size that the generator does not have.
    """
    first = [point.seeds[0] for point in points]
    labels = check_labels(labels, first, generator.num_classes)
    check_texts(condition, first, generator)
    if guidance != 1 and labels is None and condition is None:
        raise ConfigError(f"guidance is between classes and none; this generator has no classes, got {guidance}.")
    if not math.isfinite(guidance):
        raise ConfigError(f"the guidance weight must be finite, got {guidance}.")
    wanted = [generator.size] if sizes is None else list(sizes)
    missing = [size for size in wanted if size not in generator.sizes]
    if missing or not wanted:
        raise ShapeError(
            f"no level of this generator makes {missing or 'images of no size'}; accepted are {generator.sizes}."
        )
    like = next(generator.parameters())
    shape = (generator.channels, generator.base_size, generator.base_size)
    z = torch.stack([point.noise(shape) for point in points]).to(like)
    told = (Condition.of_labels(labels) if condition is None else condition).to(like.device)
    if generator.guidance_max is not None:
        check_guidance_range(guidance, guidance, generator.guidance_max)
        told, guidance = replace(told, guidance=torch.full((len(points),), guidance, device=like.device)), 1.0
    if len(wanted) == 1:
        made = {wanted[0]: generator(z, told, resolution=wanted[0])}
    else:
        made = generator(z, told, resolution=max(wanted), return_all=True)
    if guidance != 1:
        plain = generator(z, told.null(), resolution=max(wanted), return_all=True)
        made = {size: plain[size] + guidance * (made[size] - plain[size]) for size in wanted}
    return {size: generator.pictures(made[size]).cpu() for size in wanted}


def rows_are_independent(generator: OneStepGenerator, batch_size: int) -> bool:
    """Whether a batch of this size gives each row the same bits whatever the other rows hold and wherever it stands.

    Sums in another order move last bits. With the batch size fixed, most libraries keep the order of each row; this tries it on
    the first, a middle and the last row, at every size.
    """
    points = [LatentPoint(seeds=(seed,)) for seed in range(batch_size)]
    together = render_points(generator, points, None, sizes=generator.sizes)
    for row in {0, batch_size // 2, batch_size - 1}:
        alone = render_points(generator, [points[row]] * batch_size, None, sizes=generator.sizes)
        for size, images in alone.items():
            if not all(torch.equal(image, together[size][row]) for image in images):
                return False
    return True
