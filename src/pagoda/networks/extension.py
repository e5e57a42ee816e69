"""The interface of what a network is extended by; every hook does nothing until it is overridden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pagoda.networks.parts import Context


class Extension(nn.Module):
    """Something added to a network, built from plain options that are part of the network's config.

    Hooks receive the network (`net`), so that an extension keeps no reference to it. What one part of a run leaves for a later
    part goes into `context.carried`, which belongs to that run alone.
    """

    def attach(self, net: Any) -> None:
        """Fit the finished base: build weights of its widths, replace modules.

        Raises:
            ConfigError, ShapeError: the network does not suit the extension.
        """

    def owned(self, net: Any) -> Sequence[str]:
        """Prefixes of the base's state dict that this extension put something else in place of."""
        return ()

    def inherit(self, net: Any, base: nn.Module) -> None:
        """Start new weights from those of the network that was extended."""

    def input_mask(self, net: Any, part: str, hidden: Tensor, context: Context) -> Tensor | None:
        """What the input of residual branches is multiplied by: in the layout of `hidden`, or broadcasting to it."""
        return None

    def shift(self, net: Any, part: str, context: Context) -> Tensor | None:
        """Added to the embedding that a part is conditioned on, (B, E)."""
        return None

    def after(self, net: Any, part: str, hidden: Tensor, context: Context) -> None:
        """Called with a part's output: tokens (B, N, D) or a map (B, C, H, W)."""
