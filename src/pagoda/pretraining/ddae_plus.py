"""DDAE++: a network that is conditioned on what its own middle sees, and that learns to see two views of an image alike.

Two independent parts. Self-conditioning changes the network (see `networks.self_conditioning`). Contrastive self-distillation
adds a loss: two augmented views of each image, both with a little noise, go up to the bottleneck; what the network makes of the
one must be recognised, among all images of the batch, in what the averaged network makes of the other, and the other way round.

Source: Xiang et al. 2025, arXiv:2505.10999; the exact forms are ours, their code is not public. The loss is that of MoCo v3
(Chen et al. 2021, arXiv:2104.02057, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ConfigError
from pagoda.networks import Anatomy, DiffAugment, DiffusersNetwork, anatomy
from pagoda.networks.anatomy import features
from pagoda.networks.augment import NUMBERS
from pagoda.networks.extended import extend_model
from pagoda.pretraining.config import TechniqueConfig
from pagoda.training import Penalty, Setup, StepRandom, Technique, TechniqueStep


@dataclass(frozen=True, kw_only=True)
class DdaePlusConfig(TechniqueConfig):
    """Bottleneck self-conditioning and contrastive self-distillation."""

    name: ClassVar[str] = "ddae_plus"
    title: ClassVar[str] = (
        "the network is conditioned on what its own middle sees; two views of an image are seen alike"
    )
    needs: ClassVar[str] = "a DiT or a U-Net of stage 1; an average of the weights for the contrastive loss"
    paper: ClassVar[str] = "arXiv:2505.10999"

    self_condition: bool = True
    """Condition later parts on the bottleneck."""
    after: str = ""
    """The bottleneck, e.g. `block.5`; empty = near the middle of a DiT, a third of the way up in a U-Net."""
    source: Literal["self", "detached", "constant"] = "self"
    """What conditions: the feature; detached and constant are controls."""
    contrastive: float = 0.0
    """Factor of the contrastive loss; 0 leaves it out. About 0.1 to 1; each step then costs four more runs up to the bottleneck."""
    temperature: float = 0.2
    """Of the contrastive loss."""
    sigma: float = 0.1
    """Noise level of the views, in the units of the images: high noise leaves two views nothing in common."""
    head_dim: int = 128
    """Width of what is compared."""
    views: tuple[str, ...] = ("colour", "flip", "translation")
    """Augmentations of a view (see `DiffAugment`). They are never trained to be drawn: the denoising loss sees plain images."""

    def __post_init__(self) -> None:
        if self.contrastive < 0 or not self.temperature > 0 or not self.sigma > 0 or self.head_dim < 1:
            raise ConfigError(
                "ddae_plus needs contrastive >= 0, temperature > 0, sigma > 0 and head_dim >= 1, "
                f"got {self.contrastive}, {self.temperature}, {self.sigma} and {self.head_dim}."
            )
        DiffAugment(self.views)

    def build(self) -> BottleneckLearning:
        return BottleneckLearning(self)


class Heads(nn.Module):
    """What stands between the bottleneck and the comparison; layer norms, so that no sample sees another."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim))
        self.predict = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim))


class BottleneckLearning(Technique):
    """See `DdaePlusConfig`."""

    name = "ddae_plus"

    def __init__(self, config: DdaePlusConfig) -> None:
        self.config = config
        self._heads: Heads | None = None
        self._augment = DiffAugment(config.views)

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        config, parts = self.config, anatomy(network)
        self._tap = parts.check(config.after or default_bottleneck(parts))
        self._scales = (setup.sigma_data, setup.noise_scale)
        with setup.own_weights(self.name):
            if config.self_condition:
                options = {"after": self._tap, "source": config.source}
                network = DiffusersNetwork(extend_model(network, "self_conditioning", options))
            if config.contrastive:
                self._heads = Heads(parts.channels(self._tap), config.head_dim)
        return network

    def modules(self) -> nn.Module | None:
        return self._heads

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        if self._heads is None:
            return {}
        if step.averaged is None:
            raise ConfigError("the contrastive loss of ddae_plus learns from an average of the weights; set teach.ema.")
        teacher = step.averaged.modules
        assert isinstance(teacher, Heads)
        views = [self._view(step, name) for name in ("first", "second")]
        queries = [self._heads.predict(self._heads.project(self.see(step.network, view))) for view in views]
        with torch.no_grad():
            keys = [step.runtime.gather(teacher.project(self.see(step.averaged.network, view))) for view in views]
        first = step.runtime.rank * len(queries[0])
        losses = [
            contrastive_loss(query, key, self.config.temperature, first)
            for query, key in zip(queries, keys[::-1], strict=True)
        ]
        loss = losses[0] + losses[1]
        return {"contrastive": Penalty(loss, self.config.contrastive)}

    def see(self, network: DiffusersNetwork, images: Tensor) -> Tensor:
        """The bottleneck of noisy images at `sigma`, averaged over places (B, C); no label, nothing computed after it."""
        sigma_data, noise_scale = self._scales
        sigma = images.new_tensor(self.config.sigma)
        t = (noise_scale * sigma.log()).expand(len(images))
        c_in = (sigma**2 + sigma_data**2).rsqrt()
        found = features(network, c_in * images, t, names=[self._tap])
        return found[self._tap].mean((2, 3))

    def _view(self, step: TechniqueStep, name: str) -> Tensor:
        """An augmented view with noise."""
        images, random = step.inputs.images, step.random.fork(name)
        view = self._augment.apply(images, self._draw(random))
        return view + self.config.sigma * random.normal("noise", *images.shape[1:]).to(images.device)

    def _draw(self, random: StepRandom) -> dict[str, Tensor]:
        return self._augment.split(random.uniform("view", NUMBERS))


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, first: int = 0) -> Tensor:
    """2 tau times the cross-entropy of recognising one's own key, per sample (B,).

    Args:
        queries: (B, d), with gradients.
        keys: (N, d) of all processes; row `first` + i belongs to query i.
        temperature: tau.
        first: Row of the first query's key.
    """
    queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
    own = first + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(queries @ keys.T / temperature, own, reduction="none")


def default_bottleneck(parts: Anatomy) -> str:
    """Near the middle of a DiT (13 of 28 blocks in the paper's predecessor); a third of the way up in a U-Net."""
    names = parts.names()
    blocks = [name for name in names if name.startswith("block.")]
    if blocks:
        return blocks[max(1, min(len(blocks) - 1, round(len(blocks) * 13 / 28))) - 1]
    decoder = [name for name in names if name.startswith("decoder.")]
    return decoder[max(1, len(decoder) // 3) - 1]
