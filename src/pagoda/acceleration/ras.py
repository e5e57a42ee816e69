"""Region-Adaptive Sampling: in each step only a part of a transformer's tokens goes through the network.

The others keep the output of the step that computed them last, and their keys and values, which the active tokens attend to. Every token
moves in every step. After a step, tokens are ranked by their output; the first of the ranking are computed in the next one. A token
that was left out climbs with every step, so that none starves.

The paper computes first where the output varies least over channels (`focus="low_std"`, the main subject) and multiplies that score by
exp(k D) with D the number of steps a token was left out. As the low scores are kept, the factor works against a token that was left
out, and with the defaults of the official code half of the tokens are never computed again. Here the priority is -log(score) + k D.
`official_compat=True` gives the official rule.

Source: Liu et al. 2025, arXiv:2502.10389.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.acceleration.plan import Layout, Plan, PlannedStep
from pagoda.errors import ConfigError
from pagoda.networks import Anatomy, TransformerAnatomy

Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class RAS(Plan):
    """A share of the tokens a step, chosen by their last output.

    Raises:
        ConfigError: a setting out of range; the message says which.
    """

    sample_ratio: float | Sequence[float] = 0.5
    """Share of the tokens that a sparse step computes; 1 is the plain run. A list gives one share for each step of a run."""
    start_step: int = 4
    """Steps before this one are full; at least one has to be."""
    end_step: int | None = None
    """Steps from this one on are full; None: none."""
    reset_steps: str | Sequence[int] = (12, 20)
    """Full steps in between, which clear what has gone stale; those beyond the run are left out. "mid": one, in the middle of the
    sparse steps."""
    focus: str = "low_std"
    """Which tokens come first: "low_std" (the paper's), "high_std", or "random" (to compare)."""
    metric: str | Metric = "std"
    """Score of a token: "std" of its output over channels, its "l2" norm, or a function (B, C, H, W) -> (B, H, W), > 0."""
    starvation: float = 0.1
    """k: how fast a token that is left out climbs, in units of the logarithm of the score."""
    ramp: tuple[int, int] | None = None
    """(tokens, steps): the number of tokens left out grows by `tokens` every `steps` steps, and is on average that of `sample_ratio`."""
    kv_cache: bool = True
    """Active tokens attend to the kept keys and values of all others; False: to one another only."""
    official_compat: bool = False
    """The official rule of choice, with its way of counting against starvation."""
    high_ratio: float = 0.3
    """With `official_compat`: share of the left-out tokens that is taken from the high end of the ranking, the rest from the low."""
    seed: int = 0
    """Of the draws of `focus="random"`."""

    def __post_init__(self) -> None:
        ratios = [self.sample_ratio] if isinstance(self.sample_ratio, int | float) else list(self.sample_ratio)
        if not isinstance(self.sample_ratio, int | float):
            object.__setattr__(self, "sample_ratio", tuple(ratios))
        if not ratios or any(not 0 < ratio <= 1 for ratio in ratios):
            raise ConfigError(f"RAS: sample_ratio must lie in (0, 1], got {self.sample_ratio}.")
        if self.start_step < 1:
            raise ConfigError(
                f"RAS: start_step must be >= 1 (keys and values are first kept by a full step), got {self.start_step}."
            )
        if self.end_step is not None and self.end_step < self.start_step:
            raise ConfigError(f"RAS: end_step must be >= start_step={self.start_step}, got {self.end_step}.")
        if isinstance(self.reset_steps, str):
            if self.reset_steps != "mid":
                raise ConfigError(f"RAS: reset_steps must be indices or 'mid', got {self.reset_steps!r}.")
        else:
            object.__setattr__(self, "reset_steps", tuple(self.reset_steps))
            if any(type(k) is not int or k < 0 for k in self.reset_steps):
                raise ConfigError(f"RAS: reset_steps must be indices of steps, got {list(self.reset_steps)}.")
        for name, value, accepted in (
            ("focus", self.focus, ("low_std", "high_std", "random")),
            ("metric", self.metric, ("std", "l2")),
        ):
            if isinstance(value, str) and value not in accepted:
                raise ConfigError(f"RAS: {name} must be one of {', '.join(accepted)}, got {value!r}.")
        if self.starvation < 0 or not 0 <= self.high_ratio <= 1:
            raise ConfigError(
                f"RAS: starvation >= 0 and 0 <= high_ratio <= 1 are needed, got {self.starvation}, {self.high_ratio}."
            )
        if self.ramp is not None and (len(self.ramp) != 2 or min(self.ramp) < 1):
            raise ConfigError(f"RAS: ramp must be (tokens >= 1, steps >= 1), got {self.ramp}.")
        if self.ramp is not None and not isinstance(self.sample_ratio, int | float):
            raise ConfigError("RAS: ramp and a list of sample_ratio contradict each other; give one of them.")

    def sparse_steps(self, num_steps: int) -> list[int]:
        """Indices of the steps that compute a part of the tokens.

        Raises:
            ConfigError: a list of shares of another length than the run.
        """
        if not isinstance(self.sample_ratio, int | float) and len(self.sample_ratio) != num_steps:
            raise ConfigError(f"RAS: sample_ratio has {len(self.sample_ratio)} entries for {num_steps} steps.")
        end = num_steps if self.end_step is None else min(self.end_step, num_steps)
        inside = range(self.start_step, end)
        resets = {(self.start_step + end) // 2} if self.reset_steps == "mid" else set(self.reset_steps)
        return [k for k in inside if k not in resets and self.ratio(k) < 1]

    def ratio(self, index: int) -> float:
        """Share of the tokens that is asked of a sparse step."""
        return float(self.sample_ratio if isinstance(self.sample_ratio, int | float) else self.sample_ratio[index])

    def lay_out(self, num_steps: int) -> Layout:
        sparse = set(self.sparse_steps(num_steps))
        if not sparse and num_steps <= self.start_step and self.sample_ratio != 1:
            raise ConfigError(
                f"RAS: start_step={self.start_step} leaves no sparse step of {num_steps}; use more steps or an earlier start."
            )
        return Layout(
            str(self),
            tuple(
                PlannedStep(k, "sparse", tokens=self.ratio(k)) if k in sparse else PlannedStep(k)
                for k in range(num_steps)
            ),
        )

    def token_budget(self, num_steps: int, total: int) -> list[int]:
        """Number of active tokens of each step, for images of `total` tokens.

        Raises:
            ConfigError: a ramp that leaves a step without tokens.
        """
        sparse = set(self.sparse_steps(num_steps))
        return [self._active(k, num_steps, total) if k in sparse else total for k in range(num_steps)]

    def _active(self, index: int, num_steps: int, total: int) -> int:
        dropped = int((1 - self.ratio(index)) * total)
        if self.ramp is not None:
            tokens, length = self.ramp
            middle = ((num_steps + self.start_step) // length) // 2
            dropped += tokens * (index // length - middle)
            dropped = max(0, dropped // 64 * 64 if total >= 64 else dropped)
        if self.official_compat:
            dropped = sum(official_ends(dropped, self.high_ratio))
        if dropped >= total:
            raise ConfigError(
                f"RAS: step {index} would leave out all of {total} tokens; use a flatter ramp or a larger share."
            )
        return total - dropped

    def check(self, parts: Anatomy) -> None:
        if not isinstance(parts, TransformerAnatomy):
            raise ConfigError(
                f"RAS needs a transformer, whose tokens can be computed one by one; `{type(parts.model).__name__}` has "
                "convolutions. Use DeepCache or FasterDiffusion."
            )


def token_scores(prediction: Tensor, patch: int, metric: str | Metric) -> Tensor:
    """Score of each token (B, N), > 0, from a prediction (B, C, H, W): the metric's mean over the token's pixels.

    Raises:
        ConfigError: a metric of another shape.
    """
    if metric == "std":
        pixels = prediction.float().std(dim=1)
    elif metric == "l2":
        pixels = prediction.float().norm(dim=1)
    else:
        assert callable(metric)
        pixels = metric(prediction)
        if pixels.shape != (len(prediction), *prediction.shape[2:]):
            raise ConfigError(f"RAS: the metric must give (B, H, W), got {tuple(pixels.shape)}.")
    return torch.nn.functional.avg_pool2d(pixels[:, None], patch).flatten(1)


def select_tokens(scores: Tensor, dropped: Tensor, count: int, plan: RAS, *, draw: int = 0) -> Tensor:
    """Which tokens are computed next: (B, count) int64, ascending.

    Args:
        scores: (B, N), > 0; a common factor does not matter.
        dropped: (B, N), how many times each token was left out since it was computed.
        count: How many.
        plan: `focus`, `starvation`, `official_compat`, `high_ratio`.
        draw: Number of the draw, for `focus="random"`.

    Raises:
        ConfigError: the official rule, which rounds both of its ends down, can't leave out just so many.
    """
    total = scores.shape[1]
    if count == total:
        return torch.arange(total, device=scores.device).expand(len(scores), -1)
    if plan.official_compat:
        return _official(scores, dropped, count, plan)
    if plan.focus == "random":
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + draw)
        priority = torch.rand(scores.shape, generator=generator).to(scores.device)
    else:
        sign = -1.0 if plan.focus == "low_std" else 1.0
        priority = sign * scores.clamp_min(1e-12).log() + plan.starvation * dropped
    return priority.topk(count, dim=1).indices.sort(dim=1).values


def count_left_out(dropped: Tensor, index: Tensor, plan: RAS) -> Tensor:
    """How often each token was left out (B, N), after a step that computed the tokens `index` (B, m).

    Computing a token clears its count. The official code never clears one within a run.
    """
    if plan.official_compat:
        return dropped + 1 - torch.zeros_like(dropped).scatter_(1, index, 1.0)
    return (dropped + 1).scatter(1, index, 0.0)


def official_ends(asked: int, high_ratio: float) -> tuple[int, int]:
    """How many tokens the official rule leaves out from the low end of the ranking and from the high, where `asked` are to be left out.

    Both are rounded down, so that often one token more is computed than was asked for. (Where none is to come from the high end, the
    official code leaves out all; here, none.)
    """
    return int(asked * (1 - high_ratio)), int(asked * high_ratio)


def _official(scores: Tensor, dropped: Tensor, count: int, plan: RAS) -> Tensor:
    """The official rule: rank by score x exp(k D), leave out a share from the high end and the rest from the low."""
    total = scores.shape[1]
    left_out = total - count
    ends = [official_ends(asked, plan.high_ratio) for asked in (left_out, left_out + 1)]
    found = [pair for pair in ends if sum(pair) == left_out]
    if not found:
        raise ConfigError(
            f"RAS: the official rule with high_ratio={plan.high_ratio} can't leave out {left_out} of {total} tokens; "
            f"it leaves out {sum(ends[0])} or {sum(ends[1])}. Take a `count` of `token_budget`."
        )
    low, high = found[0]
    ranked = (scores * torch.exp(plan.starvation * dropped)).argsort(dim=1)
    return ranked[:, low : total - high].sort(dim=1).values


def longest_streak(history: Sequence[Tensor], total: int) -> int:
    """The most steps in a row that any token was left out, from the active indices of each step."""
    streak, longest = torch.zeros(len(history[0]), total, dtype=torch.int64), 0
    for index in history:
        streak = streak + 1
        streak.scatter_(1, index.cpu(), 0)
        longest = max(longest, int(streak.max()))
    return longest


def expected_streak(ratio: float) -> int:
    """With equal scores, no token is left out more often in a row than this."""
    return math.ceil(1 / ratio) - 1
