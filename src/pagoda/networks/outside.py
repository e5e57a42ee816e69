"""Vision networks that were trained elsewhere as feature stacks: hidden layers of transformers' models, maps of timm's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError
from pagoda.files import hash_json
from pagoda.networks.features import FeatureStack
from pagoda.networks.inputs import hash_weights

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""Statistics of images in [0, 1] that most networks were trained with."""
NUM_LAYERS = 4
"""Layers that are read where none are named."""


class OutsideFeatures(FeatureStack):
    """A network that was trained elsewhere: images are resized, brought to [0, 1] and normalised as it is used to.

    Args:
        model: Anything whose maps `run` gives.
        in_channels: 1 or 3; grey images are repeated to three channels.
        size: Side that images are resized to, bilinearly (with antialiasing where they shrink).
        statistics: `image_mean` and `image_std` of images in [0, 1]; ImageNet's when absent.

    Raises:
        ConfigError: other than 1 or 3 channels, or a size below 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, *, in_channels: int, size: int, statistics: dict[str, Any] | None) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise ConfigError(
                f"networks from outside look at grey or RGB images, these have {in_channels} channels; use `teacher`."
            )
        if size < 1:
            raise ConfigError(f"size={size} of a feature stack must be at least 1 px.")
        self.model = model
        self.in_channels, self.size = in_channels, size
        statistics = {**IMAGENET, **(statistics or {})}
        for name in ("mean", "std"):
            values = torch.tensor([float(v) for v in statistics[f"image_{name}"]])
            self.register_buffer(name, values.reshape(1, -1, 1, 1))
        self.freeze()
        self._fingerprint = ""

    def pixels(self, images: Tensor) -> Tensor:
        """What the network reads (B, 3, size, size).

        Raises:
            ShapeError: other channels than announced.
        """
        if images.shape[1] != self.in_channels:
            raise ShapeError(f"this stack reads images of {self.in_channels} channels, got {images.shape[1]}.")
        if images.shape[-2:] != (self.size, self.size):
            shrinks = max(images.shape[-2:]) > self.size
            size = (self.size, self.size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=shrinks, align_corners=False)
        return (images.expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.std

    @property
    def settings(self) -> list[Any]:
        """What decides the features besides the weights."""
        return [type(self).__name__, type(self.model).__name__, self.in_channels, self.size]

    @property
    def fingerprint(self) -> str:
        if not self._fingerprint:  # frozen, so it is enough to read the weights once
            self._fingerprint = hash_json([*self.settings, hash_weights(self)])
        return self._fingerprint

    @torch.no_grad()
    def _measure(self) -> list[Tensor]:
        """The maps of one black image."""
        images = torch.zeros(1, self.in_channels, self.size, self.size, device=self.mean.device)
        return self(images)


class TransformersFeatures(OutsideFeatures):
    """Hidden layers of a vision model of transformers, as maps: DINOv2, CLIP, DeiT, SigLIP, ConvNeXt, ResNet, ...

    Tokens become the map of their patches; the class token and registers, which come first, are left out.

    Args:
        model: A vision model, or one with a `vision_model` in it.
        in_channels: 1 or 3.
        layers: Which hidden states, 0 being the embedding; None = four, evenly spread, the last among them.
        size: Side that images are resized to; None = the model's own.
        statistics: See `OutsideFeatures`.

    Raises:
        ConfigError: a layer that does not exist, a size that the model cannot take, or a model without maps.
    """

    def __init__(
        self,
        model: Any,
        *,
        in_channels: int = 3,
        layers: Sequence[int] | None = None,
        size: int | None = None,
        statistics: dict[str, Any] | None = None,
    ) -> None:
        vision = getattr(model, "vision_model", model)
        config = getattr(vision.config, "vision_config", vision.config)
        own = getattr(config, "image_size", 224)
        own = int(own if isinstance(own, int) else own[0])
        super().__init__(vision, in_channels=in_channels, size=size or own, statistics=statistics)
        patch = getattr(config, "patch_size", None)
        self.patch = None if patch is None else int(patch if isinstance(patch, int) else patch[0])
        if self.patch is not None and self.size % self.patch:
            near = max(self.patch, round(self.size / self.patch) * self.patch)
            raise ConfigError(
                f"size={self.size} is not a multiple of the model's patches of {self.patch} px; use {near}."
            )
        self._options: dict[str, Any] = {"output_hidden_states": True}
        if self.size != own and _accepts(vision.forward, "interpolate_pos_encoding"):
            self._options["interpolate_pos_encoding"] = True
        try:
            count = len(self._hidden(torch.zeros(1, 3, self.size, self.size)))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"`{type(vision).__name__}` cannot look at images of {self.size} px ({error}); its own size is {own}."
            ) from error
        if layers is None:
            last = min(NUM_LAYERS, count - 1)
            layers = [(k + 1) * (count - 1) // last for k in range(last)]
        self.layers = [int(layer) for layer in layers]
        if not self.layers or min(self.layers) < 0 or max(self.layers) >= count:
            raise ConfigError(f"layers {self.layers}: `{type(vision).__name__}` has hidden layers 0 to {count - 1}.")
        self.channels = [features.shape[1] for features in self._measure()]

    def _hidden(self, pixels: Tensor) -> Sequence[Tensor]:
        output = self.model(pixel_values=pixels, **self._options)
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states  # Swin has maps of its own
        if not states:
            raise ConfigError(f"`{type(self.model).__name__}` gives no hidden states; choose another vision model.")
        found: Sequence[Tensor] = states
        return found

    def forward(self, images: Tensor) -> list[Tensor]:
        states = self._hidden(self.pixels(images))
        return [self._as_map(states[layer]) for layer in self.layers]

    def _as_map(self, state: Tensor) -> Tensor:
        if state.ndim == 4:
            return state
        side = math.isqrt(state.shape[1]) if self.patch is None else self.size // self.patch
        if side * side > state.shape[1]:
            raise ConfigError(
                f"`{type(self.model).__name__}` gives {state.shape[1]} tokens, fewer than its {side} x {side} patches; "
                "choose a model without merged tokens."
            )
        return state[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))

    @property
    def settings(self) -> list[Any]:
        return [*super().settings, self.layers]


class TimmFeatures(OutsideFeatures):
    """Feature maps of a timm model: what its `features_only=True` gives.

    Args:
        model: Such a model.
        in_channels: 1 or 3.
        size: Side that images are resized to.
        statistics: See `OutsideFeatures`.
    """

    def __init__(
        self, model: Any, *, in_channels: int = 3, size: int, statistics: dict[str, Any] | None = None
    ) -> None:
        super().__init__(model, in_channels=in_channels, size=size, statistics=statistics)
        self.channels = [int(count) for count in model.feature_info.channels()]
        self._measure()  # a size that the model cannot take is known at once

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model(self.pixels(images))
        # Some architectures of timm keep their channels last.
        return [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(maps, self.channels, strict=True)]


def _accepts(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
