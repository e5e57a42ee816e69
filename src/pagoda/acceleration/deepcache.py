"""DeepCache: run the deep part of a U-Net every N-th step only.

Deep features of the decoder move slowly from one step to the next. A full step keeps the features that are about to be joined with
the skip of one branch b; the steps in between compute only what lies outside of it: skips 0 to b, and the decoder from there on, with
their own image, time and condition. One tensor is kept for each stream.

Branches are numbered from the outside, as skips are: 0 is the stem's. The four official implementations number them differently:

| implementation | its argument | branch here |
|---|---|---|
| plug-in helper, `cache_branch_id` | i | i, where each block has two layers |
| patched Stable Diffusion, `cache_layer_id`, `cache_block_id` | (0, 0) | 1; the paper's setting for it |
| DDPM code, `branch` | i | i + 1 |
| LDM code | none | 0 |

The paper counts skip branches from 1: its m is b + 1.

Source: Ma, Fang and Wang, CVPR 2024, arXiv:2312.00858.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pagoda.acceleration.plan import Layout, Plan, PlannedStep, check_indices, window
from pagoda.errors import ConfigError
from pagoda.networks import Anatomy, UNetAnatomy

SCHEDULES = ("uniform", "center_power", "center_power_official")


@dataclass(frozen=True, kw_only=True)
class DeepCache(Plan):
    """Full steps every `interval` steps, reuse at one branch in between.

    Raises:
        ConfigError: a setting out of range; the message says which.
    """

    interval: int = 3
    """One step of so many is full; 1 is the plain run."""
    branch: int = 0
    """Skip at which the network is cut; deeper is slower and closer. See the table of the module for others' numbering."""
    schedule: str | Sequence[int] = "uniform"
    """Which steps are full: "uniform", "center_power" (the paper's equation 7), "center_power_official" (what its code computes), or
    their indices."""
    center: float | None = None
    """Step around which the full steps of a center-power schedule gather; None: 30 % of the steps (15 of 50)."""
    power: float = 1.4
    """How closely they gather; 1 is uniform."""
    start: float = 0.0
    """Share of the run before which every step is full. Later than 0 helps stochastic samplers."""
    end: float = 1.0
    """Share of the run from which on every step is full."""
    control: str = "every"
    """A ControlNet runs in every step ("every"), or in full steps only ("full"), its residuals then being reused."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"DeepCache: interval must be >= 1, got {self.interval}.")
        if self.branch < 0:
            raise ConfigError(f"DeepCache: branch must be >= 0, got {self.branch}.")
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ConfigError(
                f"DeepCache: unknown schedule {self.schedule!r}; accepted: {', '.join(SCHEDULES)}, or indices."
            )
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(self.schedule))
            check_indices("DeepCache: schedule", self.schedule)
        if self.power < 1:
            raise ConfigError(f"DeepCache: power must be >= 1, got {self.power}.")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(f"DeepCache: 0 <= start < end <= 1 is needed, got {self.start} and {self.end}.")
        if self.control not in ("every", "full"):
            raise ConfigError(f"DeepCache: control must be 'every' or 'full', got {self.control!r}.")

    @property
    def rank(self) -> int:
        return 1

    def full_steps(self, num_steps: int) -> list[int]:
        """Indices of the full steps.

        Raises:
            ConfigError: indices beyond the run, or fewer steps than one interval of a center-power schedule needs.
        """
        inside = window(self.start, self.end, num_steps)
        if not isinstance(self.schedule, str):
            beyond = [index for index in self.schedule if index >= num_steps]
            if beyond:
                raise ConfigError(
                    f"DeepCache: the schedule has step {beyond[0]}, the run has steps 0 to {num_steps - 1}."
                )
            chosen = set(self.schedule)
        elif self.schedule == "uniform" or self.interval == 1:
            chosen = set(inside[:: self.interval])
        else:
            count = math.ceil(len(inside) / self.interval)
            center = 0.3 * num_steps if self.center is None else self.center
            if not 0 <= center < num_steps:
                raise ConfigError(f"DeepCache: center must lie within the run of {num_steps} steps, got {center}.")
            rule = center_power if self.schedule == "center_power" else center_power_official
            chosen = {inside.start + k for k in rule(len(inside), count, center - inside.start, self.power)}
        if len(inside) > 0:
            chosen.add(inside.start)
        return sorted({*chosen, *(k for k in range(num_steps) if k not in inside)})

    def lay_out(self, num_steps: int) -> Layout:
        full = set(self.full_steps(num_steps))
        if 1 < num_steps <= self.interval and len(full) == 1 and self.schedule == "uniform":
            raise ConfigError(
                f"DeepCache: interval={self.interval} leaves one full step of {num_steps}; use a smaller interval or more steps."
            )
        return Layout(str(self), tuple(self._step(k, k in full) for k in range(num_steps)))

    def _step(self, index: int, full: bool) -> PlannedStep:
        if full:
            return PlannedStep(index)
        keeps = self.control == "full"
        return PlannedStep(index, "reused", skips=self.branch + 1, branch=self.branch, keeps_control=keeps)

    def combine(self, layout: Layout) -> Layout:
        """On top of Faster Diffusion: between full steps of this plan, its key steps compute the outer skips, its other steps none,
        and all decoders enter at the branch."""
        if any(len(step.decodes) > 1 for step in layout.steps):
            raise ConfigError(
                "DeepCache does not combine with decoders in one batch, which would all start from the middle; "
                "use FasterDiffusion(parallel=False)."
            )
        if any(step.kind == "skipped" for step in layout.steps):
            raise ConfigError(
                "DeepCache does not combine with FasterDiffusion(propagate='output'), which runs no decoder."
            )
        merged = []
        for mine, other in zip(self.lay_out(len(layout)).steps, layout.steps, strict=True):
            if mine.kind == "full":
                merged.append(other)
            elif other.kind == "full":
                merged.append(replace(mine, inject=other.inject))
            else:  # neither the encoder nor the deep part of the decoder
                merged.append(replace(other, branch=self.branch))
        return Layout(f"{self} + {layout.plan}", tuple(merged))

    def check(self, parts: Anatomy) -> None:
        if not isinstance(parts, UNetAnatomy):
            raise ConfigError(
                f"DeepCache needs a U-Net, `{type(parts.model).__name__}` has no skips to cut at; "
                "use RAS or FasterDiffusion for transformers."
            )
        count = sum(name.startswith("decoder.") for name in parts.names())
        if self.branch >= count:
            raise ConfigError(
                f"DeepCache: branch={self.branch} is out of range: `{type(parts.model).__name__}` has branches 0 to {count - 1}."
            )


def _signed_power(value: float, exponent: float) -> float:
    return math.copysign(abs(value) ** exponent, value)


def center_power(num_steps: int, count: int, center: float, power: float) -> list[int]:
    """`count` full steps (less where several fall together) that gather around `center`; 0 is always one of them.

    Source: Ma et al. 2024, equation 7.
    """
    low, high = _signed_power(-center, 1 / power), _signed_power(num_steps - center, 1 / power)
    grid = torch.linspace(low, high, count + 1, dtype=torch.float64)[:-1].tolist()
    return sorted({0, *(min(max(int(_signed_power(v, power) + center), 0), num_steps - 1) for v in grid)})


def center_power_official(num_steps: int, count: int, center: float, power: float) -> list[int]:
    """What the official code computes for `center_power`: a fractional power of a negative number is complex there, the grid runs through
    the complex plane, and only real parts are kept. Where steps fall together it lowers the power by 0.02 and tries again.

    Raises:
        ConfigError: no power above 1 gives `count` different steps.
    """
    center = int(center)
    while power > 1:
        low, high = complex(-center) ** (1 / power), complex(num_steps - center) ** (1 / power)
        grid = [low + (high - low) * k / count for k in range(count + 1)]
        powered = [cmath.exp(power * cmath.log(v)) if v != 0 else 0j for v in grid]
        whole = sorted({int(v.real) for v in powered})  # cut towards 0 before the center is added
        found = {0, *(v + center for v in whole[1:-1])}
        if len(found) == count:
            return sorted(found)
        power -= 0.02
    raise ConfigError(
        f"DeepCache: {count} different full steps around {center} of {num_steps} are not to be had; use 'center_power'."
    )
