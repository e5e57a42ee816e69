"""Sparse experts in place of a DiT's feed-forward layers: many experts, of which every token uses a few.

    MoE(h) = sum over the K experts with the largest scores of score_i(h) Expert_i(h)  +  Shared(h),    score = softmax(W h)

Source: Fei et al. 2024, DiT-MoE, arXiv:2407.11633, section 3 and its code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ConfigError, TrainingError
from pagoda.networks.extension import Extension

KINDS = ("swiglu", "gelu")
ROUTINGS = ("token", "expert")


class Experts(nn.Module):
    """`num` feed-forward networks of equal size, their weights in one tensor each.

    Args:
        num: How many.
        dim: Width of a token.
        hidden: Inner width.
        kind: swiglu: down(silu(gate(h)) * up(h)), without biases. gelu: down(gelu(up(h))) with biases, a DiT's own layer.
    """

    def __init__(self, num: int, dim: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.num, self.hidden, self.kind = num, hidden, kind
        inner = 2 * hidden if kind == "swiglu" else hidden
        self.up = nn.Parameter(torch.empty(num, inner, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.down = nn.Parameter(torch.empty(num, dim, hidden).uniform_(-1, 1) / math.sqrt(hidden))
        if kind == "gelu":
            self.up_bias = nn.Parameter(torch.zeros(num, inner))
            self.down_bias = nn.Parameter(torch.zeros(num, dim))

    def run_each(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Every expert on tokens of its own, n of (..., D); an expert without tokens does nothing."""
        # One `unbind` for all: the gradient of `up[expert]` would be as large as `up`, once for each expert.
        weights = zip(
            *(parameter.unbind(0) for parameter in self._parameters.values() if parameter is not None), strict=True
        )
        return [self._run(mine, *own) if mine.numel() else mine for mine, own in zip(tokens, weights, strict=True)]

    def _run(self, tokens: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        """One expert."""
        if biases:
            inner = F.gelu(F.linear(tokens, up, biases[0]), approximate="tanh")
            return F.linear(inner, down, biases[1])
        gate, value = F.linear(tokens, up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, down)

    def run_all(self, tokens: Tensor) -> Tensor:
        """Every expert on as many tokens of its own (num, n, D), in two batched products."""
        if self.kind == "gelu":
            inner = F.gelu(torch.baddbmm(self.up_bias[:, None], tokens, self.up.mT), approximate="tanh")
            return torch.baddbmm(self.down_bias[:, None], inner, self.down.mT)
        gate, up = torch.bmm(tokens, self.up.mT).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down.mT)


class SparseExperts(nn.Module):
    """A feed-forward layer of routed and shared experts; tokens (B, N, D) -> (B, N, D).

    With routing "token" every token chooses its experts, so nothing depends on the rest of the batch. With "expert" every expert
    chooses its share of the tokens of each sample: perfectly balanced, and independent of the other samples, not of the
    sample's other tokens. Differentiable in training and in evaluation mode.
    """

    def __init__(self, dim: int, options: ExpertOptions) -> None:
        super().__init__()
        self.options, self.soft = options, False
        self.router = nn.Linear(dim, options.num_experts, bias=False)
        self.experts = Experts(options.num_experts, dim, round(options.width * dim), options.kind)
        width = round(options.shared_width * options.num_shared * dim)
        self.shared = Experts(1, dim, width, options.kind) if width else None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """diffusers' block hands tokens only."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = scores_of(self.router(hidden.to(self.router.weight.dtype)))
        by_expert = self.options.routing == "expert" and not self.soft
        output = self._by_expert(hidden, scores) if by_expert else self._by_token(hidden, scores)
        return output if self.shared is None else output + self.shared.run_each([hidden])[0]

    def _by_token(self, hidden: Tensor, scores: Tensor) -> Tensor:
        """Tokens sorted by expert, one slice an expert."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = choose(scores.reshape(len(tokens), -1), self.options, soft=self.soft)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.options.num_experts).tolist()
        # A copy of the token for each of its experts: sorting those there and back has one order of sums on every device.
        copies = tokens.repeat_interleave(chosen.shape[1], dim=0).index_select(0, order)
        made = torch.cat(self.experts.run_each(copies.split(counts))).index_select(0, order.argsort())
        output = (weights[..., None] * made.reshape(*chosen.shape, -1)).sum(1)
        return output.to(hidden.dtype).reshape(hidden.shape)

    def _by_expert(self, hidden: Tensor, scores: Tensor) -> Tensor:
        """Every expert takes the same number of tokens of each sample, those that score highest for it."""
        batch, count, dim = hidden.shape
        share = min(count, math.ceil(count * self.options.top_k / self.options.num_experts))
        weight, rows = scores.transpose(1, 2).topk(share, dim=2)  # (B, n, share)
        index = rows[..., None].expand(-1, -1, -1, dim)
        picked = hidden[:, None].expand(-1, self.options.num_experts, -1, -1).gather(2, index)
        made = self.experts.run_all(picked.transpose(0, 1).reshape(self.options.num_experts, -1, dim))
        made = made.reshape(self.options.num_experts, batch, share, dim).transpose(0, 1) * weight[..., None]
        return torch.zeros_like(hidden).scatter_add(
            1, rows.flatten(1)[..., None].expand(-1, -1, dim), made.flatten(1, 2).to(hidden.dtype)
        )


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Shape of a layer of experts.

    Raises:
        ConfigError: counts or widths out of range, or an unknown kind or routing.
    """

    num_experts: int = 8
    top_k: int = 2
    num_shared: int = 2
    kind: str = "swiglu"
    width: float = 4.0
    shared_width: float = 1.0
    norm_topk: bool = False
    routing: str = "token"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k must lie in 1..num_experts ({self.num_experts}), got {self.top_k}.")
        if self.num_shared < 0 or not self.width > 0 or not self.shared_width >= 0:
            raise ConfigError(
                f"num_shared and shared_width must be >= 0 and width > 0, got {self.num_shared}, {self.shared_width} "
                f"and {self.width}."
            )
        if self.kind not in KINDS or self.routing not in ROUTINGS:
            raise ConfigError(
                f"kind must be one of {KINDS} and routing one of {ROUTINGS}, got {self.kind!r} and {self.routing!r}."
            )


def scores_of(logits: Tensor) -> Tensor:
    """Scores (..., n) that sum to 1, in float32 at least.

    Raises:
        TrainingError: logits that are not numbers: the choice of experts would be arbitrary.
    """
    scores = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
    if not torch.isfinite(scores).all():
        raise TrainingError(
            "the router of a layer of experts gives values that are not finite; the network has diverged."
        )
    return scores


def choose(scores: Tensor, options: ExpertOptions, *, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token (T, K); all of them with `soft`, which has no jumps.

    Args:
        scores: (T, n).
    """
    weights, chosen = scores.topk(options.num_experts if soft else options.top_k, dim=1)
    return (weights / weights.sum(1, keepdim=True) if options.norm_topk else weights), chosen


