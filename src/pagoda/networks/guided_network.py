"""A diffusion network that is also told a guidance weight, as a one-step generator under guidance is."""

from __future__ import annotations

from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import DiffusersNetwork, keep_mean
from pagoda.networks.guidance import GuidanceEmbedding, resolve_guidance, shifted_state, split_guidance

__all__ = ["GuidedNetwork"]


class GuidedNetwork(nn.Module):
    """The network with the weight's embedding beside those of noise level and class: the network itself until it is trained.

    Args:
        network: Kept, not copied.
        guidance_max: Largest weight that it takes; the smallest is 1. The embedding is drawn from torch's global generator.
    """

    def __init__(self, network: DiffusersNetwork, guidance_max: float) -> None:
        super().__init__()
        self.network = network
        self.guidance_max = guidance_max
        self.guided = GuidanceEmbedding(anatomy(network.model).embedding_dim)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Run the network.

        Args:
            x: (B, C, H, W), scaled as the model was trained.
            t: Time or noise input (B,), float.
            condition: Whatever the network takes, and guidance weights; 1 when absent.

        Returns:
            (B, C, H, W).

        Raises:
            ConfigError, ShapeError: as the network itself; a weight outside of [1, guidance_max].
        """
        condition, weight = split_guidance(self.network.fill(condition, len(x)))
        shift = self.guided(resolve_guidance(weight, self.guidance_max, len(x), x))
        parts = anatomy(self.network.model)
        hidden, state = shifted_state(parts, x, t, condition, shift)
        return keep_mean(parts.head(hidden, state), x.shape[1])
