"""Switch masks: a few small experts a block, chosen by the noise level, say how much of each channel the block sees.

    m = 1 + sum over the k likeliest experts e of p_e(t) (W_e x + b_e),    Block(x) = x + F(x)    becomes    x + F(m * x)

The experts start at zero, so the network starts as the plain one.

Source: Park et al. 2024, Switch-DiT, arXiv:2403.09176, section 3.2 and its code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ConfigError
from pagoda.networks.extension import Extension
from pagoda.networks.parts import Context

MERGED_UP_TO = 4
"""Experts are merged into one layer a sample where the width is at most this many times the number of tokens: half of the
multiply-adds, for weights (B, D, D) that the backward pass keeps."""


class SwitchMasks(Extension):
    """Gates by noise level and experts of one linear layer each, in every block of a DiT.

    Args:
        num_experts: M, experts a block.
        top_k: k of them are used at one noise level.

    Raises:
        ConfigError: k outside 1..M; at `attach`: a network without transformer blocks.
    """

    def __init__(self, *, num_experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k must lie in 1..num_experts ({num_experts}), got {top_k}.")
        self.num_experts, self.top_k = num_experts, top_k
        self._frozen: tuple[Tensor, Tensor] | None = None

    def attach(self, net: Any) -> None:
        depth, dim = len(_blocks(net)), int(net.inner_dim)
        self.gates = nn.ModuleList(nn.Linear(dim, self.num_experts) for _ in range(depth))
        for gate in self.gates:
            nn.init.xavier_uniform_(gate.weight)  # type: ignore[arg-type]  # equal gates would leave the choice to chance
            nn.init.zeros_(gate.bias)  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.zeros(depth, self.num_experts, dim, dim))
        self.bias = nn.Parameter(torch.zeros(depth, self.num_experts, dim))

    def probabilities(self, net: Any, t: Tensor, block: int) -> Tensor:
        """Gate of one block at time inputs (B,): (B, M) float32, rows sum to 1."""
        if self._frozen is not None:
            times, table = self._frozen
            same = t[:, None] == times
            if bool(same.any(1).all()):
                return table[same.float().argmax(1), block]
        embedder = net.transformer_blocks[block].norm1.emb
        with torch.autocast(t.device.type, enabled=False):  # half precision may lose an expert altogether
            tau = embedder.timestep_embedder(embedder.time_proj(t).to(embedder.timestep_embedder.linear_1.weight.dtype))
            return self.gates[block](F.silu(tau)).float().softmax(1)

    def routing_map(self, net: Any, t: Tensor) -> Tensor:
        """Gates of all blocks at time inputs (B,): (B, L, M)."""
        return torch.stack([self.probabilities(net, t, block) for block in range(len(self.gates))], dim=1)

    @contextlib.contextmanager
    def frozen(self, net: Any, times: Tensor) -> Iterator[None]:
        """Inside, gates at these time inputs (n,) are looked up; other times are computed as before."""
        with torch.no_grad():
            self._frozen = (times, self.routing_map(net, times))
        try:
            yield
        finally:
            self._frozen = None

    def mix(self, hidden: Tensor, probabilities: Tensor, block: int) -> Tensor:
        """Sum of the chosen experts' outputs (B, N, D).

        All tokens of a sample choose the same experts, so that these are one linear layer for it: sum of p_e W_e. Where that would take
        much memory (`MERGED_UP_TO`), each expert runs on the samples that chose it.

        Args:
            hidden: (B, N, D).
            probabilities: (B, M).
            block: Which block's experts.
        """
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(self.top_k, dim=1).indices, 1.0)
        if hidden.shape[2] <= MERGED_UP_TO * hidden.shape[1]:
            gates = (probabilities * chosen).to(self.weight.dtype)
            weight = torch.einsum("bm,mij->bij", gates, self.weight[block])
            return torch.baddbmm((gates @ self.bias[block])[:, None], hidden, weight.transpose(1, 2))
        total = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            rows = chosen[:, expert].nonzero().flatten()
            if len(rows):
                output = F.linear(hidden[rows], self.weight[block, expert], self.bias[block, expert])
                total = total.index_add(0, rows, (probabilities[rows, expert, None, None] * output).to(total.dtype))
        return total

    def input_mask(self, net: Any, part: str, hidden: Tensor, context: Context) -> Tensor | None:
        block = int(part.removeprefix("block."))
        return 1 + self.mix(hidden, self.probabilities(net, context.time, block), block)


class LinearMasks(Extension):
    """Switch masks at one noise level: the experts of a block are one linear layer then. What a one-step generator needs."""

    def attach(self, net: Any) -> None:
        depth, dim = len(_blocks(net)), int(net.inner_dim)
        self.weight = nn.Parameter(torch.zeros(depth, dim, dim))
        self.bias = nn.Parameter(torch.zeros(depth, dim))

    def input_mask(self, net: Any, part: str, hidden: Tensor, context: Context) -> Tensor | None:
        block = int(part.removeprefix("block."))
        return 1 + F.linear(hidden, self.weight[block], self.bias[block])


def _blocks(net: Any) -> Any:
    if not hasattr(net, "transformer_blocks"):
        raise ConfigError(
            f"switch masks need transformer blocks, and `{type(net).__name__}` has none. Use backbone.kind=dit."
        )
    return net.transformer_blocks
