"""Memory as the system tells it: what is taken for a moment is seen, and forgotten by the next look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pagoda.training import (
    LoopConfig,
    Losses,
    Objective,
    OptimizerConfig,
    PeakMemory,
    Runtime,
    StepRandom,
    Trainable,
    Trainer,
    measure_step,
    peak_memory_mib,
    resident_bytes,
)

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process takes")


@linux
def test_the_peak_is_of_what_runs_within_it_alone() -> None:
    size = 300 * 2**20  # large blocks go back to the system when they are freed
    with PeakMemory(CPU) as much:
        torch.ones(size // 4)
    with PeakMemory(CPU) as little:
        torch.ones(4)
    now = resident_bytes(CPU)
    assert much.bytes is not None
    assert little.bytes is not None
    assert now is not None
    assert much.bytes - little.bytes == pytest.approx(size, rel=0.1)
    assert little.bytes == pytest.approx(now, rel=0.05)
    assert peak_memory_mib(CPU) * 2**20 >= little.bytes


class Heavy(Objective[Tensor]):
    """A step that keeps 4 MiB an image for its backward pass, input and output; it remembers the largest batch."""

    def __init__(self) -> None:
        self.network, self.largest = nn.Linear(1, 1), 0

    def trainables(self) -> Mapping[str, Trainable]:
        return {"network": Trainable(self.network, OptimizerConfig(lr=1e-3))}

    def batch(self, indices: Tensor, random: StepRandom) -> Tensor:
        self.largest = max(self.largest, len(indices))
        return torch.zeros(len(indices), 2**19, 1)

    def losses(self, name: str, batch: Tensor, random: StepRandom, runtime: Runtime) -> Losses:
        return Losses(self.network(batch).square().mean())


def steps_of(folder: Path, **settings: int) -> tuple[Heavy, Trainer[Tensor]]:
    objective = Heavy()
    trainer = Trainer(
        objective,
        LoopConfig(steps=10, **settings),
        runtime=Runtime("cpu"),
        folder=folder,
        stage="test",
        seed=0,
        order=lambda step, size: torch.arange(size),
    )
    return objective, trainer


def measured_twice(folder: Path) -> list[int]:
    """Memory of a step of 16 images: once all of them are run, once no more than there is room for."""
    before = resident_bytes(CPU)
    assert before is not None
    taken = []
    for room, most in ((float("inf"), 16), (20 * 2**20, 5)):
        objective, trainer = steps_of(folder, batch_size=16)
        cost = measure_step(trainer, 1, 2.0, room=room)
        assert objective.largest == most
        assert cost.saved_bytes == 4 * 2**20
        assert cost.peak_bytes is not None
        taken.append(cost.peak_bytes - before)
    return taken


@linux
def test_a_batch_that_is_not_run_has_the_memory_of_one_that_is(tmp_path: Path) -> None:
    # The system's allocator keeps freed blocks below 32 MiB, more or fewer of them from one time to the next. Told to give
    # them back it leaves what the step needs, and that is a straight line over the images.
    code = (
        "import json, sys; from pathlib import Path; from tests.training.test_memory import measured_twice; "
        f"print(json.dumps(measured_twice(Path({str(tmp_path)!r}))))"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    run, foretold = json.loads(done.stdout)
    assert foretold == pytest.approx(run, rel=0.05)
    assert run > 16 * 4 * 2**20, "what is kept for the backward pass is a part of it"


def test_what_is_only_counted_has_no_memory_measured(tmp_path: Path) -> None:
    assert measure_step(steps_of(tmp_path, batch_size=16)[1], 1, 0.0).peak_bytes is None
