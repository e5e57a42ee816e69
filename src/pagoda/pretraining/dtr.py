"""DTR: every noise level trains its own fixed share of the channels, and near levels share nearly all of them.

Nothing is learnt about the routing and nothing is added to the weights; the masks belong to the network from then on.

Source: Park et al. 2023, arXiv:2310.07138.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from pagoda.diffusion.noise_index import NoiseIndex
from pagoda.networks import DiffusersNetwork
from pagoda.networks.extended import extend_model
from pagoda.networks.task_masks import TaskMasks
from pagoda.pretraining.config import TechniqueConfig
from pagoda.training import Setup, Technique, derive_seed


@dataclass(frozen=True, kw_only=True)
class DtrConfig(TechniqueConfig):
    """Denoising task routing."""

    name: ClassVar[str] = "dtr"
    title: ClassVar[str] = "every noise level sees its own share of the channels"
    needs: ClassVar[str] = "a DiT or a U-Net of stage 1, trained from scratch"
    paper: ClassVar[str] = "arXiv:2310.07138"

    beta: float = 0.8
    """Share of the channels that a noise level sees; 1 changes nothing."""
    alpha: float = 4.0
    """1 moves the window evenly over the noise levels; 4 leaves clean levels together and moves the noisy ones."""
    scheme: Literal["window", "random", "constant"] = "window"
    """window; random and constant are controls: a random subset for each level, and the same channels for all."""
    num_tasks: int = 1000
    """Noise levels that are told apart, each with the same share of the training."""

    def __post_init__(self) -> None:
        TaskMasks(
            index=asdict(NoiseIndex(num_tasks=self.num_tasks)), beta=self.beta, alpha=self.alpha, scheme=self.scheme
        )

    def build(self) -> TaskRouting:
        return TaskRouting(self)


class TaskRouting(Technique):
    """See `DtrConfig`."""

    name = "dtr"
    conflicts = {  # noqa: RUF012 - read only
        "switch_dit": "both mask what a block sees of its input by the noise level, one with fixed masks and one with learnt ones."
    }

    def __init__(self, config: DtrConfig) -> None:
        self.config = config

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        options = {
            "index": noise_index(setup, self.config.num_tasks),
            "beta": self.config.beta,
            "alpha": self.config.alpha,
            "scheme": self.config.scheme,
            "seed": derive_seed(setup.seed, "technique", self.name) % 2**32,
        }
        with setup.own_weights(self.name):
            return DiffusersNetwork(extend_model(network, "task_masks", options))


def noise_index(setup: Setup, num_tasks: int) -> dict[str, Any]:
    """Arguments of the `NoiseIndex` of a run: tasks of equal share under its noise law."""
    law = setup.noise
    return asdict(NoiseIndex(num_tasks=num_tasks, mean=law.mean, std=law.std, noise_scale=setup.noise_scale))
