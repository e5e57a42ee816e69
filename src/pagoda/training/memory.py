"""How much memory this process takes: the most so far, and the most while something runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory used so far in MiB: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float("nan")  # `resource` does not exist there
    # `resource` also counts what the parent held when it started this process: Linux keeps that figure over exec.
    if (peak_bytes := _read("VmHWM")) is not None:
        return peak_bytes / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def resident_bytes(device: torch.device) -> int | None:
    """Memory that is taken now: of the GPU's allocator, or of the whole process on a CPU under Linux; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _read("VmRSS")


class PeakMemory:
    """The most memory that is taken at any moment within it, in `bytes`; None where the system does not tell.

    with PeakMemory(device) as peak:
        step()
    peak.bytes

    As `resident_bytes` counts. It begins `peak_memory_mib` anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._reset = False

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._reset = True
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text("5", encoding="ascii")  # the peak is what is taken now
                self._reset = True
            except OSError:  # a container may keep it read-only
                self._reset = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reset:
            on_gpu = self.device.type == "cuda"
            self.bytes = torch.cuda.max_memory_allocated(self.device) if on_gpu else _read("VmHWM")


def _read(name: str) -> int | None:
    """A figure in bytes of what Linux tells about this process; None where there is no such file or line."""
    if not _STATUS.is_file():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return None if found is None else int(found[1]) * 2**10
