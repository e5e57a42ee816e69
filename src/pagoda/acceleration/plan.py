"""Plans: what each step of a sampling run computes anew, reuses, or leaves out, laid down before the run.

A `Plan` holds settings. `plan.lay_out(num_steps)` is a pure function of them and of the number of steps: a `Layout`, which can be printed
and tested. `accelerate` carries a layout out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

from pagoda.errors import ConfigError
from pagoda.networks import Anatomy

Kind = Literal["full", "reused", "batched", "skipped", "sparse"]
KINDS: dict[str, str] = {
    "full": "everything is computed",
    "reused": "some parts are computed, the features of the others are those of an earlier step",
    "batched": "nothing is computed: the output was made together with that of its key step",
    "skipped": "nothing is computed: the output is that of an earlier step",
    "sparse": "some tokens are computed, the outputs, keys and values of the others are those of an earlier step",
}
"""What the kinds of step mean."""
STREAMS = ("conditional", "unconditional")


@dataclass(frozen=True)
class PlannedStep:
    """What one step computes.

    Attributes:
        index: Its place in the run, 0 = noisiest.
        kind: One of `KINDS`.
        skips: U-Nets: how many skips are computed from this step's own input, the stem's first. None = all, and the middle; 0 =
            none, the encoder does not run. DiTs: None or 0.
        branch: U-Nets: where the decoder enters with kept features, before it takes the skip of that number. None = it starts
            from the middle.
        decodes: Steps whose decoder runs in this step, itself first; later ones are `batched`.
        tokens: Share of the tokens that are computed.
        inject: How much of the run's initial noise is added to the state before its update.
        keeps_control: A ControlNet is not run; what it gave at the last full step is used again.
    """

    index: int
    kind: Kind = "full"
    skips: int | None = None
    branch: int | None = None
    decodes: tuple[int, ...] = ()
    tokens: float = 1.0
    inject: float = 0.0
    keeps_control: bool = False

    def kind_of(self, stream: str) -> Kind:
        """The kind of step for "conditional" or "unconditional": no plan here treats them differently."""
        if stream not in STREAMS:
            raise ConfigError(f"unknown stream {stream!r}; accepted: {', '.join(STREAMS)}.")
        return self.kind

    @property
    def reads_encoder(self) -> bool:
        """Whether skips and middle of an earlier step are read."""
        return self.kind == "reused" and self.skips == 0 and self.branch is None

    def describe(self) -> str:
        """What is computed, in words."""
        if self.kind in ("batched", "skipped"):
            text = "-"
        elif self.kind == "sparse":
            text = f"{self.tokens:.1%} of the tokens"
        elif self.kind == "full":
            text = "everything"
        else:
            encoder = "" if not self.skips else f"skips 0 to {self.skips - 1}, "
            text = encoder + ("decoder" if self.branch is None else f"decoder from branch {self.branch}")
        if len(self.decodes) > 1:
            text += f"; decoder of steps {self.decodes[0]} to {self.decodes[-1]} in one batch"
        if self.inject:
            text += f"; {self.inject:g} of the initial noise added"
        return text


@dataclass(frozen=True)
class Layout:
    """A plan laid out over a number of steps. `print` it to see what will happen."""

    plan: str
    steps: tuple[PlannedStep, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> PlannedStep:
        return self.steps[index]

    @property
    def full(self) -> list[int]:
        """Indices of the full steps."""
        return [step.index for step in self.steps if step.kind == "full"]

    @property
    def neutral(self) -> bool:
        """Whether this is the plain run."""
        return all(step.kind == "full" and len(step.decodes) <= 1 and not step.inject for step in self.steps)

    def counts(self) -> dict[str, int]:
        """Number of steps of each kind that occurs."""
        found: Counter[str] = Counter(step.kind for step in self.steps)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def branches(self) -> list[int]:
        """Branches at which features are kept."""
        return sorted({step.branch for step in self.steps if step.branch is not None})

    def last_reader(self, index: int) -> int:
        """The last step that reads what step `index`, or an earlier one, has kept; -1 if none does."""
        end = index
        for step in self.steps[index + 1 :]:
            if step.kind == "full" and step.skips is None:
                break
            end = step.index
        return end if end > index else -1

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("step", *STREAMS, "computed")]
        rows += [(str(s.index), *(s.kind_of(stream) for stream in STREAMS), s.describe()) for s in self.steps]
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.plan}, {len(self.steps)} steps", *lines])


class Plan(ABC):
    """How a sampling run is made cheaper. Subclasses are frozen dataclasses of settings."""

    @property
    def name(self) -> str:
        """The method's name."""
        return type(self).__name__

    def __str__(self) -> str:
        """The method and the settings that differ from its defaults."""
        pairs = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value, default in pairs if value != default)})"

    @property
    def rank(self) -> int:
        """Plans of higher rank are laid on top of others."""
        return 0

    @abstractmethod
    def lay_out(self, num_steps: int) -> Layout:
        """What each of `num_steps` steps computes; a pure function.

        Raises:
            ConfigError: too few steps for these settings.
        """

    @abstractmethod
    def check(self, parts: Anatomy) -> None:
        """Refuse a network that this plan cannot be carried out on.

        Raises:
            ConfigError: naming the network and what is accepted.
        """

    def combine(self, layout: Layout) -> Layout:
        """This plan on top of the layout of another one.

        Raises:
            ConfigError: the two contradict each other.
        """
        raise ConfigError(f"{self.name} does not combine with {layout.plan.split('(')[0]}; give one of them.")


