"""Evaluation on a schedule: averaged networks are copied and measured in another thread while training goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from pagoda.errors import ConfigError
from pagoda.training.health import HealthWarning


class ScheduledEvaluation:
    """Measures copies of networks, one measurement at a time, in a thread of its own.

    Training is changed in no bit by it: networks are copied at the step that they are measured at, and `measure` draws nothing from the
    global generator. On a GPU the thread hides most of the time; on a CPU it shares the cores.

    Args:
        every: Steps between measurements; the last step is measured too.
        measure: Networks by name -> figures by name. Must not draw from the global random generator.
    """

    def __init__(self, every: int, measure: Callable[[Mapping[str, nn.Module]], Mapping[str, float]]) -> None:
        if every < 1:
            raise ConfigError(f"an evaluation is due every 1 steps or more, got {every}.")
        self.every = every
        self.measure = measure
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._running: list[tuple[int, Future[Mapping[str, float]]]] = []

    def is_due(self, step: int, last: bool) -> bool:
        """Whether the networks are measured after this step."""
        return last or step % self.every == 0

    def start(self, step: int, networks: Mapping[str, nn.Module]) -> None:
        """Copy the networks as they are now and begin to measure them."""
        copies = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in networks.items()}
        self._running.append((step, self._pool.submit(self.measure, copies)))

    def collect(self, *, wait: bool) -> list[tuple[int, dict[str, float]]]:
        """Figures that are ready, with their steps, in order.

        A measurement that failed is warned about, with its reason, and gives no figures: training goes on.

        Args:
            wait: Wait for all that have begun.
        """
        ready = []
        while self._running and (wait or self._running[0][1].done()):
            step, future = self._running.pop(0)
            try:
                ready.append((step, dict(future.result())))
            except Exception as error:  # whatever a measurement does must not end the training that it watches
                warnings.warn(
                    f"the evaluation after step {step} failed ({type(error).__name__}: {error}); training goes on.",
                    HealthWarning,
                    stacklevel=2,
                )
        return ready

    def close(self) -> None:
        """Let the thread go, when nothing is to be measured any more."""
        self._pool.shutdown()
