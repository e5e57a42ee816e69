"""What running networks takes: multiply-adds, and the memory of what autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, convolutions and attention that run within it; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet.__name__ in _ATTENTION:  # PyTorch's own counter does not know these
            self.total += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape) // 2
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=result) // 2
        return result


class SavedMemory:
    """Most bytes that autograd keeps at any moment within it, each storage once; weights among them.

    with SavedMemory() as saved:
        loss(network(x)).backward()
    saved.peak_bytes
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self._holders: dict[int, int] = {}
        self._hooks: Any = None

    def __enter__(self) -> SavedMemory:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), _Held.give)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def hold(self, storage: int, size: int) -> None:
        """One more holder of a storage."""
        if storage not in self._holders:
            self._bytes += size
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        self._holders[storage] = self._holders.get(storage, 0) + 1

    def release(self, storage: int, size: int) -> None:
        """One holder less."""
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self._bytes -= size


class _Held:
    """A tensor that autograd keeps; forgets it when autograd does."""

    def __init__(self, memory: SavedMemory, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._memory, self._tensor, self._key = memory, tensor, (storage.data_ptr(), storage.nbytes())
        memory.hold(*self._key)

    def give(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._memory.release(*self._key)


def num_parameters(modules: Iterable[nn.Module], *, trained: bool | None = None) -> int:
    """Parameters of modules, each once; only those with (True) or without (False) a gradient where asked."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in found.values() if trained is None or p.requires_grad is trained)
