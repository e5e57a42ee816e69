"""Calibration: the cheapest plan whose samples stay within a stated deviation of the plain ones, on a small set of seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.acceleration.accelerate import accelerate, networks_of
from pagoda.acceleration.deepcache import DeepCache
from pagoda.acceleration.faster_diffusion import FasterDiffusion
from pagoda.acceleration.plan import Plan
from pagoda.acceleration.ras import RAS
from pagoda.acceleration.saving import plan_to_dict
from pagoda.errors import ConfigError
from pagoda.networks import UNetAnatomy, anatomy

Sampler = Callable[[int], Tensor]
"""Seed -> the final latents, or images, of one run."""
Distance = Callable[[Tensor, Tensor], float]
"""(accelerated, plain) -> deviation, 0 for the same."""

INTERVALS = (2, 3, 4, 5, 6, 8, 10)
RATIOS = (0.75, 0.5, 0.35, 0.25)


def relative_l2(found: Tensor, plain: Tensor) -> float:
    """Norm of the difference over the norm of the plain samples."""
    return float((found.double() - plain.double()).norm() / plain.double().norm())


@dataclass(frozen=True)
class Candidate:
    """One plan that was tried.

    Attributes:
        plan: It.
        deviation: The largest over the seeds; NaN where it was refused.
        multiply_adds_saved: Share of the network's multiply-adds.
        seconds_saved: Share of the time of a whole run.
        refused: Why it cannot be used here, or "".
    """

    plan: Plan
    deviation: float
    multiply_adds_saved: float
    seconds_saved: float
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **plan_to_dict(self.plan),
            "deviation": self.deviation if self.deviation == self.deviation else None,
            "multiply_adds_saved": self.multiply_adds_saved,
            "seconds_saved": self.seconds_saved,
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        best: The chosen candidate.
        tried: All candidates, in the order in which they were tried.
        within: The deviation that was allowed.
    """

    best: Candidate
    tried: tuple[Candidate, ...]
    within: float

    def __str__(self) -> str:
        rows = [f"{'deviation':>9}  {'multiply-adds':>13}  {'seconds':>8}"]
        for candidate in self.tried:
            mark = "  <- chosen" if candidate is self.best else ""
            if candidate.refused:
                rows.append(f"{'refused':>9}  {'':13}  {'':8}  {candidate.plan}: {candidate.refused}")
            else:
                rows.append(
                    f"{candidate.deviation:9.4f}  {-candidate.multiply_adds_saved:13.1%}  {-candidate.seconds_saved:8.1%}  "
                    f"{candidate.plan}{mark}"
                )
        return "\n".join(rows)