def lay_out(plans: Sequence[Plan], num_steps: int) -> Layout:
    """One layout of one or several plans.

    Raises:
        ConfigError: no step at all, too few steps for a plan, or plans that contradict each other.
    """
    if num_steps < 1:
        raise ConfigError(f"a run needs one step or more, got {num_steps}.")
    check_combination(plans)
    first, *others = sorted(plans, key=lambda plan: plan.rank)
    layout = first.lay_out(num_steps)
    for plan in others:
        layout = plan.combine(layout)
    return layout


def check_combination(plans: Sequence[Plan]) -> None:
    """Refuse plans that contradict each other, before any run.

    Raises:
        ConfigError: no plan, the same method twice, or methods that do not combine.
    """
    if not plans:
        raise ConfigError("no plan was given; give a DeepCache, FasterDiffusion or RAS.")
    for plan in plans:
        if not isinstance(plan, Plan):
            raise ConfigError(f"{plan!r} is no plan; give a DeepCache, FasterDiffusion or RAS.")
    names = [plan.name for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]} was given twice; which settings are meant? Give it once.")
    if len(plans) > 1 and "RAS" in names:
        other = next(name for name in names if name != "RAS")
        raise ConfigError(
            f"RAS does not combine with {other}: one keeps keys and values of single tokens, the other whole features."
        )


def window(start: float, end: float, num_steps: int) -> range:
    """Indices from a share `start` of the steps up to a share `end`."""
    return range(round(start * num_steps), round(end * num_steps))


def injecting(steps: Sequence[PlannedStep], scale: float, start: float) -> tuple[PlannedStep, ...]:
    """The steps with noise injection in those from a share `start` on."""
    first = start * len(steps)
    return tuple(replace(step, inject=scale if step.index >= first else 0.0) for step in steps)


def check_indices(what: str, indices: Sequence[int]) -> None:
    """Refuse lists of steps that do not rise from 0.

    Raises:
        ConfigError: no 0 at the beginning, not rising, or not whole numbers.
    """
    rising = all(a < b for a, b in pairwise(indices))
    if not indices or any(type(k) is not int for k in indices) or indices[0] != 0 or not rising:
        raise ConfigError(f"{what}: indices of steps must rise strictly from 0, got {list(indices)}.")
