"""What a run cost: steps by kind, multiply-adds, seconds, bytes held."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pagoda.acceleration.plan import KINDS


@dataclass
class Call:
    """One call of the network."""

    index: int
    kind: str
    multiply_adds: int | None
    """None where they could not be counted (compiled networks)."""
    tokens: float = 1.0
    plain_share: float = 1.0
    """Share of this call that a plain call would have cost: less than 1 where decoders of later steps ran in it."""
    forced: bool = False
    """Everything was computed although the plan said otherwise, because shapes had changed."""
    _seconds: float | None = None
    _events: tuple[Any, Any] | None = None

    @property
    def seconds(self) -> float:
        """Time of the call; on a GPU, of its kernels."""
        if self._events is not None:
            self._events[1].synchronize()
            self._seconds, self._events = self._events[0].elapsed_time(self._events[1]) / 1000, None
        return self._seconds or 0.0


@dataclass
class Ledger:
    """The calls of one run of one network."""

    plan: str = ""
    network: str = ""
    num_steps: int = 0
    calls: list[Call] = field(default_factory=list)
    bytes_held: int = 0
    """Most memory that kept features took at any moment."""
    control_runs: int = 0
    control_reused: int = 0

    @contextlib.contextmanager
    def timed(self, call: Call, device: torch.device) -> Iterator[None]:
        """Time what runs within, as `call`."""
        if device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            call._events = events
        else:
            start = time.perf_counter()
            yield
            call._seconds = time.perf_counter() - start
        self.calls.append(call)

    def facts(self) -> dict[str, Any]:
        """Everything that `str` shows, as numbers.

        Keys: steps (by kind), calls, multiply_adds, multiply_adds_plain, multiply_adds_saved, seconds, seconds_plain, seconds_saved
        (the last three of the network's calls), phases (the same by kind of step), bytes_held, forced.
        """
        full = [call for call in self.calls if call.kind == "full"]
        plain_time = statistics.median([call.seconds * call.plain_share for call in full]) if full else 0.0
        counted = bool(self.calls) and all(call.multiply_adds is not None for call in self.calls)
        plain_macs = statistics.median([(call.multiply_adds or 0) * call.plain_share for call in full]) if full else 0
        phases: dict[str, dict[str, float]] = {}
        for kind in KINDS:
            calls = [call for call in self.calls if call.kind == kind]
            if calls:
                phases[kind] = {
                    "calls": len(calls),
                    "steps": len({call.index for call in calls}),
                    "multiply_adds": float(sum(call.multiply_adds or 0 for call in calls)) if counted else float("nan"),
                    "seconds": sum(call.seconds for call in calls),
                    "multiply_adds_saved": float(len(calls) * plain_macs - sum(c.multiply_adds or 0 for c in calls))
                    if counted
                    else float("nan"),
                    "seconds_saved": len(calls) * plain_time - sum(call.seconds for call in calls),
                }
        total = {name: sum(phase[name] for phase in phases.values()) for name in ("multiply_adds", "seconds")}
        plain = {"multiply_adds": len(self.calls) * float(plain_macs), "seconds": len(self.calls) * plain_time}
        return {
            "network": self.network,
            "num_steps": self.num_steps,
            "steps": {kind: int(phase["steps"]) for kind, phase in phases.items()},
            "calls": len(self.calls),
            "multiply_adds": total["multiply_adds"],
            "multiply_adds_plain": plain["multiply_adds"] if counted else float("nan"),
            "multiply_adds_saved": 1 - total["multiply_adds"] / plain["multiply_adds"]
            if counted and plain["multiply_adds"]
            else float("nan"),
            "seconds": total["seconds"],
            "seconds_plain": plain["seconds"],
            "seconds_saved": 1 - total["seconds"] / plain["seconds"] if plain["seconds"] else 0.0,
            "phases": phases,
            "bytes_held": self.bytes_held,
            "forced": sum(call.forced for call in self.calls),
        }

    def __str__(self) -> str:
        facts = self.facts()
        lines = [f"{self.plan}", f"{self.network}, {self.num_steps} steps, {facts['calls']} calls"]
        lines.append(
            f"{'kind':8}  {'steps':>5}  {'calls':>5}  {'G multiply-adds':>15}  {'saved':>9}  {'seconds':>8}  {'saved':>8}"
        )
        for kind, phase in facts["phases"].items():
            lines.append(
                f"{kind:8}  {phase['steps']:5.0f}  {phase['calls']:5.0f}  {phase['multiply_adds'] / 1e9:15.3f}  "
                f"{phase['multiply_adds_saved'] / 1e9:9.3f}  {phase['seconds']:8.3f}  {phase['seconds_saved']:8.3f}"
            )
        saved = facts["multiply_adds_saved"]
        counted = (
            f"{saved:.1%} of the multiply-adds" if saved == saved else "multiply-adds not counted (compiled network)"
        )
        lines.append(f"saved: {counted}, {facts['seconds_saved']:.1%} of the network's time")
        lines.append(f"kept features: {self.bytes_held / 2**20:.2f} MiB at most")
        if facts["forced"]:
            lines.append(f"computed in full against the plan, because shapes had changed: {facts['forced']} calls")
        if self.control_runs:
            lines.append(f"ControlNet: ran {self.control_runs} times, reused {self.control_reused} times")
        return "\n".join(lines)


def num_bytes(value: Any) -> int:
    """Memory of all tensors in a nest of tuples, lists, dictionaries."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(num_bytes(item) for item in value.values())
    if isinstance(value, tuple | list):
        return sum(num_bytes(item) for item in value)
    return int(getattr(value, "bytes", 0))