def candidates_for(target: Any) -> list[list[Plan]]:
    """Plans to try for a target, in families that grow cheaper and coarser."""
    parts = anatomy(networks_of(target)[0][1])
    if isinstance(parts, UNetAnatomy):
        count = sum(name.startswith("decoder.") for name in parts.names())
        branches = sorted({branch for branch in (0, 1, 2, count // 2) if branch < count - 1})
        families: list[list[Plan]] = [
            [DeepCache(interval=interval, branch=branch) for interval in INTERVALS] for branch in branches
        ]
    else:
        families = [[RAS(sample_ratio=ratio, start_step=start) for ratio in RATIOS] for start in (4, 2)]
    return [*families, [FasterDiffusion(keys=keys, parallel=False, inject_scale=0.0) for keys in (2, 3, 4, 5)]]


def tune(
    target: Any,
    sampler: Sampler,
    *,
    within: float,
    seeds: Sequence[int] = (0, 1, 2, 3),
    families: Sequence[Sequence[Plan]] | None = None,
    distance: Distance = relative_l2,
    saving: str = "multiply_adds",
    report: Callable[[Candidate], None] | None = None,
) -> Tuned:
    """Choose the plan that saves most and deviates by `within` at most, for every one of the seeds.

    Within a family plans are tried from the finest to the coarsest, up to the first that deviates too much.

    Args:
        target: What `accelerate` takes.
        sampler: Samples from it.
        within: Deviation that is allowed, in units of `distance`; relative L2 of final latents unless said otherwise.
        seeds: Of the runs that are compared; not those that results are reported for later.
        families: Plans to try; chosen by the network when None.
        distance: Of accelerated samples to plain ones.
        saving: What counts: "multiply_adds", or "seconds" of whole runs on this machine.
        report: Called after each candidate.

    Raises:
        ConfigError: a deviation or seeds that make no sense, or no plan that stays within.
    """
    if not within > 0:
        raise ConfigError(f"the deviation allowed must be > 0, got {within}.")
    if not seeds:
        raise ConfigError("no seeds to tune on; give one or more.")
    if saving not in ("multiply_adds", "seconds"):
        raise ConfigError(f"saving must be 'multiply_adds' or 'seconds', got {saving!r}.")
    plain, plain_seconds = {}, 0.0
    with torch.no_grad():
        for seed in seeds:
            start = time.perf_counter()
            plain[seed] = sampler(seed)
            plain_seconds += time.perf_counter() - start
        tried: list[Candidate] = []
        for family in candidates_for(target) if families is None else families:
            for plan in family:
                tried.append(_try(target, sampler, plan, plain, plain_seconds, distance))
                if report is not None:
                    report(tried[-1])
                if tried[-1].refused or not tried[-1].deviation <= within:
                    break
    fitting = [candidate for candidate in tried if not candidate.refused and candidate.deviation <= within]
    if not fitting:
        usable = [candidate for candidate in tried if not candidate.refused]
        nearest = min(usable, key=lambda candidate: candidate.deviation, default=None)
        told = (
            "every plan was refused: " + tried[-1].refused
            if nearest is None
            else f"the nearest, {nearest.plan}, deviates by {nearest.deviation:.4f}"
        )
        raise ConfigError(f"no plan stays within {within:g}; {told}. Allow more, or sample with more steps.")
    best = max(fitting, key=lambda candidate: getattr(candidate, f"{saving}_saved"))
    return Tuned(best, tuple(tried), within)


def _try(
    target: Any, sampler: Sampler, plan: Plan, plain: dict[int, Tensor], plain_seconds: float, distance: Distance
) -> Candidate:
    worst, seconds, saved = 0.0, 0.0, 0.0
    try:
        with accelerate(target, plan) as run:
            for seed, expected in plain.items():
                start = time.perf_counter()
                found = sampler(seed)
                seconds += time.perf_counter() - start
                worst = max(worst, distance(found, expected))
                saved = run.ledgers[0].facts()["multiply_adds_saved"]
    except ConfigError as error:  # a solver or a number of steps that it is not for; told in the table
        return Candidate(plan, float("nan"), 0.0, 0.0, refused=str(error))
    return Candidate(plan, worst if worst == worst else float("inf"), saved, 1 - seconds / plain_seconds)


def pipeline_sampler(
    pipeline: Any, *, steps: int, prompts: Sequence[str] = (), labels: Sequence[int] = (), **options: Any
) -> Sampler:
    """How to sample from a diffusers pipeline: seed -> final latents, or images where it gives no latents.

    Args:
        pipeline: The pipeline.
        steps: Number of steps.
        prompts: For text pipelines; the seed chooses one in turn.
        labels: For class-conditional pipelines; the seed chooses one in turn.
        options: Further arguments of the pipeline's call.

    Raises:
        ConfigError: a text pipeline without prompts.
    """
    import inspect

    accepted = inspect.signature(type(pipeline).__call__).parameters
    fixed: dict[str, Any] = {"num_inference_steps": steps, **options}
    latents = "output_type" in accepted and "latent" in str(inspect.getsource(type(pipeline).__call__))
    if "output_type" in accepted:
        fixed["output_type"] = "latent" if latents else "np"
    needs_prompt = "prompt" in accepted and "prompt_embeds" not in options
    if needs_prompt and not prompts:
        raise ConfigError(f"`{type(pipeline).__name__}` needs prompts; give one or more with --prompt.")

    def sampler(seed: int) -> Tensor:
        given = dict(fixed)
        if needs_prompt:
            given["prompt"] = prompts[seed % len(prompts)]
        if "class_labels" in accepted:
            given["class_labels"] = [labels[seed % len(labels)] if labels else seed % 1000]
        result = pipeline(**given, generator=torch.Generator().manual_seed(seed))
        images = result[0] if isinstance(result, tuple) else next(iter(result.values()))
        return torch.as_tensor(images).detach().cpu()

    return sampler
