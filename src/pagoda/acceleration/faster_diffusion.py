"""Faster Diffusion: the encoder of a U-Net runs at key steps only; the decoder of the steps in between reads its features.

The decoder of a step between two keys is told the step's own time, but its features do not depend on the step's image. So the
outputs of all steps up to the next key can be made in one batch, at the key step (`parallel`). In a DiT the first blocks are
taken for the encoder.

Late steps get a little of the initial noise added to their state before the update, which brings back texture. It is done at the update
in every mode, as in the official parallel code; so decoders in one batch and one by one give the same numbers. (The official sequential
code adds it before the network is called, and a late key step there sees it.)

Source: Li, Hu et al., NeurIPS 2024, arXiv:2312.09608.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pagoda.acceleration.plan import Layout, Plan, PlannedStep, check_indices, injecting
from pagoda.errors import ConfigError
from pagoda.networks import Anatomy, TransformerAnatomy, UNetAnatomy

PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""Key steps of 50, found for Stable Diffusion."""
NAMED_KEYS = ("paper", "progressive", "if_stage_1", "if_stage_2")
ENCODER_SHARE = 18 / 28
"""Share of a DiT's blocks that is taken for the encoder: 18 of the 28 of DiT-XL, in the paper."""


@dataclass(frozen=True, kw_only=True)
class FasterDiffusion(Plan):
    """Encoder features are kept from key steps; the decoder runs in every step, or for several at once.

    Raises:
        ConfigError: a setting out of range; the message says which.
    """

    keys: str | int | Sequence[int] = "paper"
    """Which steps are keys: "paper" (0, 1, 2, 3, 5, 10, 15, 25, 35 of 50; cut off for fewer steps, stretched for more), a number N
    (every N-th), their indices (`keys_by_change` chooses them by measurement), or what the paper used for DeepFloyd IF:
    "if_stage_1", "if_stage_2", "progressive" (its third stage)."""
    parallel: bool = True
    """The decoders of a key step and of those up to the next one run in one batch. Not for solvers with several calls a step."""
    max_parallel: int | None = None
    """At most so many decoders in one batch, to bound memory; None: all up to the next key."""
    inject_scale: float = 0.003
    """How much of the initial noise is added to late states; 0: none."""
    inject_from: float = 0.5
    """Share of the run from which on it is added."""
    cut: int | None = None
    """DiTs: how many blocks are the encoder; None: 18 of 28, rounded."""
    propagate: str = "encoder"
    """What is kept: features of the "encoder", or the whole "output" (worse; the paper's argument for the encoder)."""
    control: str = "full"
    """A ControlNet runs at key steps only ("full"), or in every step in vain ("every")."""

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            if self.keys not in NAMED_KEYS:
                raise ConfigError(
                    f"FasterDiffusion: unknown keys {self.keys!r}; accepted: {', '.join(NAMED_KEYS)}, a number, or indices."
                )
        elif isinstance(self.keys, int):
            if self.keys < 1:
                raise ConfigError(f"FasterDiffusion: keys must be >= 1 (every N-th step), got {self.keys}.")
        else:
            object.__setattr__(self, "keys", tuple(self.keys))
            check_indices("FasterDiffusion: keys", self.keys)
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ConfigError(f"FasterDiffusion: max_parallel must be >= 1, got {self.max_parallel}.")
        if self.inject_scale < 0 or not 0 <= self.inject_from <= 1:
            raise ConfigError(
                "FasterDiffusion: inject_scale >= 0 and 0 <= inject_from <= 1 are needed, "
                f"got {self.inject_scale} and {self.inject_from}."
            )
        if self.cut is not None and self.cut < 1:
            raise ConfigError(f"FasterDiffusion: cut must be >= 1 block, got {self.cut}.")
        for name, value, accepted in (
            ("propagate", self.propagate, ("encoder", "output")),
            ("control", self.control, ("full", "every")),
        ):
            if value not in accepted:
                raise ConfigError(f"FasterDiffusion: {name} must be one of {', '.join(accepted)}, got {value!r}.")

    def key_steps(self, num_steps: int) -> list[int]:
        """Indices of the key steps; 0 is always one.

        Raises:
            ConfigError: indices beyond the run.
        """
        if isinstance(self.keys, int):
            return list(range(0, num_steps, self.keys))
        if not isinstance(self.keys, str):
            if self.keys[-1] >= num_steps:
                raise ConfigError(
                    f"FasterDiffusion: keys have step {self.keys[-1]}, the run has steps 0 to {num_steps - 1}."
                )
            return list(self.keys)
        if self.keys == "paper":
            stretch = max(1.0, num_steps / 50)
            return sorted({round(k * stretch) for k in PAPER_KEYS if round(k * stretch) < num_steps})
        rules = {
            "if_stage_1": lambda k: k > 85 or k < 10 or k % 5 == 0,
            "if_stage_2": lambda k: k < 20 or k > 40 or k % 2 == 0,
            "progressive": lambda k: math.isqrt(9 + 8 * k) ** 2 == 9 + 8 * k,
        }
        return [k for k in range(num_steps) if rules[self.keys](k)]

    def lay_out(self, num_steps: int) -> Layout:
        keys = self.key_steps(num_steps)
        steps: list[PlannedStep] = []
        for key, following in zip(keys, [*keys[1:], num_steps], strict=True):
            steps += self._group(key, following)
        if self.inject_scale and len(keys) < num_steps:
            steps = list(injecting(steps, self.inject_scale, self.inject_from))
        return Layout(str(self), tuple(steps))

    def _group(self, key: int, end: int) -> list[PlannedStep]:
        """A key step and those up to the next one."""
        if self.propagate == "output":
            return [PlannedStep(key), *(PlannedStep(k, "skipped", keeps_control=True) for k in range(key + 1, end))]
        at_once = 1 if not self.parallel else end - key if self.max_parallel is None else self.max_parallel
        keeps = self.control == "full"
        steps = []
        for first in range(key, end, at_once):
            group = tuple(range(first, min(first + at_once, end)))
            decodes = group if len(group) > 1 else ()
            if first == key:
                steps.append(PlannedStep(first, decodes=decodes))
            else:
                steps.append(PlannedStep(first, "reused", skips=0, decodes=decodes, keeps_control=keeps))
            steps += [PlannedStep(k, "batched", skips=0, keeps_control=keeps) for k in group[1:]]
        return steps

    def check(self, parts: Anatomy) -> None:
        name = type(parts.model).__name__
        if isinstance(parts, UNetAnatomy):
            if self.cut is not None:
                raise ConfigError(
                    f"FasterDiffusion: `cut` is for transformers; the encoder of `{name}` is given. Leave it out."
                )
            return
        if not isinstance(parts, TransformerAnatomy):
            raise ConfigError(f"FasterDiffusion needs a U-Net or a transformer, got `{name}`.")
        if self.encoder_blocks(len(parts.blocks)) >= len(parts.blocks):
            raise ConfigError(
                f"FasterDiffusion: cut={self.cut} leaves no decoder: `{name}` has {len(parts.blocks)} blocks."
            )

    def encoder_blocks(self, num_blocks: int) -> int:
        """How many of a transformer's blocks are the encoder."""
        return max(1, round(ENCODER_SHARE * num_blocks)) if self.cut is None else self.cut


def keys_by_change(changes: Sequence[float], count: int) -> list[int]:
    """`count` key steps such that features change equally much between one and the next.

    Args:
        changes: For each step but the first, how much the encoder's features changed since the step before (`Run.changes`).
        count: Number of key steps, 0 included.

    Raises:
        ConfigError: fewer than one key, or more than there are steps.
    """
    num_steps = len(changes) + 1
    if not 1 <= count <= num_steps:
        raise ConfigError(f"the number of key steps must lie in 1 to {num_steps}, got {count}.")
    if any(change < 0 or not math.isfinite(change) for change in changes):
        raise ConfigError("changes of features must be finite and >= 0.")
    total = list(accumulate([0.0, *changes]))
    keys = [0]
    for number in range(1, count):
        wanted = total[-1] * number / count
        first, last = keys[-1] + 1, num_steps - (count - number)
        keys.append(next((k for k in range(first, last) if total[k] >= wanted), last))
    return keys
