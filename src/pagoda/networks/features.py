"""Frozen feature stacks: images in, a list of feature maps out. Losses, discriminators and metrics share them.

The default stack is the teacher's own encoder: it needs no outside weights and fits any domain that the teacher fits.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.diffusion import UNCONDITIONAL, precondition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.anatomy import anatomy, features
from pagoda.networks.calling import DiffusersNetwork, config_of, largest_side, model_hash, null_of_zeros
from pagoda.networks.codecs import ImageCodec
from pagoda.networks.description import describe_model
from pagoda.networks.parts import Anatomy

UNIT_EPS = 1e-10
"""Added to the norm of a feature vector before dividing by it, as in the official code."""


class FeatureStack(nn.Module, ABC):
    """Images -> feature maps. Frozen, always in eval mode; gradients flow through it to the images.

    A subclass sets `in_channels` and `channels`, and calls `freeze` at the end of its `__init__`.
    """

    in_channels: int
    """Channels of the images."""
    channels: list[int]
    """Channels of each map."""

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, channels[k], h_k, w_k) of images (B, in_channels, H, W) in [-1, 1]."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of weights and settings: distances in stacks of different fingerprints do not compare."""

    def freeze(self) -> None:
        """Stop gradients to the parameters and leave training mode for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureStack:
        """Does nothing: a frozen stack stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def sides(self, image_size: int) -> list[int]:
        """Side of each map for square images of `image_size` px, measured by a run on one black image."""
        like = next(itertools.chain(self.parameters(), self.buffers()))
        images = torch.zeros(1, self.in_channels, image_size, image_size, device=like.device, dtype=like.dtype)
        return [features.shape[-1] for features in self(images)]


