"""What a machine can do: memory and disk of this one, public peak rates of GPUs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch

from pagoda.errors import ConfigError, did_you_mean
from pagoda.training import Runtime

UTILISATION = 0.3
"""Share of the peak rate that training is assumed to reach; printed with every figure that rests on it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its makers' figures.

    Attributes:
        name: As people call it.
        teraflops: Dense peak rate of its matrix units in 16-bit floats, in 10^12 operations a second; two are a multiply-add.
        memory_gib: Its memory.
    """

    name: str
    teraflops: float
    memory_gib: float

    def hours(self, multiply_adds: float, utilisation: float) -> float:
        """Hours of that many multiply-adds."""
        return 2 * multiply_adds / (self.teraflops * 1e12 * utilisation) / 3600


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 65, 16),
        Gpu("V100", 125, 32),
        Gpu("RTX3090", 71, 24),
        Gpu("RTX4090", 165, 24),
        Gpu("L4", 121, 24),
        Gpu("A100", 312, 80),
        Gpu("H100", 989, 80),
        Gpu("H200", 989, 141),
    )
}
"""Makers' data sheets: fp16 for T4 and V100, bf16 with float32 sums for the others, without sparsity."""


def find_gpu(name: str) -> Gpu:
    """A GPU of the table, whatever its letters' case.

    Raises:
        ConfigError: it is not in the table.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise ConfigError(f"unknown GPU {name!r}. {did_you_mean(name, GPUS)}")
    return known[name.lower()]


@dataclass(frozen=True)
class Limits:
    """What there is to use, in bytes."""

    disk_bytes: int
    memory_bytes: int

    @classmethod
    def of_machine(cls, folder: Path | str, runtime: Runtime) -> Limits:
        """Free space on the disk of `folder`, which need not exist, and free memory of the device."""
        path = Path(folder).absolute()
        while not path.exists():
            path = path.parent
        on_gpu = runtime.device.type == "cuda"
        memory = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else psutil.virtual_memory().available
        return cls(shutil.disk_usage(path).free, int(memory))