class ExpertLayers(Extension):
    """Layers of experts in place of the feed-forward layers of some blocks of a DiT.

    Args:
        layers: all, deep_half, or numbers of blocks.
        upcycle: Start every expert as the feed-forward layer that it takes the place of; with kind "gelu", width 4, routing
            "token" and `norm_topk` the network starts as it was, since the shared experts then start at zero.
        options: See `ExpertOptions`.

    Raises:
        ConfigError: a network without transformer blocks, a block that it does not have, `upcycle` with options that change the network.
    """

    def __init__(self, *, layers: str | Sequence[int] = "all", upcycle: bool = False, **options: Any) -> None:
        super().__init__()
        self.options = ExpertOptions(**options)
        self.layers, self.upcycle = layers, upcycle
        same = self.options.kind == "gelu" and self.options.norm_topk and self.options.width == 4.0
        if upcycle and not (same and self.options.routing == "token"):
            raise ConfigError(
                "upcycle needs kind=gelu, width=4, routing=token and norm_topk=true: only then does the network start as it was."
            )

    def attach(self, net: Any) -> None:
        if not hasattr(net, "transformer_blocks"):
            raise ConfigError(
                f"experts need transformer blocks, and `{type(net).__name__}` has none. Use backbone.kind=dit."
            )
        for block in self.blocks(net):
            net.transformer_blocks[block].ff = SparseExperts(int(net.inner_dim), self.options)

    def blocks(self, net: Any) -> list[int]:
        """Numbers of the blocks that have experts."""
        depth = len(net.transformer_blocks)
        if isinstance(self.layers, str):
            if self.layers not in ("all", "deep_half"):
                raise ConfigError(f"layers must be all, deep_half or numbers of blocks, got {self.layers!r}.")
            return list(range(depth // 2 if self.layers == "deep_half" else 0, depth))
        wrong = [number for number in self.layers if not 0 <= number < depth]
        if wrong:
            raise ConfigError(f"there is no block {wrong[0]}; blocks are 0 to {depth - 1}.")
        return sorted(set(self.layers))

    def owned(self, net: Any) -> Sequence[str]:
        return [f"transformer_blocks.{block}.ff." for block in self.blocks(net)]

    @torch.no_grad()
    def inherit(self, net: Any, base: Any) -> None:
        if not self.upcycle:
            return
        for block in self.blocks(net):
            dense, sparse = base.transformer_blocks[block].ff.net, net.transformer_blocks[block].ff
            sparse.experts.up.copy_(dense[0].proj.weight.expand_as(sparse.experts.up))
            sparse.experts.up_bias.copy_(dense[0].proj.bias.expand_as(sparse.experts.up_bias))
            sparse.experts.down.copy_(dense[2].weight.expand_as(sparse.experts.down))
            sparse.experts.down_bias.copy_(dense[2].bias.expand_as(sparse.experts.down_bias))
            if sparse.shared is not None:
                sparse.shared.down.zero_()


def expert_layers(model: nn.Module) -> list[SparseExperts]:
    """The layers of experts of a model, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, SparseExperts)]


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list receives the router's logits (B, N, n) of every layer of experts that runs, in order, with gradients."""
    logits: list[Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda _, __, output: logits.append(output))
        for layer in expert_layers(model)
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def soft_routing(model: nn.Module) -> Iterator[None]:
    """Inside, every token uses all experts by their scores: no jumps, for inversion; it costs what all experts cost."""
    before = [(layer, layer.soft) for layer in expert_layers(model)]
    for layer, _ in before:
        layer.soft = True
    try:
        yield
    finally:
        for layer, soft in before:
            layer.soft = soft


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that one token uses: K of the n experts of each layer."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in expert_layers(model):
        size = sum(parameter.numel() for parameter in layer.experts.parameters())
        idle += size * (layer.options.num_experts - layer.options.top_k) // layer.options.num_experts
    return total, total - idle
