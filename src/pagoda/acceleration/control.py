"""ControlNets in steps that need no fresh residuals."""

from __future__ import annotations

from typing import Any

from torch import nn

from pagoda.acceleration.clock import Clock
from pagoda.acceleration.network_run import NetworkRun, shapes


class ControlRun:
    """Stands in for a ControlNet's forward: runs it, or hands out what it gave at the last step that ran it."""

    def __init__(self, control: nn.Module, network: NetworkRun, clock: Clock) -> None:
        self._control, self._network, self._clock = control, network, clock
        self._original = control.forward
        self._kept: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._tick, self._ordinal = -1, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The ControlNet's forward under the plan. It is called before the network, which begins the run."""
        network, clock = self._network, self._clock
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        network.locate(timestep)
        if clock.tick != self._tick:
            self._tick, self._ordinal = clock.tick, 0
        stream, self._ordinal = (clock.stage, self._ordinal), self._ordinal + 1
        assert network.layout is not None
        if clock.index == 0 and self._ordinal == 1 and clock.stage == 0:
            self._kept.clear()
        step, signature = network.layout[clock.index], (shapes(args[:1] + args[2:]), shapes(kwargs))
        kept = self._kept.get(stream)
        if step.keeps_control and kept is not None and kept[0] == signature:
            network.ledger.control_reused += 1
            return kept[1]
        network.ledger.control_runs += 1
        result = self._original(*args, **kwargs)
        if any(later.keeps_control for later in network.layout.steps[clock.index + 1 :]):
            self._kept[stream] = (signature, result)
        else:
            self._kept.pop(stream, None)
        return result
