"""Sized backbones on diffusers' `UNet2DModel` and `DiTTransformer2DModel`: a small config, and presets by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers.models import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from pagoda.errors import ConfigError, ShapeError, did_you_mean
from pagoda.networks.calling import disable_label_dropout

DEEPEST_SIDE = 8
"""U-Net presets halve until their deepest level is at most this many pixels wide: attention stays affordable there."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Size of a network. U-Nets read the first group of fields, DiTs the second; both read `head_dim` and `dropout`.

    Raises:
        ConfigError: an unknown kind or a field out of range.
        ShapeError: widths that `norm_groups` or `head_dim` do not divide.
    """

    kind: Literal["unet", "dit"] = "unet"

    channels: tuple[int, ...] = (48, 96)
    """U-Net: width of each level, the finest first. The total stride is 2^(levels - 1)."""
    layers_per_block: int = 1
    """U-Net: residual blocks per level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (1,)
    """U-Net: indices of the levels with self-attention, 0 the finest."""
    middle: bool = True
    """U-Net: residual, attention, residual between the way down and the way up. Without it, a quarter fewer parameters."""
    norm_groups: int = 16
    """U-Net: groups of every group norm; divides every width."""

    patch_size: int = 2
    """DiT: side of a patch in pixels."""
    hidden_size: int = 192
    """DiT: width of a token."""
    depth: int = 6
    """DiT: number of blocks."""

    head_dim: int = 32
    """Channels per attention head."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.kind not in ("unet", "dit"):
            raise ConfigError(f"unknown backbone kind {self.kind!r}. {did_you_mean(str(self.kind), ['unet', 'dit'])}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"backbone dropout must lie in [0, 1), got {self.dropout}.")
        counts = {"layers_per_block": self.layers_per_block, "norm_groups": self.norm_groups, "head_dim": self.head_dim}
        counts |= {"patch_size": self.patch_size, "hidden_size": self.hidden_size, "depth": self.depth}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"backbone {name} must be at least 1, got {value}.")
        if self.kind == "unet":
            self._check_unet()
        elif self.hidden_size % self.head_dim:
            raise ShapeError(f"head_dim={self.head_dim} does not divide hidden_size={self.hidden_size}.")
        elif self.hidden_size % 4:
            raise ShapeError(f"hidden_size={self.hidden_size} must be a multiple of 4 (the 2-D position embedding).")

    def _check_unet(self) -> None:
        if not self.channels:
            raise ConfigError("backbone channels is empty; give one width per level, such as (48, 96).")
        for width in self.channels:
            if width < 1 or width % self.norm_groups:
                raise ShapeError(
                    f"norm_groups={self.norm_groups} does not divide the width {width} of {self.channels}."
                )
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                raise ConfigError(f"attention level {level} does not exist: levels are 0 to {len(self.channels) - 1}.")
        deepest = {len(self.channels) - 1} if self.middle else set()  # the middle attends too
        for level in {*self.attention_levels, *deepest}:
            if self.channels[level] % self.head_dim:
                raise ShapeError(f"head_dim={self.head_dim} does not divide the attended width {self.channels[level]}.")

    @property
    def stride(self) -> int:
        """Sides of the images must be multiples of this."""
        return int(2 ** (len(self.channels) - 1)) if self.kind == "unet" else self.patch_size


DITS = {
    "dit_nano": (64, 4, 16),
    "dit_tiny": (128, 6, 32),
    "dit_s": (384, 12, 64),
    "dit_b": (768, 12, 64),
    "dit_l": (1024, 24, 64),
    "dit_xl": (1152, 28, 72),
}
"""Width, depth and width of a head of each DiT preset; S to XL as in Peebles and Xie 2023, table 1."""
PRESETS = ("tiny", "small", "base", *DITS)
"""Names that `backbone_preset` knows."""


def backbone_preset(name: str, image_size: int) -> BackboneConfig:
    """A backbone by name, with as many levels as `image_size` wants.

    | name | network | parameters |
    |---|---|---|
    | tiny | U-Net, 48 channels at full size, 96 below | 1.2 M at 8 px |
    | small | U-Net, 64 channels at full size, 128 below | 2.1 M at 16 px |
    | base | U-Net of the ImageNet-64 class; at 32 px the wider one of the PaGoDA code | 266 M at 64 px |
    | dit_nano | DiT, patch 2, 4 blocks of width 64 | 0.4 M |
    | dit_tiny | DiT, patch 2, 6 blocks of width 128 | 2.1 M |
    | dit_s, dit_b, dit_l, dit_xl | DiT, patch 2, of the paper's sizes; every block has its own time embedder here | 35 M to 0.72 B |

    Args:
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: an unknown name, or a size that the preset is not meant for.
        ShapeError: an odd size.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown backbone preset {name!r}. {did_you_mean(name, PRESETS)}")
    if image_size < 4 or image_size % 2:
        raise ShapeError(f"image_size={image_size}: presets take even sizes from 4 px.")
    if name in DITS:
        width, depth, head_dim = DITS[name]
        return BackboneConfig(kind="dit", patch_size=2, hidden_size=width, depth=depth, head_dim=head_dim)
    levels = _count_levels(image_size)
    if name == "base":
        if image_size < 32:
            raise ConfigError(
                f"the preset `base` is meant for images of 32 px and more, got {image_size}; use `small`."
            )
        widths = (256, 512, 1024) if image_size == 32 else (192, 384, 576, 768)
        channels = _fit(widths, levels)
        attended = tuple(level for level in range(levels) if image_size // 2**level <= image_size // 2)
        return BackboneConfig(
            channels=channels, layers_per_block=3, attention_levels=attended, head_dim=64, norm_groups=32, dropout=0.1
        )
    channels = _fit((48, 96) if name == "tiny" else (64, 128), levels)
    return BackboneConfig(
        channels=channels, layers_per_block=1, attention_levels=(levels - 1,), middle=False, norm_groups=16
    )


def _count_levels(image_size: int) -> int:
    """Halve while the side is even and above `DEEPEST_SIDE`, but at least once."""
    side, levels = image_size // 2, 2
    while side > DEEPEST_SIDE and side % 2 == 0:
        side, levels = side // 2, levels + 1
    return levels


def _fit(widths: tuple[int, ...], levels: int) -> tuple[int, ...]:
    """The first `levels` widths, the last one repeated where there are too few."""
    return (*widths, *[widths[-1]] * levels)[:levels]


def build_backbone(
    config: BackboneConfig,
    *,
    image_size: int,
    in_channels: int = 3,
    num_classes: int = 0,
    out_channels: int | None = None,
    token_dim: int = 0,
    pooled_dim: int = 0,
) -> UNet2DModel | UNet2DConditionModel | DiTTransformer2DModel:
    """Build a network with fresh weights from torch's global generator.

    What it adds to diffusers' own initialisation: the last layer starts at zero, so that a fresh EDM denoiser returns
    c_skip x (Karras et al. 2022), and in a DiT so do the modulations, so that every block starts as the identity
    (Peebles and Xie 2023, adaLN-Zero; diffusers leaves them random).

    Args:
        image_size: Side of the square images in pixels.
        in_channels: Channels of the input, concatenated images included.
        num_classes: 0 for none; otherwise the table has one row more, the last, for samples without a class.
        out_channels: Channels of the output; None = `in_channels`.
        token_dim: Width of the tokens of a text; 0 for none. The attended levels then attend to the text too.
        pooled_dim: Width of the pooled embedding of a text, which is projected and added to the time embedding.

    Raises:
        ShapeError: the stride of the network does not divide `image_size`.
        ConfigError: a negative number of classes or channels; texts for a DiT, or beside classes.
    """
    if image_size < config.stride or image_size % config.stride:
        accepted = ", ".join(str(config.stride * 2**k) for k in range(4))
        raise ShapeError(
            f"image_size={image_size} does not fit a network of stride {config.stride}: accepted are its multiples, "
            f"such as {accepted}. Choose another size or fewer levels."
        )
    out_channels = in_channels if out_channels is None else out_channels
    if num_classes < 0 or in_channels < 1 or out_channels < 1:
        raise ConfigError(
            f"num_classes={num_classes} must be >= 0; in_channels={in_channels} and out_channels={out_channels} >= 1."
        )
    if token_dim or pooled_dim:
        if config.kind == "dit" or num_classes or not (token_dim and pooled_dim):
            raise ConfigError(
                f"a network of texts is a U-Net without classes that reads tokens and pooled embeddings; asked for was a {config.kind} "
                f"with num_classes={num_classes}, token_dim={token_dim}, pooled_dim={pooled_dim}. Use backbone.kind=unet."
            )
        return _build_text_unet(config, image_size, in_channels, out_channels, token_dim, pooled_dim)
    if config.kind == "dit":
        return _build_dit(config, image_size, in_channels, num_classes, out_channels)
    return _build_unet(config, image_size, in_channels, num_classes, out_channels)


def _build_unet(
    config: BackboneConfig, image_size: int, in_channels: int, num_classes: int, out_channels: int
) -> UNet2DModel:
    attended = [level in config.attention_levels for level in range(len(config.channels))]
    model = UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        time_embedding_type="positional",
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        dropout=config.dropout,
        attention_head_dim=config.head_dim,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="default",
        mid_block_type="UNetMidBlock2D" if config.middle else None,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )
    _zero(model.conv_out)
    return model


def _build_text_unet(
    config: BackboneConfig, image_size: int, in_channels: int, out_channels: int, token_dim: int, pooled_dim: int
) -> UNet2DConditionModel:
    """The U-Net of `_build_unet` whose attended levels are transformers that attend to the text as well."""
    attended = [level in config.attention_levels for level in range(len(config.channels))]
    model = UNet2DConditionModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        dropout=config.dropout,
        attention_head_dim=tuple(max(1, width // config.head_dim) for width in config.channels),  # numbers of heads
        norm_num_groups=config.norm_groups,
        mid_block_type="UNetMidBlock2DCrossAttn" if config.middle else None,
        cross_attention_dim=token_dim,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=pooled_dim,
    )
    _zero(model.conv_out)
    return model


def _build_dit(
    config: BackboneConfig, image_size: int, in_channels: int, num_classes: int, out_channels: int
) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=config.hidden_size // config.head_dim,
        attention_head_dim=config.head_dim,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=config.depth,
        dropout=config.dropout,
        sample_size=image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=num_classes,  # diffusers adds the row for no class
    )
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    disable_label_dropout(model)
    return model


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
