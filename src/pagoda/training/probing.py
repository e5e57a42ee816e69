"""What one training step costs on this machine, from a few steps of the real loop."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.networks import MultiplyAdds, SavedMemory
from pagoda.process import release_memory
from pagoda.training.loop import Trainer
from pagoda.training.memory import PeakMemory
from pagoda.training.objective import BatchT
from pagoda.training.randomness import StepRandom

_MOST_STEPS = 20
"""Steps of one measurement: enough for a median, too few for guards of training health to speak."""
_PATIENCE = 4
"""Times its budget that one step for its memory may take."""


@dataclass(frozen=True)
class StepCost:
    """One training step.

    Attributes:
        seconds: Of a whole step, all micro-batches and updates together; 0 where nothing was timed.
        multiply_adds: Of one image of the batch, forward and backward passes of every network.
        saved_bytes: Memory of what is kept for the backward pass, for one image of a micro-batch.
        measured_batch: Images of the step that was timed; below the batch size, the seconds are a straight line's.
        peak_bytes: Most that the process, or the GPU's allocator, held while it ran; where not a whole micro-batch was run, a straight
            line's. None where nothing was timed or the system does not tell.
    """

    seconds: float
    multiply_adds: int
    saved_bytes: int
    measured_batch: int
    peak_bytes: int | None = None


def measure_step(trainer: Trainer[BatchT], step: int, budget: float, *, room: float = math.inf) -> StepCost:
    """Cost of step `step`; the trainer's networks are changed by it, so it is of no other use afterwards.

    A batch that does not fit into the budget is not timed: its time is a + b n, from steps with one and with two images or more.
    A micro-batch that takes no more than some times the budget is run once all the same, for its memory.

    Args:
        budget: Seconds to spend on timing; 0 counts only.
        room: Bytes; a micro-batch that keeps more for its backward pass is not run at all.
    """
    counts, saved = [], []
    for size in (1, 2):
        with MultiplyAdds() as counter, SavedMemory() as memory:
            _run(trainer, step, size, 1)
        counts.append(counter.total)
        saved.append(memory.peak_bytes)
    multiply_adds, saved_bytes = counts[1] - counts[0], max(0, saved[1] - saved[0])
    if budget <= 0:
        return StepCost(0.0, multiply_adds, saved_bytes, 0)
    parts = trainer.config.micro_batches
    whole = trainer.config.batch_size // parts
    one = _time(trainer, step, 1, 1, budget / 8)
    largest = whole if saved_bytes * whole <= room else max(2, int(room / saved_bytes))
    size = max(1, min(largest, int(budget / 4 / one)))
    if size == whole and one * whole * parts <= 2 * budget:
        with _Peak(trainer) as peak:
            seconds = _time(trainer, step, whole, parts, budget)
        return StepCost(seconds, multiply_adds, saved_bytes, whole * parts, peak.bytes)
    size = max(2, size)
    with _Peak(trainer) as small:
        _run(trainer, step, 1, 1)
    with _Peak(trainer) as large:
        slope = max(0.0, (_time(trainer, step, size, 1, budget / 2) - one) / (size - 1))
    fixed = max(0.0, one - slope)  # updates and averages, once a step
    if size < whole == largest and fixed + slope * whole <= _PATIENCE * budget:
        with _Peak(trainer) as peak:
            _run(trainer, step, whole, 1)
        peak_bytes = peak.bytes
    elif small.bytes is None or large.bytes is None:
        peak_bytes = None
    else:
        peak_bytes = round(small.bytes + (whole - 1) * max(0.0, large.bytes - small.bytes) / (size - 1))
    return StepCost(fixed + slope * whole * parts, multiply_adds, saved_bytes, size, peak_bytes)


class _Peak(PeakMemory):
    """Of a trainer's steps, after what others left has gone back to the system."""

    def __init__(self, trainer: Trainer[BatchT]) -> None:
        release_memory()
        super().__init__(trainer.runtime.device)


def _time(trainer: Trainer[BatchT], step: int, size: int, parts: int, budget: float) -> float:
    """Median seconds of a step of `parts` micro-batches of `size` images, after one to warm up."""
    _run(trainer, step, size, parts)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < budget and len(times) < _MOST_STEPS):
        started = time.perf_counter()
        _run(trainer, step, size, parts)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _run(trainer: Trainer[BatchT], step: int, size: int, parts: int) -> None:
    """One step of the loop, the making of its batch included."""
    trainer.step = step
    batch_size = size * parts
    indices: Tensor = trainer.order(step, batch_size)
    batches = []
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        random = StepRandom(trainer.seed, step, batch_size, rows, trainer.stage)
        batches.append((trainer.objective.batch(indices[rows], random), random))
    trainer.train_step(batches)
    if trainer.runtime.device.type == "cuda":
        torch.cuda.synchronize()
