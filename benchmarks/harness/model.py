"""What a benchmark is made of: arms, results, pass lines stated beforehand."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pagoda.errors import ConfigError, did_you_mean

Arm = Callable[[int], Mapping[str, float]]
"""One contestant: a seed -> named numbers. Names say the unit: `seconds`, `peak_mib`, `images_per_s`."""


class Results:
    """Every value that was measured, by arm, metric and seed; what pass lines are computed from."""

    def __init__(self, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        self._runs = runs

    def values(self, arm: str, metric: str) -> list[float]:
        """One value per seed, in the order of the seeds.

        Raises:
            ConfigError: there is no such arm, or it has no such metric.
        """
        if arm not in self._runs:
            raise ConfigError(f"the benchmark has no arm `{arm}`. {did_you_mean(arm, self._runs)}")
        rows = self._runs[arm]
        for row in rows:
            if metric not in row:
                raise ConfigError(f"arm `{arm}` has no metric `{metric}`. {did_you_mean(metric, row)}")
        return [float(row[metric]) for row in rows]

    def median(self, arm: str, metric: str) -> float:
        """Median over the seeds."""
        return statistics.median(self.values(arm, metric))

    def unequal(self, arms: Iterable[str], metric: str) -> float:
        """The largest median of several arms over the smallest: 1 where they took the same, of seconds for instance."""
        medians = [self.median(arm, metric) for arm in arms]
        return max(medians) / min(medians)

    def min(self, arm: str, metric: str) -> float:
        """Smallest value over the seeds."""
        return min(self.values(arm, metric))

    def max(self, arm: str, metric: str) -> float:
        """Largest value over the seeds."""
        return max(self.values(arm, metric))


@dataclass(frozen=True)
class PassLine:
    """One statement that a benchmark is to confirm or refute, made before it runs.

    Args:
        text: The statement in words.
        value: The number that it is about, from the results.
        at_most: Upper bound, included; none when None.
        at_least: Lower bound, included; none when None.

    Raises:
        ConfigError: there is no bound, so that the line could not fail.
    """

    text: str
    value: Callable[[Results], float]
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.at_most is None and self.at_least is None:
            raise ConfigError(f"the pass line {self.text!r} has neither at_most nor at_least: it could not fail.")

    def holds(self, value: float) -> bool:
        """Whether the number lies within the bounds; a NaN lies nowhere."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return above and below and value == value


@dataclass(frozen=True)
class Benchmark:
    """A question, the arms that answer it and the lines that they are held to.

    `arms` receives the budget, the share of the full steps or samples that may be spent: 1 is what is published. `module` is the one
    that registered it, which a process of its own imports to find it again; `arms` may come from a helper in another.
    """

    name: str
    question: str
    passes: tuple[PassLine, ...]
    arms: Callable[[float], dict[str, Arm]]
    module: str = ""


REGISTRY: dict[str, Benchmark] = {}


def benchmark(
    name: str, *, question: str, passes: Sequence[PassLine]
) -> Callable[[Callable[[float], dict[str, Arm]]], Callable[[float], dict[str, Arm]]]:
    """Register a function of the budget that returns the arms by name.

    Raises:
        ConfigError: the name is taken.
    """

    module: str = sys._getframe(1).f_globals["__name__"]  # as `namedtuple` finds the module that it is called in

    def register(function: Callable[[float], dict[str, Arm]]) -> Callable[[float], dict[str, Arm]]:
        if name in REGISTRY:
            raise ConfigError(f"there are two benchmarks called `{name}`.")
        REGISTRY[name] = Benchmark(name, question, tuple(passes), function, module)
        return function

    return register