class DecodedFeatures(FeatureStack):
    """Another stack's maps of the pictures that a codec makes of latents: networks from outside know no latents.

    Args:
        stack: Looks at the pictures.
        codec: Decodes; gradients flow through it.

    Raises:
        ConfigError: pictures of other channels than the stack takes.
    """

    def __init__(self, stack: FeatureStack, codec: ImageCodec) -> None:
        super().__init__()
        if stack.in_channels != codec.image_channels:
            raise ConfigError(
                f"the feature stack takes {stack.in_channels} channels, pictures of the codec have {codec.image_channels}."
            )
        self.stack, self.codec = stack, codec
        self.in_channels, self.channels = codec.latent_channels, stack.channels
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of latents (B, c, h, w)."""
        return self.stack(self.codec.decode(images))  # type: ignore[no-any-return]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.stack.fingerprint}|{self.codec.latents_fingerprint}".encode()).hexdigest()


class TeacherFeatures(FeatureStack):
    """What a diffusion model sees in clean images: taps of its network at a small noise level, no noise added, no class.

    Args:
        model: A network with an anatomy, or a `DiffusersNetwork`, whose null condition is then taken over.
        sigma: Noise level that the network is told, in the units of the data.
        names: Parts to tap (see `anatomy`); None = the last layer of each encoder level, or in a DiT four blocks,
            evenly spread.
        sigma_data: As the teacher was trained with.
        noise_scale: As the teacher was trained with.
        scheduler: Configuration of the scheduler that the teacher was trained with; None = EDM preconditioning.
        max_size: Larger images are first reduced to this side by area averaging, so that attention stays affordable;
            None = only what the network cannot take. A U-Net takes any multiple of its stride, larger than its own size too.
        copied: Whether the network is copied. False saves its memory, and freezes the model itself.

    Raises:
        ConfigError: an unknown part, or noise levels that are not positive.
        ShapeError: the network's stride does not divide `max_size`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float = 0.1,
        names: Sequence[str] | None = None,
        sigma_data: float = 0.5,
        noise_scale: float = 250.0,
        scheduler: Mapping[str, Any] | None = None,
        max_size: int | None = None,
        copied: bool = True,
    ) -> None:
        super().__init__()
        if sigma <= 0 or sigma_data <= 0:
            raise ConfigError(f"sigma={sigma} and sigma_data={sigma_data} of a feature stack must be > 0.")
        parts = anatomy(model)
        if max_size is not None and (max_size < 1 or max_size % parts.stride):
            raise ShapeError(f"max_size={max_size} must be a multiple of the network's stride {parts.stride}.")
        if max_size is None:
            max_size = largest_side(parts.model)
        self.names = [parts.check(name) for name in (default_taps(parts) if names is None else names)]
        if not self.names:
            raise ConfigError(f"a feature stack needs at least one part; choose some of {', '.join(parts.names())}.")
        self.channels = [parts.channels(name) for name in self.names]
        self.in_channels = int(config_of(parts.model).in_channels)
        self.sigma, self.sigma_data, self.noise_scale, self.max_size = sigma, sigma_data, noise_scale, max_size
        null = model.null if isinstance(model, DiffusersNetwork) else None
        null = null_of_zeros(parts.model) if null is None else null
        own = copy.deepcopy if copied else lambda part: part
        self.network = DiffusersNetwork(own(parts.model), own(null))
        self.scheduler = None if scheduler is None else dict(scheduler)
        self._scheduled: tuple[float, float] | None = None
        if scheduler is not None:
            denoiser = precondition(_uncalled, scheduler=scheduler)
            level = torch.tensor([sigma], dtype=torch.float64)
            self._scheduled = float(denoiser.scalings(level)[2]), float(denoiser.noise_input(level))
        self._fingerprint: str | None = None
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        side = max(images.shape[-2:])
        if self.max_size is not None and side > self.max_size:
            size = [length * self.max_size // side for length in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="area")
        if self._scheduled is None:
            c_in = 1 / math.sqrt(self.sigma**2 + self.sigma_data**2)  # EDM, table 1
            time = self.noise_scale * math.log(self.sigma)
        else:
            c_in, time = self._scheduled
        t = images.new_full((len(images),), time)
        condition = self.network.fill(UNCONDITIONAL, len(images))
        return list(features(self.network, c_in * images, t, condition, names=self.names).values())

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:  # frozen, so it is enough to read the weights once
            settings: list[Any] = [self.names, self.sigma, self.sigma_data, self.noise_scale, self.max_size]
            if self.scheduler is not None:
                settings.append(sorted(self.scheduler.items()))
            if self.network.null is not None:
                settings.append(model_hash(self.network.null))
            model = self.network.model
            text = f"TeacherFeatures|{settings}|{sorted(describe_model(model).items())}|{model_hash(model)}"
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint


def _uncalled(x: Tensor, t: Tensor, condition: Any) -> Tensor:
    raise AssertionError("only the scalings of this denoiser are read")


def default_taps(parts: Anatomy) -> list[str]:
    """The last layer of each encoder level, the finest first; in a network without encoder four blocks, evenly spread."""
    encoder = [name for name in parts.names() if name.startswith("encoder.")]
    if encoder:
        return list({parts.level(name): name for name in encoder}.values())  # later layers of a level replace earlier
    blocks = [name for name in parts.names() if name.startswith("block.")]
    count = min(4, len(blocks))
    return [blocks[(k + 1) * len(blocks) // count - 1] for k in range(count)]


class RandomFeatures(FeatureStack):
    """A fixed random convolutional network: 3x3 convs and leaky ReLUs; every map after the first has half the side.

    Args:
        in_channels: Channels of the images.
        widths: Channels of each map.
        seed: Draws the weights, on the CPU; they are buffers, so they are saved.

    Raises:
        ConfigError: no width, or one below 1.
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128), seed: int = 0) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ConfigError(f"a feature stack needs widths of at least 1, got {tuple(widths)}.")
        self.in_channels, self.channels, self.seed = in_channels, list(widths), seed
        generator = torch.Generator().manual_seed(seed)
        for index, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            weight = torch.randn(after, before, 3, 3, generator=generator) * math.sqrt(
                2 / (9 * before)
            )  # He et al. 2015
            self.register_buffer(f"weight{index}", weight)
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        hidden = images
        for index in range(len(self.channels)):
            weight = self.get_buffer(f"weight{index}")
            hidden = F.leaky_relu(F.conv2d(hidden, weight, stride=1 if index == 0 else 2, padding=1), 0.2)
            maps.append(hidden)
        return maps

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"RandomFeatures|{model_hash(self)}".encode()).hexdigest()


def feature_distance(maps_a: Sequence[Tensor], maps_b: Sequence[Tensor]) -> Tensor:
    """Distance of two sets of feature maps, per sample (B,), in [0, 4 * number of maps].

    Every feature vector is scaled to unit length; d = sum over maps of the mean over space of |a - b|^2.

    Args:
        maps_a: Maps (B, C_k, h_k, w_k) of one batch.
        maps_b: Maps of the other, of the same shapes.

    Raises:
        ShapeError: the maps differ in number or shape.

    Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, the distance of the reconstruction loss.
    """
    shapes_a, shapes_b = ([tuple(m.shape) for m in maps] for maps in (maps_a, maps_b))
    if shapes_a != shapes_b or not shapes_a:
        raise ShapeError(f"both sides need the same maps, at least one, got {shapes_a} and {shapes_b}.")
    return torch.stack(
        [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(maps_a, maps_b, strict=True)]
    ).sum(0)


def _unit(features: Tensor) -> Tensor:
    """Feature vectors of unit length; float32 at least, because 1e-10 is nothing in half precision."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + UNIT_EPS)
