"""Self-conditioning on a bottleneck: what a middle part sees, averaged over the image, becomes a condition of all later parts.

    g = mean over places of the part's output,   emb' = emb + a(emb) * P(LayerNorm(g))    in every later part

P is two linear layers, the last of which starts at zero: the network starts as it was. One forward pass, no recurrence. It has
nothing to do with feeding back an earlier estimate of the image, which goes by the same name.

Source: Xiang et al. 2025, DDAE++, arXiv:2505.10999; the exact form is ours, their code is not public.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks.dit_anatomy import DiTAnatomy
from pagoda.networks.extension import Extension
from pagoda.networks.parts import Context
from pagoda.networks.unet_anatomy import UNetAnatomy

SOURCES = ("self", "detached", "constant")


class SelfConditioning(Extension):
    """See the module.

    Args:
        after: The part whose output is averaged.
        source: self; detached (no gradient through the feature) and constant (a learnt vector in its place) are controls.

    Raises:
        ConfigError: an unknown source; at `attach`: an unknown part, or one with nothing before or after it.
    """

    def __init__(self, *, after: str, source: str = "self") -> None:
        super().__init__()
        if source not in SOURCES:
            raise ConfigError(f"source must be one of {SOURCES}, got {source!r}.")
        self.bottleneck, self.source = after, source

    def attach(self, net: Any) -> None:
        parts = DiTAnatomy(net) if hasattr(net, "transformer_blocks") else UNetAnatomy(net)
        names = parts.names()
        inner = [name for name in names if name not in ("stem", "head")]
        if self.bottleneck not in inner[:-1]:
            if self.bottleneck in names:
                raise ConfigError(
                    f"self-conditioning after `{self.bottleneck}` has nothing to condition, or nothing to condition on; "
                    f"choose one of {inner[0]} to {inner[-2]}."
                )
            raise ConfigError(f"there is no part `{self.bottleneck}`. {did_you_mean(self.bottleneck, inner[:-1])}")
        self._later = set(names[names.index(self.bottleneck) + 1 :])
        width, embedding = parts.channels(self.bottleneck), parts.embedding_dim
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.scale = nn.Linear(embedding, 1)
        if self.source == "constant":
            self.constant = nn.Parameter(torch.randn(width))
        for parameter in (*self.project[2].parameters(), *self.scale.parameters()):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale.bias)

    def after(self, net: Any, part: str, hidden: Tensor, context: Context) -> None:
        if part != self.bottleneck:
            return
        pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
        if self.source == "constant":
            pooled = self.constant.expand_as(pooled)
        elif self.source == "detached":
            pooled = pooled.detach()
        context.carried["self_conditioning"] = self.scale(context.embedding) * self.project(self.norm(pooled))

    def shift(self, net: Any, part: str, context: Context) -> Tensor | None:
        if part not in self._later:
            return None
        if "self_conditioning" not in context.carried:
            raise ConfigError(
                f"`{part}` is conditioned on what `{self.bottleneck}` saw, and this run has not passed there. Run from an earlier "
                "part, or keep `context.carried` with the features."
            )
        return context.carried["self_conditioning"]
