"""DiT-MoE: layers of many experts, of which every token uses a few, with a loss that keeps all of them in use.

    balance of one layer = sum over experts of f_i P_i,    f_i = n * share of the choices that fell on i,    P_i = mean score of i

It is 1 where all experts are used alike, and grows towards n when they collapse to one; its gradient goes through P alone.

Source: Fei et al. 2024, arXiv:2407.11633, section 3.2 and its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork
from pagoda.networks.experts import ExpertLayers, ExpertOptions, choose, record_routing, scores_of
from pagoda.networks.extended import extend_model
from pagoda.pretraining.config import TechniqueConfig
from pagoda.training import Penalty, Runtime, Setup, Technique, TechniqueStep

SCOPES = ("global", "batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class DitMoeConfig(TechniqueConfig):
    """Sparse mixture of experts."""

    name: ClassVar[str] = "dit_moe"
    title: ClassVar[str] = "sparse experts in place of feed-forward layers: more weights at the cost of a few"
    needs: ClassVar[str] = "a DiT"
    paper: ClassVar[str] = "arXiv:2407.11633"

    num_experts: int = 8
    """Routed experts a layer."""
    top_k: int = 2
    """Experts that a token uses."""
    num_shared: int = 2
    """Shared experts, which every token uses: one network of num_shared * shared_width times the width of a token."""
    kind: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu without biases, as in the paper, or gelu with biases, as in a DiT."""
    width: float = 4.0
    """Inner width of a routed expert, in widths of a token."""
    shared_width: float = 1.0
    """Inner width of each shared expert, in widths of a token."""
    norm_topk: bool = False
    """Make the weights of a token's experts sum to 1 (the paper does not)."""
    routing: Literal["token", "expert"] = "token"
    """Who chooses: tokens, or experts among the tokens of each sample (balanced by itself: no loss)."""
    layers: str = "all"
    """Blocks with experts: all, deep_half, none, or numbers such as `2,3`."""
    upcycle: bool = False
    """Start every expert as the dense layer that it replaces; needs kind=gelu, width=4 and norm_topk."""
    balance_weight: float = 0.005
    """Factor of the sum of the layers' balance losses; 0 leaves it out."""
    balance_scope: Literal["global", "batch", "sequence"] = "global"
    """Shares of the choices over all processes, over this one's rows, or over each sample alone."""

    def __post_init__(self) -> None:
        if self.balance_weight < 0 or self.balance_scope not in SCOPES:
            raise ConfigError(
                f"dit_moe.balance_weight must be >= 0 and balance_scope one of {SCOPES}, "
                f"got {self.balance_weight} and {self.balance_scope!r}."
            )
        ExpertLayers(layers=self._layers() or [], upcycle=self.upcycle, **asdict(self.options))

    @property
    def options(self) -> ExpertOptions:
        """The shape of a layer."""
        names = ("num_experts", "top_k", "num_shared", "kind", "width", "shared_width", "norm_topk", "routing")
        return ExpertOptions(**{name: getattr(self, name) for name in names})

    def _layers(self) -> str | list[int] | None:
        """`layers` as the network wants it; None for none."""
        if self.layers in ("all", "deep_half"):
            return self.layers
        if self.layers == "none":
            return None
        try:
            return [int(number) for number in str(self.layers).split(",")]
        except ValueError:
            raise ConfigError(
                f"dit_moe.layers must be all, deep_half, none, or numbers of blocks such as `2,3`; got {self.layers!r}."
            ) from None

    def build(self) -> ExpertRouting:
        return ExpertRouting(self)


class ExpertRouting(Technique):
    """See `DitMoeConfig`."""

    name = "dit_moe"

    def __init__(self, config: DitMoeConfig) -> None:
        self.config = config

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        layers = self.config._layers()
        if layers is None:
            return network
        options = {"layers": layers, "upcycle": self.config.upcycle, **asdict(self.config.options)}
        with setup.own_weights(self.name):
            return DiffusersNetwork(extend_model(network, "experts", options))

    def watch(self, network: DiffusersNetwork) -> AbstractContextManager[Any]:
        return record_routing(network)

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        if not step.watched:
            return {}
        config, losses, loads = self.config, [], []
        for logits in step.watched:
            scores = scores_of(logits)
            _, chosen = choose(scores.flatten(0, 1), config.options)
            loads.append(load_of(chosen, config.num_experts))
            losses.append(balance_loss(scores, chosen, config.balance_scope, step.runtime))
        load = torch.stack(loads)  # (layers, experts), 1 = its fair share
        found = {
            "largest_load": Penalty(load.max()),
            "unused_experts": Penalty((load == 0).float().sum()),
        }
        if config.routing == "token":
            found["balance"] = Penalty(torch.stack(losses).sum(0), config.balance_weight)
        return found


def load_of(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen (n,), 1 = its fair share."""
    return num_experts * chosen.flatten().bincount(minlength=num_experts).float() / chosen.numel()


def balance_loss(scores: Tensor, chosen: Tensor, scope: str, runtime: Runtime) -> Tensor:
    """Balance of one layer, a scalar: 1 at perfect balance, at most the number of experts.

    Args:
        scores: (B, N, n), with gradients.
        chosen: (B N, K).
        scope: See `DitMoeConfig.balance_scope`.
        runtime: Shares are averaged over its processes where the scope is global.
    """
    count = scores.shape[-1]
    if scope == "sequence":
        picked = (
            torch.zeros_like(scores).flatten(0, 1).scatter_add(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
        )
        share = count * picked.reshape(scores.shape).mean(1) / chosen.shape[1]
        return (share * scores.mean(1)).sum(1).mean()
    share = load_of(chosen, count)
    return ((runtime.mean(share) if scope == "global" else share) * scores.mean((0, 1))).sum()
