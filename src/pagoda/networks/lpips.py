"""LPIPS: how different two images look, by weighted distances in the layers of a network trained to classify."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks.inputs import check_images, hash_weights
from pagoda.networks.published import load_published

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and std for pixels in [-1, 1]

# (channels, kernel, stride, padding) of a convolution with its ReLU, "pool", or "tap" where a layer is read.
_Plan = tuple[tuple[int, int, int, int] | str, ...]
_POOL, _TAP = "pool", "tap"
_PLANS: dict[str, _Plan] = {
    "vgg16": (
        *((64, 3, 1, 1),) * 2, _TAP, _POOL,
        *((128, 3, 1, 1),) * 2, _TAP, _POOL,
        *((256, 3, 1, 1),) * 3, _TAP, _POOL,
        *((512, 3, 1, 1),) * 3, _TAP, _POOL,
        *((512, 3, 1, 1),) * 3, _TAP,
    ),
    "alexnet": (
        (64, 11, 4, 2), _TAP, _POOL,
        (192, 5, 1, 2), _TAP, _POOL,
        (384, 3, 1, 1), _TAP, (256, 3, 1, 1), _TAP, (256, 3, 1, 1), _TAP,
    ),
}  # fmt: skip
_POOLS = {"vgg16": (2, 2), "alexnet": (3, 2)}  # kernel, stride


class LPIPS(nn.Module):
    """Perceptual distance of image pairs; 0 for equal images.

    Every feature vector of five layers is scaled to unit length; the squared differences are weighted per channel, averaged over
    space and summed over layers.

    Args:
        trunk: "vgg16" or "alexnet"; their distances do not compare.
        weights: Converted weights of the trunk; in PAGODA_WEIGHTS_DIR when None.
        linear: Converted weightings `lin<k>.model.1.weight` of the package `lpips`, version 0.1; in PAGODA_WEIGHTS_DIR when None.

    Raises:
        ArtifactError: weights that are missing, not the published ones, or of other shapes.
        ConfigError: another trunk.

    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1.
    """

    def __init__(
        self,
        trunk: Literal["vgg16", "alexnet"] = "vgg16",
        *,
        weights: Path | str | None = None,
        linear: Path | str | None = None,
    ) -> None:
        if trunk not in _PLANS:
            raise ConfigError(f"LPIPS reads one of {', '.join(_PLANS)}, got {trunk!r}.")
        super().__init__()
        self.trunk = trunk
        self.layers = _build(trunk)
        channels = [before[0] for before, after in pairwise(_PLANS[trunk]) if after == _TAP]
        self.linear = nn.ParameterList([torch.zeros(1, int(count), 1, 1) for count in channels])
        trunk_tensors = load_published(trunk, weights)
        linear_tensors = load_published(f"lpips-{trunk}", linear)
        try:
            self.layers.load_state_dict(
                {k.removeprefix("features."): v for k, v in trunk_tensors.items() if k.startswith("features.")}
            )
            self.linear.load_state_dict(
                {str(k): linear_tensors[f"lin{k}.model.1.weight"] for k in range(len(channels))}
            )
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(f"these are not the weights of LPIPS with {trunk}: {error}.") from error
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Hash of trunk and weightings."""
        return hash_weights(self)

    def taps(self, images: Tensor) -> list[Tensor]:
        """The five maps (B, C_k, h_k, w_k) of images (B, 3, H, W) in [-1, 1]."""
        maps, index = [], 0
        h = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        for step in _PLANS[self.trunk]:
            if step == _TAP:
                maps.append(h)
                continue
            for _ in range(1 if step == _POOL else 2):  # a convolution has its ReLU behind it
                h = self.layers[index](h)
                index += 1
        return maps

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each pair, (B,).

        Args:
            images, references: (B, 1 or 3, S, S) in [-1, 1]; the published weights were tuned at 64 px.

        Raises:
            ShapeError: different shapes.
            DataError: as `check_images`.
        """
        if images.shape != references.shape:
            raise ShapeError(
                f"LPIPS compares images of one shape, got {tuple(images.shape)} and {tuple(references.shape)}."
            )
        for batch in (images, references):
            check_images(batch.detach())
        return self.distance(images, references)

    def distance(self, images: Tensor, references: Tensor) -> Tensor:
        """As `forward`, for images under training, which may leave [-1, 1] a little."""
        total = torch.zeros(len(images), device=images.device)
        pairs = zip(self.taps(images.expand(-1, 3, -1, -1)), self.taps(references.expand(-1, 3, -1, -1)), strict=True)
        for (a, b), weight in zip(pairs, self.linear, strict=True):
            difference = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
            total = total + (difference * weight).sum(1).mean((1, 2))
        return total


def _build(trunk: str) -> nn.Sequential:
    """Convolutions, ReLUs and poolings, numbered as torchvision numbers its `features`."""
    layers: list[nn.Module] = []
    inner = 3
    for step in _PLANS[trunk]:
        if step == _POOL:
            layers.append(nn.MaxPool2d(*_POOLS[trunk]))
        elif step != _TAP:
            outer, kernel, stride, padding = (int(value) for value in step)
            layers += [nn.Conv2d(inner, outer, kernel, stride, padding), nn.ReLU()]
            inner = outer
    return nn.Sequential(*layers)
