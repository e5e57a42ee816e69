"""When a candidate may be dropped before all noise levels are spent: fixed numbers to keep, or a stated risk."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from pagoda.errors import ConfigError


class Elimination(ABC):
    """Stages of an evaluation: after how many levels to look, and who stays then."""

    @abstractmethod
    def stages(self, num_levels: int) -> list[int]:
        """Levels evaluated in all at the end of each stage; rising, the last is `num_levels` or fewer."""

    @abstractmethod
    def survivors(self, errors: Tensor, alive: Tensor, stage: int, num_levels: int) -> Tensor:
        """Who stays.

        Args:
            errors: (B, K, n) of the levels so far; meaningless where `alive` is False.
            alive: bool (B, K).
            stage: Index of the stage that has just ended.
            num_levels: Levels of the full evaluation.

        Returns:
            bool (B, K), a part of `alive` with at least one candidate an image.
        """


@dataclass(frozen=True)
class Full(Elimination):
    """Everybody stays to the end."""

    def stages(self, num_levels: int) -> list[int]:
        return [num_levels]

    def survivors(self, errors: Tensor, alive: Tensor, stage: int, num_levels: int) -> Tensor:
        return alive


@dataclass(frozen=True)
class KeepBest(Elimination):
    """After `levels` noise levels the `keep` best stay, stage by stage: ((50, 5), (500, 1)).

    Raises:
        ConfigError: the stages do not rise, or keep more than before, or do not end with 1.

    Source: Li et al. 2023, Diffusion Classifier, arXiv:2303.16203, algorithm 2. There the grids of the stages are evenly spaced by
    themselves and overlap by chance; here they nest by construction, so that nothing is evaluated in vain.
    """

    schedule: tuple[tuple[int, int], ...] = ((16, 4), (64, 1))

    def __post_init__(self) -> None:
        levels, keep = [n for n, _ in self.schedule], [k for _, k in self.schedule]
        rising = all(a < b for a, b in pairwise(levels)) and bool(levels) and levels[0] >= 1
        falling = all(a >= b for a, b in pairwise(keep))
        if not (rising and falling and keep[-1] == 1):
            raise ConfigError(f"stages must rise in levels, fall in candidates and end with 1, got {self.schedule}.")

    def stages(self, num_levels: int) -> list[int]:
        last = self.schedule[-1][0]
        if last > num_levels:
            raise ConfigError(f"the schedule wants {last} noise levels, the grid has {num_levels}.")
        return [levels for levels, _ in self.schedule]

    def survivors(self, errors: Tensor, alive: Tensor, stage: int, num_levels: int) -> Tensor:
        mean = errors.mean(2).masked_fill(~alive, torch.inf)
        order = mean.argsort(dim=1, stable=True)[:, : self.schedule[stage][1]]  # ties: the first candidate stays
        kept = torch.zeros_like(alive).scatter_(1, order, True)
        return kept & alive


@dataclass(frozen=True)
class AtRisk(Elimination):
    """Drop a candidate when its paired errors exceed the leader's by more than chance allows.

    After each stage, the differences to the leader at the n levels so far have mean d and standard error
    s sqrt(1/n - 1/M): the M levels of the full evaluation are a finite population, of which n were drawn. s^2 is moderated: the mean
    variance of the image's rivals counts for `prior` more differences, since a variance of four is hardly one. A candidate goes when
    d > t s.e., t the quantile of Student's law with n - 1 + prior degrees of freedom at `risk`, divided by what chance could pick from
    (Bonferroni: the looks, times the rivals that are still there, one of which leads). So the chance, per image, that the answer of
    the full evaluation is dropped is at most about `risk`, as far as differences are normal; since levels are stratified, it is
    smaller in practice.

    Args:
        risk: In (0, 1).
        first: Levels of the first look, at least 3.
        growth: Each look comes after this many times the levels of the one before, > 1.
        prior: Weight of the rivals' mean variance, in degrees of freedom; 0 judges each rival by its own.

    Raises:
        ConfigError: a value out of range.

    Source of the moderated variance: Smyth 2004, Linear models and empirical Bayes methods, section 3.
    """

    risk: float = 0.01
    first: int = 4
    growth: float = 1.6
    prior: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.risk < 1 or self.first < 3 or self.growth <= 1 or self.prior < 0:
            raise ConfigError(
                "need 0 < risk < 1, first >= 3, growth > 1 and prior >= 0, "
                f"got {self.risk}, {self.first}, {self.growth} and {self.prior}."
            )

    def stages(self, num_levels: int) -> list[int]:
        found, at = [], float(self.first)
        while math.ceil(at) < num_levels:
            found.append(math.ceil(at))
            at = max(at * self.growth, at + 1)
        return [*found, num_levels]

    def survivors(self, errors: Tensor, alive: Tensor, stage: int, num_levels: int) -> Tensor:
        seen = errors.shape[2]
        mean = errors.mean(2).masked_fill(~alive, torch.inf)
        leader = mean.argmin(1)  # (B,)
        gap = errors - errors[torch.arange(len(errors)), leader][:, None]  # (B, K, n)
        rivals = alive.clone()
        rivals[torch.arange(len(errors)), leader] = False
        others = rivals.sum(1).clamp_min(1)
        degrees, own = seen - 1 + self.prior, gap.var(2)
        shared = own.masked_fill(~rivals, 0.0).sum(1) / others
        variance = ((seen - 1) * own + self.prior * shared[:, None]) / degrees
        looks = max(1, len(self.stages(num_levels)) - 1)
        bounds = [student_quantile(1 - self.risk / (looks * count), degrees) for count in others.tolist()]
        spread = (variance * max(0.0, 1 / seen - 1 / num_levels)).sqrt()
        worse = rivals & (gap.mean(2) > gap.new_tensor(bounds)[:, None] * spread)
        return alive & ~worse


@lru_cache(maxsize=1024)
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection of its distribution function.

    Raises:
        ConfigError: a probability outside (0, 1), or fewer than one degree of freedom.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ConfigError(f"need 0 < probability < 1 and degrees >= 1, got {probability} and {degrees}.")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_cdf(value: float, degrees: int) -> float:
    """P(T <= value) for Student's t with a whole number of degrees of freedom.

    Source: Abramowitz and Stegun 1964, eq. 26.7.3 and 26.7.4, the finite sums in theta = atan(t / sqrt(degrees)).
    """
    theta = math.atan(value / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    term, total = (cosine if degrees % 2 else 1.0), 0.0
    for k in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    inside = 2 / math.pi * (theta + sine * total) if degrees % 2 else sine * total
    return (1 + inside) / 2


def count_calls(elimination: Elimination, num_levels: int, alive_at: Sequence[int]) -> int:
    """Network calls an image when `alive_at[s]` candidates enter stage s."""
    stages = elimination.stages(num_levels)
    return sum(alive * (end - start) for alive, start, end in zip(alive_at, [0, *stages], stages, strict=False))
