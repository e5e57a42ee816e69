"""One view of every network: named parts, taps after any of them, and runs that are split between them.

    stem -> encoder.0 -> encoder.1 ... -> middle -> decoder.0 -> decoder.1 ... -> head        (U-Net)
    stem -> block.0 -> block.1 ...                                             -> head        (DiT)

`head(decode(middle(encode(x))))` is the model's own forward, bit for bit. Caching plans, probes, adapters and growth name
parts through this view and never reach into a network by themselves; nothing is hooked, so nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models import (
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError
from pagoda.networks.calling import DiffusersNetwork
from pagoda.networks.dit_anatomy import DiTAnatomy
from pagoda.networks.extended import ExtendedDiT, ExtendedDiTAnatomy, ExtendedUNet, ExtendedUNetAnatomy
from pagoda.networks.parts import Anatomy
from pagoda.networks.text_transformer_anatomy import PixArtAnatomy, SD3Anatomy
from pagoda.networks.unet_anatomy import UNetAnatomy
from pagoda.networks.unet_video_anatomy import VideoUNetAnatomy

ANATOMIES: dict[type[nn.Module], type[Anatomy]] = {
    ExtendedDiT: ExtendedDiTAnatomy,  # before the classes that they derive from
    ExtendedUNet: ExtendedUNetAnatomy,
    UNet2DModel: UNetAnatomy,
    UNet2DConditionModel: UNetAnatomy,
    UNet3DConditionModel: VideoUNetAnatomy,
    UNetMotionModel: VideoUNetAnatomy,
    DiTTransformer2DModel: DiTAnatomy,
    PixArtTransformer2DModel: PixArtAnatomy,
    SD3Transformer2DModel: SD3Anatomy,
}
"""The view of each diffusers class; of its subclasses too."""


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a model, or of the model inside a `DiffusersNetwork`.

    Raises:
        ConfigError: a class without anatomy, or a supported class built of blocks that have none.
    """
    if isinstance(model, DiffusersNetwork):
        model = model.model
    for kind, view in ANATOMIES.items():
        if isinstance(model, kind):
            return view(model)
    names = ", ".join(f"`{kind.__name__}`" for kind in ANATOMIES)
    raise ConfigError(f"`{type(model).__name__}` has no anatomy; these have: {names}.")


def features(
    model: nn.Module, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL, *, names: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs of named parts, as maps (B, C, h, w); nothing after the last one is computed. Differentiable.

    Args:
        model: A model with an anatomy, or a `DiffusersNetwork`; put it in eval mode first if it has dropout.
        x: Network input (B, C, H, W), already scaled as the network was trained.
        t: Time or noise input (B,).
        names: Parts, in any order; the result keeps it.

    Raises:
        ConfigError: an unknown name, no name at all, or a model without anatomy.
    """
    parts = anatomy(model)
    if isinstance(model, DiffusersNetwork):
        condition = model.fill(condition, len(x))
    wanted = {parts.check(name) for name in names}
    if not wanted:
        raise ConfigError(f"no part was named; choose some of {', '.join(parts.names())}.")
    found: dict[str, Tensor] = {}
    for name, value in parts.walk(x, t, condition):
        if name in wanted:
            found[name] = value
        if len(found) == len(wanted):
            break
    return {name: found[name] for name in names}
