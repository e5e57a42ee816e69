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
"""Share of the peak rate, in the precision that is trained in, that training is assumed to reach; printed with what rests on it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its makers' figures. Rates are dense peaks in 10^12 operations a second; two are a multiply-add.

    Attributes:
        name: As people call it.
        float32_teraflops: Of its plain units in float32. From Ampere on PyTorch by default lets matrix units of TF32 do convolutions,
            though not matrix products, so a network of convolutions may be faster; this figure promises nothing of that.
        bf16_teraflops: Of its matrix units in bf16 with sums in float32; that of float32 where it has none for bf16.
        memory_gib: Its memory.
    """

    name: str
    float32_teraflops: float
    bf16_teraflops: float
    memory_gib: float

    @property
    def has_bf16(self) -> bool:
        """Whether it has units for bf16; without, PyTorch calculates in float32 what it is told to in bf16."""
        return self.bf16_teraflops > self.float32_teraflops

    def teraflops(self, precision: str) -> float:
        """Peak rate in "float32" or "bf16"."""
        return {"float32": self.float32_teraflops, "bf16": self.bf16_teraflops}[precision]

    def hours(self, multiply_adds: float, utilisation: float, precision: str) -> float:
        """Hours of that many multiply-adds in "float32" or "bf16"."""
        return 2 * multiply_adds / (self.teraflops(precision) * 1e12 * utilisation) / 3600


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 8.1, 8.1, 16),
        Gpu("V100", 15.7, 15.7, 32),
        Gpu("RTX3090", 35.6, 71, 24),
        Gpu("RTX4090", 82.6, 165, 24),
        Gpu("L4", 30.3, 121, 24),
        Gpu("A100", 19.5, 312, 80),
        Gpu("H100", 67, 989, 80),
        Gpu("H200", 67, 989, 141),
    )
}
"""Makers' data sheets, SXM where there is one, without sparsity. The matrix units of T4 and V100 are for fp16, unused here."""


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
