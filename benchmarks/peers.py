"""Our training step and samplers against the peers' own code: same network, images, batch and precision, a process each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.metrics import measure_command
from benchmarks.peer_loops import CONTESTANTS, peer_folder
from pagoda.errors import DataError

NOT_RUN = {
    "sihyun-yu/REPA": "its training script imports torchvision, which does not run beside a CPU build of torch",
    "sony/pagoda": "its discriminator and feature networks are timm's, which imports torchvision",
}
"""Peers that do not run here, and why."""


def _arm(name: str, amount: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.peer_loops", name, str(amount), str(seed)]
        cost = measure_command(command, log=log)
        rate = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {"images_per_s": rate, "process_peak_mib": cost["peak_mib"]}


def _faster(ours: str, theirs: str) -> Callable[[Results], float]:
    """The median over seeds of our rate over theirs."""

    def value(results: Results) -> float:
        pairs = zip(results.values(ours, "images_per_s"), results.values(theirs, "images_per_s"), strict=True)
        ratios = sorted(a / b for a, b in pairs)
        return ratios[len(ratios) // 2]

    return value


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
        _faster("train: pagoda", "train: NVlabs/edm"),
        at_least=1.0,
    )
]


@benchmark(
    "peers",
    question=(
        "How many images a second do our loop and samplers make beside the peers' own, with the same network (preset `tiny`, 16 px, "
        "float32, batch 64)? NVlabs/edm runs from the folder that PAGODA_PEERS names. Not run: "
        + "; ".join(f"{name} ({why})" for name, why in NOT_RUN.items())
        + "."
    ),
    passes=[
        PassLine(
            "our training step is at least as fast as diffusers' (ratio of rates)",
            _faster("train: pagoda", "train: diffusers"),
            at_least=1.0,
        ),
        *(_EDM_LINES if _have_edm() else []),
        PassLine(
            "35 network calls: at least as fast as DDIMPipeline (ratio of rates)",
            _faster("sample, 35 calls: pagoda", "sample, 35 calls: diffusers"),
            at_least=1.0,
        ),
        PassLine(
            "one network call: at least as fast as ConsistencyModelPipeline (ratio of rates)",
            _faster("sample, 1 call: pagoda", "sample, 1 call: diffusers"),
            at_least=1.0,
        ),
    ],
)
def peers(budget: float) -> dict[str, Arm]:
    """One arm a contestant; NVlabs/edm only where its folder is given."""
    kept = {name: value for name, value in CONTESTANTS.items() if "edm" not in name or _have_edm()}
    return {name: partial(_arm, name, max(4, round(amount * budget))) for name, (_, amount) in kept.items()}
