"""Our training step and samplers against the peers' own code: same network, images, batch and precision, a process each, in turns."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.peer_loops import BATCH, CONTESTS, SAMPLES, peer_folder
from benchmarks.turns import take_turns
from pagoda.errors import DataError

NOT_RUN = {
    "sihyun-yu/REPA": "its training script imports torchvision, which does not run beside a CPU build of torch",
    "sony/pagoda": "its discriminator and feature networks are timm's, which imports torchvision",
}
"""Peers that do not run here, and why."""


ROUNDS = 5
STEPS = {"train": 8, "sample, 35 calls": 1, "sample, 1 call": 16}
"""Steps or calls a turn: about a second and a half each."""


def _contest(contest: str, names: list[str], rounds: int, seed: int) -> dict[str, float]:
    """Rates and memory of every contestant, and by how much ours is faster: the median over rounds of turns next to each other."""
    steps = STEPS[contest]
    commands = {
        name: [sys.executable, "-m", "benchmarks.peer_loops", contest, name, str(rounds), str(steps), str(seed)]
        for name in names
    }
    taken = take_turns(commands, rounds)
    images = steps * (BATCH if contest == "train" else SAMPLES)
    figures = {f"images_per_s_{name}": images / statistics.median(taken[name].seconds) for name in names}
    figures |= {f"peak_mib_{name}": taken[name].peak_mib for name in names}
    ours = taken["pagoda"].seconds
    for name in names[1:]:
        ratios = [theirs / mine for theirs, mine in zip(taken[name].seconds, ours, strict=True)]
        figures[f"ratio_{name}"] = statistics.median(ratios)
    return figures


def _faster(contest: str, name: str) -> Callable[[Results], float]:
    """The median over seeds of our rate over theirs."""
    return lambda results: results.median(contest, f"ratio_{name}")


def _have_edm() -> bool:
    try:
        return peer_folder("edm").is_dir()
    except DataError:
        if os.environ.get("PAGODA_PEERS"):
            raise
        return False


_EDM_LINES = [
    PassLine(
        "our training step is at least as fast as that of NVlabs/edm (ratio of rates)",
        _faster("train", "edm"),
        at_least=1.0,
    )
]


@benchmark(
    "peers",
    question=(
        "How many images a second do our loop and samplers make beside the peers' own, with the same network (preset `tiny`, 16 px, "
        "float32, batch 64)? Each has a process, and they work in turns. `pagoda` keeps freed memory as our commands do, `plain` is "
        "the same without. NVlabs/edm runs from the folder that PAGODA_PEERS names. Not run: "
        + "; ".join(f"{name} ({why})" for name, why in NOT_RUN.items())
        + "."
    ),
    passes=[
        PassLine(
            "our training step is at least as fast as diffusers' (ratio of rates)",
            _faster("train", "diffusers"),
            at_least=1.0,
        ),
        *(_EDM_LINES if _have_edm() else []),
        PassLine(
            "35 network calls: at least as fast as DDIMPipeline (ratio of rates)",
            _faster("sample, 35 calls", "diffusers"),
            at_least=1.0,
        ),
        PassLine(
            "one network call: at least as fast as ConsistencyModelPipeline (ratio of rates)",
            _faster("sample, 1 call", "diffusers"),
            at_least=1.0,
        ),
    ],
)
def peers(budget: float) -> dict[str, Arm]:
    """One arm a contest; NVlabs/edm only where its folder is given."""
    kept = {contest: [n for n in names if n != "edm" or _have_edm()] for contest, names in CONTESTS.items()}
    rounds = max(1, round(ROUNDS * budget))
    return {contest: partial(_contest, contest, names, rounds) for contest, names in kept.items()}
