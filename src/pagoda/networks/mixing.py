"""Fixed random mixing of feature maps over channels and over scales, which keeps a discriminator from leaning on few of them.

    m_k = A_k f_k,    s_K = m_K,    s_k = (m_k + B_k * up(s_{k+1})) / sqrt(2)

A_k is a random 1x1, B_k a random 3x3 convolution; maps are ordered from the finest to the coarsest, or from the shallowest to the
deepest where they have one size.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks.features import FeatureStack


class MixedFeatures(FeatureStack):
    """A stack seen through fixed random mixing; every mixed map depends on its own and on all deeper maps.

    The mixed maps have `width` * (1, 1, 2, 4, 4, ...) channels: (64, 64, 128, 256) for four maps of the default width, as in the
    official code. The weights are buffers with unit gain, so the maps keep their scale.

    Args:
        stack: Frozen; its maps finest first.
        seed: Draws the weights, on the CPU.
        width: Channels of the finest mixed map.

    Raises:
        ConfigError: `width` below 1.

    Source: Sauer et al. 2021, Projected GANs, arXiv:2111.01007, section 3.2; ours draws a 3x3 convolution where theirs has residual blocks.
    """

    def __init__(self, stack: FeatureStack, *, seed: int = 0, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"mixed feature maps need a width of at least 1, got {width}.")
        self.stack = stack
        self.in_channels = stack.in_channels
        self.channels = [width * min(4, max(1, 2 ** (k - 1))) for k in range(len(stack.channels))]
        generator = torch.Generator().manual_seed(seed)
        for index, (before, after) in enumerate(zip(stack.channels, self.channels, strict=True)):
            self.register_buffer(f"channel{index}", _draw(after, before, 1, generator))
        for index, (after, before) in enumerate(itertools.pairwise(self.channels)):
            self.register_buffer(f"scale{index}", _draw(after, before, 3, generator))
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.stack(images)
        mixed = [F.conv2d(m, self.get_buffer(f"channel{k}").to(m)) for k, m in enumerate(maps)]
        for k in range(len(mixed) - 2, -1, -1):
            coarse = mixed[k + 1]
            if coarse.shape[-2:] != mixed[k].shape[-2:]:
                coarse = F.interpolate(coarse, size=mixed[k].shape[-2:], mode="bilinear", align_corners=False)
            spread = F.conv2d(coarse, self.get_buffer(f"scale{k}").to(coarse), padding=1)
            mixed[k] = (mixed[k] + spread) * math.sqrt(0.5)
        return mixed

    @property
    def fingerprint(self) -> str:
        mixing = hashlib.sha256()
        for name, value in sorted(self.named_buffers(recurse=False)):
            mixing.update(f"{name}|{tuple(value.shape)}|".encode() + value.cpu().contiguous().numpy().tobytes())
        return hashlib.sha256(f"MixedFeatures|{self.stack.fingerprint}|{mixing.hexdigest()}".encode()).hexdigest()


def mixing_state(stack: FeatureStack) -> dict[str, Tensor]:
    """The random weights of every mixing in a stack, by name, without its networks' own; empty where nothing is mixed."""
    found = {}
    for name, module in stack.named_modules():
        if isinstance(module, MixedFeatures):
            found.update({f"{name}.{key}".lstrip("."): value for key, value in module.named_buffers(recurse=False)})
    return found


def load_mixing(stack: FeatureStack, tensors: Mapping[str, Tensor]) -> None:
    """Take over weights that `mixing_state` gave.

    Raises:
        ArtifactError: other names or shapes: they belong to other feature maps.
    """
    own = mixing_state(stack)
    shapes, found = ({name: tuple(t.shape) for name, t in state.items()} for state in (own, tensors))
    if shapes != found:
        wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        name = wrong[0]
        raise ArtifactError(
            f"the saved random mixing does not fit these feature maps: `{name}` is {found.get(name)} in the file and "
            f"{shapes.get(name)} here. It was made for another stack; go back to that, or start the stage anew."
        )
    for name, value in own.items():
        value.copy_(tensors[name])


class JoinedFeatures(FeatureStack):
    """The maps of several stacks, one after the other.

    Args:
        stacks: At least one, for images of the same channels.

    Raises:
        ConfigError: no stack, or stacks for images of different channels.
    """

    def __init__(self, stacks: list[FeatureStack]) -> None:
        super().__init__()
        counts = {stack.in_channels for stack in stacks}
        if len(counts) != 1:
            raise ConfigError(
                f"feature stacks that are joined must read the same images, got channels {sorted(counts)}."
            )
        self.stacks: torch.nn.ModuleList = torch.nn.ModuleList(stacks)
        self.in_channels = stacks[0].in_channels
        self.channels = [count for stack in stacks for count in stack.channels]
        self.freeze()

    def forward(self, images: Tensor) -> list[Tensor]:
        return [features for stack in self.stacks for features in stack(images)]

    @property
    def fingerprint(self) -> str:
        names = "|".join(str(stack.fingerprint) for stack in self.stacks)
        return hashlib.sha256(f"JoinedFeatures|{names}".encode()).hexdigest()


def _draw(after: int, before: int, kernel: int, generator: torch.Generator) -> Tensor:
    """Gaussian weights of a convolution that keeps the scale of independent inputs."""
    return torch.randn(after, before, kernel, kernel, generator=generator) / math.sqrt(before * kernel * kernel)
