"""REPA: an early layer of the network learns what a frozen encoder sees in the clean image.

    loss = denoising + weight * mean over encoders, samples and places of -cos(target, projector(hidden))

The hidden features are those after one named part, as they are; a small network of three linear layers, applied place by
place, stands between them and the target. It is thrown away after training, and sampling never knows of it.

Source: Yu et al. 2024, arXiv:2410.06940, eqs. 6 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import Anatomy, DiffusersNetwork, anatomy
from pagoda.pretraining.config import TechniqueConfig
from pagoda.pretraining.encoders import TargetEncoder, check_encoder_name, check_frozen, open_encoder
from pagoda.pretraining.targets import TargetCache, cache_shape, encode, precompute_targets
from pagoda.training import Penalty, Setup, Technique, TechniqueStep

SCHEDULES = ("constant", "linear")
WIDEST_PROJECTOR = 2048
"""Width of the projector in the paper, about twice the width of XL; narrow networks get twice their own."""


@dataclass(frozen=True, kw_only=True)
class RepaConfig(TechniqueConfig):
    """Representation alignment."""

    name: ClassVar[str] = "repa"
    title: ClassVar[str] = "early features learn what a frozen encoder sees in the clean image"
    needs: ClassVar[str] = "an encoder that knows the domain; the built-in one needs labels"
    paper: ClassVar[str] = "arXiv:2410.06940"

    encoders: tuple[str, ...] = ("classifier",)
    """Frozen encoders: `classifier`, `transformers:FOLDER`, `network:FOLDER`, `random`. Each counts alike."""
    tap_after: str = ""
    """Part whose output is aligned, e.g. `block.7`; empty = a third of the way into a DiT, the middle of a U-Net."""
    weight: float = 0.5
    """Factor of the loss, which lies in [-1, 1]; 0 changes nothing."""
    schedule: Literal["constant", "linear"] = "constant"
    """How the weight goes over the run: constant, or linearly to 0 at `stop`."""
    stop: float = 1.0
    """Fraction of the run after which nothing is aligned any more: it can hurt late in training."""
    projector_dim: int = 0
    """Width of the projector; 0 = twice the tapped width, at most 2,048."""
    token_match: Literal["resize", "strict"] = "resize"
    """What to do with a target of another grid: resize it, or refuse it."""
    targets: Literal["own", "shuffled"] = "own"
    """Whose features an image learns: its own, or those of another image, always the same one. A control for studies."""
    cache_targets: bool = True
    """Compute the targets of all images before training, when they take at most `cache_limit_gib`."""
    cache_limit_gib: float = 2.0
    """Memory for the targets; beyond it the encoder runs in every step."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"repa.weight must be >= 0, got {self.weight}.")
        if not self.encoders and self.weight > 0:
            raise ConfigError("repa.encoders is empty: name an encoder, or set repa.weight to 0.")
        if self.schedule not in SCHEDULES or self.token_match not in ("resize", "strict"):
            raise ConfigError(
                f"repa.schedule must be one of {SCHEDULES} and repa.token_match resize or strict, "
                f"got {self.schedule!r} and {self.token_match!r}."
            )
        if self.targets not in ("own", "shuffled"):
            raise ConfigError(f"repa.targets must be own or shuffled, got {self.targets!r}.")
        if self.targets == "shuffled" and not self.cache_targets:
            raise ConfigError(
                "repa.targets=shuffled reads other images' targets from the cache; leave repa.cache_targets on."
            )
        if not 0 < self.stop <= 1 or self.projector_dim < 0:
            raise ConfigError(
                f"repa.stop must lie in (0, 1] and repa.projector_dim be >= 0, got {self.stop} and {self.projector_dim}."
            )
        for encoder in self.encoders:
            check_encoder_name(encoder)

    def build(self) -> RepresentationAlignment:
        return RepresentationAlignment(self)


class Projector(nn.Module):
    """Three linear layers between hidden features and targets, place by place."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, dim, h, w) -> (B, out, h, w)."""
        return self.layers(features.movedim(1, -1)).movedim(-1, 1)


