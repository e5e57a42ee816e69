"""Where a network is measured, and in what numbers: a GPU in bf16 where one is at hand, else the CPU in float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """A device, "cpu" or "cuda", and the numbers that weights and inputs are in there, "float32" or "bf16"."""

    device: str
    precision: str

    @property
    def on_gpu(self) -> bool:
        """Whether calls return before their work is done, and memory is the GPU's."""
        return self.device == "cuda"

    def bring(self, module: nn.Module) -> None:
        """Move a network here in place, its weights in these numbers; in float32 nothing is cast, float64 included."""
        nn.Module.to(module, self.device)
        if self.precision == "bf16":
            nn.Module.to(module, torch.bfloat16)

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor here; floats in these numbers, integers as they are."""
        return value.to(self.device, DTYPES[self.precision] if value.is_floating_point() else None)

    def synchronise(self) -> None:
        """Wait until everything that was called is done; nothing to wait for on a CPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        """What a call takes, from when nothing before it is under way to when its own work is done."""
        self.synchronise()
        start = time.perf_counter()
        call()
        self.synchronise()
        return time.perf_counter() - start


def choose_place(device: str = "auto", precision: str = "auto") -> Place:
    """Where to measure.

    Args:
        device: "cpu", "cuda", or "auto": a GPU where PyTorch sees one. An empty CUDA_VISIBLE_DEVICES hides all of them.
        precision: "float32", "bf16", or "auto": bf16 on a GPU with units for it, float32 everywhere else.

    Raises:
        ConfigError: neither of these, or CUDA without a GPU.
    """
    for name, value, known in (("device", device, ("cpu", "cuda")), ("precision", precision, tuple(DTYPES))):
        if value not in ("auto", *known):
            raise ConfigError(f"{name} must be one of {('auto', *known)}, got {value!r}.")
    seen = torch.cuda.is_available()
    if device == "cuda" and not seen:
        raise ConfigError("device=cuda was asked for, but PyTorch sees no GPU. Use device=auto or device=cpu.")
    if device == "auto":
        device = "cuda" if seen else "cpu"
    if precision == "auto":
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast else "float32"
    return Place(device, precision)
