"""Where training runs: device, precision and processes, through accelerate; injected, so that distributed code has a single-process twin.

Gradients are averaged explicitly, once a step, rather than by a wrapper around the network: several networks, frozen parts, several
forward passes and adaptive weights then need no special care, and two processes compute exactly what one does with twice the batch.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagoda.errors import ConfigError

PRECISIONS = ("auto", "float32", "bf16")


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in float32 on this CPU: whether it has instructions for them (AMX or AVX512_BF16)."""
    # PyTorch has no public name for either in all versions that we support.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_precision(precision: str, *, on_cpu: bool) -> str:
    """ "float32" or "bf16": what a setting becomes on this CPU, or on a GPU.

    Raises:
        ConfigError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    if precision == "auto":
        return "bf16" if on_cpu and cpu_has_bf16() else "float32"
    return precision


class Runtime:
    """Device, precision and communication of this process.

    Args:
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        precision: "float32"; "bf16", which is autocast, on a GPU or on a CPU with hardware for it; "auto" (bf16 on such a CPU,
            float32 everywhere else).

    Attributes:
        precision: "float32" or "bf16": what "auto" has become.

    Raises:
        ConfigError: an unknown device or precision, CUDA without a GPU, bf16 on a CPU without hardware for it (it is slower there).
    """

    def __init__(self, device: str = "auto", precision: str = "float32") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}.")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self.precision = resolve_precision(precision, on_cpu=on_cpu)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda was asked for, but PyTorch sees no GPU. Use device=auto or device=cpu.")
        if precision == "bf16" and on_cpu and not cpu_has_bf16():
            raise ConfigError(
                "precision=bf16 is slower than float32 on this CPU, which has no instructions for it (AMX or AVX512_BF16). "
                "Use precision=float32 or precision=auto, or a GPU."
            )
        self._state = PartialState(cpu=on_cpu)
        # accelerate keeps one state for the whole process: a second Runtime would be given the first one's device.
        alone = self._state.num_processes == 1
        self._device = torch.device("cpu" if on_cpu else "cuda") if alone else self._state.device
        if self._device.type != ("cpu" if on_cpu else "cuda"):
            raise ConfigError(
                f"the processes of this run communicate for {self._device.type} already; device={device} needs a new start."
            )
        if not alone:
            _leave_at_exit()

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self._device

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self._state.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._state.num_processes

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()

    def alone(self) -> Runtime:
        """This process as if there were no others: for work that one process does while the others wait."""
        return _Alone(self)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision for forward passes; does nothing in float32."""
        if self.precision != "bf16":
            yield
        elif self.device.type == "cpu":
            # The backward pass of fused attention takes 20 times as long in bf16 as in float32; matrix products are fast.
            with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a global batch.

        Raises:
            ConfigError: the processes do not divide the batch.
        """
        if batch_size % self.world_size:
            raise ConfigError(
                f"batch_size {batch_size} is not divisible by {self.world_size} processes. "
                f"Use a multiple of {self.world_size}."
            )
        share = batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over processes (a new tensor; the same one when there is a single process)."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks, without gradient; the same tensor for a single process."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order, on the CPU; they may differ in their first length."""
        if self.world_size == 1:
            return [tensor]
        length = torch.tensor([len(tensor)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        torch.distributed.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor.to(self.device)
        parts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        return [part[: int(n)].cpu() for part, n in zip(parts, lengths, strict=True)]

    def mean_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients over processes in place, in one message."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = self.mean(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class _Alone(Runtime):
    """One process of several that communicates with none."""

    def __init__(self, runtime: Runtime) -> None:
        self._device = runtime.device
        self.precision = runtime.precision

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def barrier(self) -> None:
        """Nobody is waited for."""


@lru_cache(maxsize=1)
def _leave_at_exit() -> None:
    """Leave the group before the interpreter ends: threads of it that live longer abort the process, now and then."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


@lru_cache(maxsize=1)
def single_process() -> Runtime:
    """The default runtime: one process on the best device, float32."""
    return Runtime()