class RepresentationAlignment(Technique):
    """See `RepaConfig`.

    Args:
        config: Options.
        encoders: Frozen encoders to use in place of those that the options name.
    """

    name = "repa"

    def __init__(self, config: RepaConfig, encoders: list[TargetEncoder] | None = None) -> None:
        self.config = config
        self.encoders = encoders
        self._sources: list[TargetEncoder | TargetCache] = []
        self._projectors: nn.ModuleList | None = None

    def prepare(self, network: DiffusersNetwork, setup: Setup) -> DiffusersNetwork:
        config, parts = self.config, anatomy(network)
        self._tap = parts.check(config.tap_after) if config.tap_after else default_tap(parts)
        if self._tap == "head":
            raise ConfigError("repa.tap_after=head: the output has no features to align; name a part before it.")
        self._last_step = round(config.stop * setup.steps)
        if config.weight == 0:
            return network  # no projector, no encoder: the plain run
        side = setup.image_size // parts.level(self._tap)
        encoders = self.encoders
        if encoders is None:
            encoders = [open_encoder(spec, setup, side) for spec in config.encoders]
        for encoder in encoders:
            check_frozen(encoder)
        if config.token_match == "strict":
            self._check_grids(encoders, setup, side)
        width = parts.channels(self._tap)
        hidden = config.projector_dim or min(WIDEST_PROJECTOR, 2 * width)
        with setup.own_weights(self.name):
            self._projectors = nn.ModuleList(Projector(width, hidden, encoder.dim) for encoder in encoders)
        self._side = side
        self._sources = [self._source(encoder, index, setup) for index, encoder in enumerate(encoders)]
        return network

    def modules(self) -> nn.Module | None:
        return self._projectors

    def taps(self, step: int) -> tuple[str, ...]:
        return (self._tap,) if self.weight_at(step) else ()

    def weight_at(self, step: int) -> float:
        """Factor of the loss at a step."""
        if step >= self._last_step:
            return 0.0
        return self.config.weight * (1 - step / self._last_step if self.config.schedule == "linear" else 1.0)

    def penalty(self, step: TechniqueStep) -> Mapping[str, Penalty]:
        weight = self.weight_at(step.step)
        if not weight:
            return {}
        assert self._projectors is not None
        hidden, images = step.taps[self._tap], step.inputs.images
        losses = []
        for projector, source in zip(self._projectors, self._sources, strict=True):
            if isinstance(source, TargetCache):
                target = source.get(step.inputs.indices, step.inputs.flips).to(images.device)
            else:
                target = encode(source, images, self._side)
            losses.append(alignment_loss(projector(hidden), target))
        return {"alignment": Penalty(torch.stack(losses).mean(0), weight)}

    def _source(self, encoder: TargetEncoder, index: int, setup: Setup) -> TargetEncoder | TargetCache:
        """The encoder itself, or its features of all images where they fit."""
        size = 4 * torch.Size(cache_shape(encoder, setup, self._side)).numel()
        shuffled, limit = self.config.targets == "shuffled", self.config.cache_limit_gib * 2**30
        if shuffled and size > limit:
            raise ConfigError(
                f"repa.targets=shuffled needs the targets of all images in memory, {size / 2**30:.1f} GiB; "
                f"repa.cache_limit_gib is {self.config.cache_limit_gib}."
            )
        if not self.config.cache_targets or size > limit:
            return encoder
        path = None if setup.folder is None else setup.folder / f"targets-{index}.safetensors"
        own = precompute_targets(encoder, setup, self._side, path)
        return own.shuffled() if shuffled else own

    def _check_grids(self, encoders: list[TargetEncoder], setup: Setup, side: int) -> None:
        image = torch.zeros(1, setup.channels, setup.image_size, setup.image_size, device=setup.runtime.device)
        for encoder in encoders:
            with torch.no_grad():
                grid = tuple(encoder(image, side).shape[-2:])
            if grid != (side, side):
                raise ShapeError(
                    f"the encoder gives {grid[0]} x {grid[1]} vectors and `{self._tap}` has {side} x {side}. "
                    "Set repa.token_match=resize, or choose another encoder or tap."
                )


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Minus the cosine of projected features and targets, per sample (B,), in [-1, 1]; in float32 whatever comes in.

    Args:
        projected: (B, d, h, w).
        target: Of the same shape, without gradient.
    """
    with torch.autocast(projected.device.type, enabled=False):
        kept = projected if projected.dtype == torch.float64 else projected.float()
        return -F.cosine_similarity(kept, target.to(kept), dim=1).mean((1, 2))


def default_tap(parts: Anatomy) -> str:
    """A third of the way into a DiT (8 of 28 blocks in the paper); the middle of a U-Net, or its last encoder layer."""
    names = parts.names()
    blocks = [name for name in names if name.startswith("block.")]
    if blocks:
        return blocks[max(1, round(len(blocks) * 8 / 28)) - 1]
    return "middle" if "middle" in names else [name for name in names if name.startswith("encoder.")][-1]
