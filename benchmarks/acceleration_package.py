"""Our DeepCache side by side with the released package, on the pipeline of `acceleration_speed`.

The package is not installed by pagoda: pip install --no-deps DeepCache==0.1.1
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import pagoda
from benchmarks.acceleration_speed import pipeline, run_once, timed
from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.acceleration import DeepCache
from pagoda.errors import DataError

SIDE_BY_SIDE = ((5, 0), (5, 1), (3, 0))
"""Intervals and branches."""
STEPS, ROUNDS = 20, 6


def beside_package(interval: int, branch: int, steps: int, share: float, rounds: int, seed: int) -> dict[str, float]:
    """Both in turn, the other one first every second time; the median over rounds of the ratio of runs next to each other."""
    if importlib.util.find_spec("DeepCache") is None:
        raise DataError("the package to compare with is missing. Run: pip install --no-deps DeepCache==0.1.1")
    helper_class: Any = importlib.import_module("DeepCache").DeepCacheSDHelper
    pipe, short = pipeline(share), interval + 1

    def ours() -> tuple[Tensor, float, int]:
        with pagoda.accelerate(pipe, DeepCache(interval=interval, branch=branch)) as run:
            run_once(pipe, short, seed)
            result, seconds = timed(partial(run_once, pipe, steps, seed))
            return result, seconds, run.ledgers[0].bytes_held

    def package() -> tuple[Tensor, float, int]:
        helper = helper_class(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        run_once(pipe, short, seed)  # `reset_states` behind it would break the network
        result, seconds = timed(partial(run_once, pipe, steps, seed))
        held = storage_bytes(helper.cached_output)
        helper.disable()
        return result, seconds, held

    run_once(pipe, short, seed)
    taken = []
    for index in range(rounds):
        order: tuple[Callable[[], tuple[Tensor, float, int]], ...] = (
            (ours, package) if index % 2 == 0 else (package, ours)
        )
        made = {function: function() for function in order}
        taken.append((made[ours], made[package]))
    (mine, _, held_ours), (other, _, held_theirs) = taken[-1]
    return {
        "seconds_ours": statistics.median(a[1] for a, _ in taken),
        "seconds_package": statistics.median(b[1] for _, b in taken),
        "time_ratio": statistics.median(a[1] / b[1] for a, b in taken),
        "largest_difference": float((mine - other).abs().max()),
        "held_mib_ours": held_ours / 2**20,
        "held_mib_package": held_theirs / 2**20,
        "memory_ratio": held_ours / held_theirs,
    }


def storage_bytes(value: Any) -> int:
    """Memory of all different tensors in a nest."""
    found: dict[int, int] = {}

    def look(item: Any) -> None:
        if isinstance(item, Tensor):
            found[item.data_ptr()] = item.numel() * item.element_size()
        elif isinstance(item, dict):
            for part in item.values():
                look(part)
        elif isinstance(item, tuple | list):
            for part in item:
                look(part)

    look(value)
    return sum(found.values())


@benchmark(
    "acceleration_package",
    question=(
        "How do speed, outputs and memory of our DeepCache compare to the released package's, on a U-Net of Stable Diffusion's topology "
        "with 142 M parameters, 20 steps of DDIM with guidance in one batch?"
    ),
    passes=[
        line
        for interval, branch in SIDE_BY_SIDE
        for line in (
            PassLine(
                f"interval {interval}, branch {branch}: at least as fast as the package (within 2 %)",
                lambda r, arm=f"n{interval}-b{branch}": r.median(arm, "time_ratio"),
                at_most=1.02,
            ),
            PassLine(
                f"interval {interval}, branch {branch}: outputs equal to 1e-5",
                lambda r, arm=f"n{interval}-b{branch}": r.max(arm, "largest_difference"),
                at_most=1e-5,
            ),
            PassLine(
                f"interval {interval}, branch {branch}: at most half of the package's kept memory",
                lambda r, arm=f"n{interval}-b{branch}": r.max(arm, "memory_ratio"),
                at_most=0.5,
            ),
        )
    ],
)
def acceleration_package(budget: float) -> dict[str, Arm]:
    """One arm a setting; a smaller budget takes a narrower network."""
    share, rounds = (1.0, ROUNDS) if budget >= 1 else (max(0.25, budget**0.5), 2)
    return {
        f"n{interval}-b{branch}": partial(beside_package, interval, branch, STEPS, share, rounds)
        for interval, branch in SIDE_BY_SIDE
    }
