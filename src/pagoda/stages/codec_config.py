"""The configuration of `pagoda codec train`: an autoencoder for images of any domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pagoda.data import DownsamplerKind, SourceConfig
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.patch_discriminator import check_patches
from pagoda.training import LoopConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class CodecNetworkConfig:
    """Size of the autoencoder."""

    kind: Literal["kl", "vq"] = "kl"
    """kl: a Gaussian posterior, drawn softly to the unit Gaussian; vq: a codebook."""
    channels: tuple[int, ...] = (32, 48, 64)
    """Width of each level, the finest first; the factor is 2^(levels - 1)."""
    layers_per_block: int = 1
    """Residual blocks a level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    middle_attention: bool = False
    """Self-attention at the coarsest level."""
    norm_groups: int = 16
    """Groups of every group norm; divides every width."""
    codebook: int = 512
    """vq: entries."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.layers_per_block, self.latent_channels, self.codebook) < 1:
            raise ConfigError(
                "a codec needs a width for each level, and layers_per_block, latent_channels and codebook of at least 1, got "
                f"{self.channels}, {self.layers_per_block}, {self.latent_channels} and {self.codebook}."
            )
        if self.norm_groups < 1 or any(width < 1 or width % self.norm_groups for width in self.channels):
            raise ShapeError(f"network.norm_groups={self.norm_groups} does not divide the widths {self.channels}.")

    @property
    def factor(self) -> int:
        """By which latents are smaller."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """What the autoencoder descends, all of it per pixel: |x - x'| + feature distance + KL or codebook + adversarial."""

    feature: float = 0.1
    """Weight of the distance in a fixed random network; 0 leaves it out."""
    kl: float = 1e-6
    """kl: weight of the divergence from the unit Gaussian, summed over the latent and divided by the pixels."""
    commitment: float = 0.25
    """vq: weight of |z - sg(e)|^2 beside |sg(z) - e|^2."""
    adversarial: float = 0.5
    """Weight of the patch discriminator, relative to the reconstruction's gradient; 0 trains none."""
    adversarial_from: float = 0.5
    """Fraction of the steps after which discriminator and adversarial term start, both."""
    adaptive: bool = True
    """Scale the adversarial gradient to the reconstruction's at the last layer."""
    discriminator_width: int = 32
    """Width of the discriminator's first layer."""
    discriminator_layers: int = 2
    """Its convolutions of stride 2."""

    def __post_init__(self) -> None:
        for name in ("feature", "kl", "commitment", "adversarial"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} must be >= 0, got {getattr(self, name)}.")
        if not 0 <= self.adversarial_from <= 1:
            raise ConfigError(f"loss.adversarial_from must lie in [0, 1], got {self.adversarial_from}.")


@dataclass(frozen=True, kw_only=True)
class CodecTrainConfig:
    """Everything that a codec is made from."""

    data: str
    """A folder of images, a zip of one, an IDX folder, a parquet file, a hub name, or `shapes`."""
    source: SourceConfig = SourceConfig()
    size: int = 64
    """Side of the images that it is trained on, in pixels; it takes any multiple of its factor."""
    seed: int = 0
    """Seed of every random draw."""
    mirror: bool = True
    """Images are as good mirrored."""
    downsampler: DownsamplerKind = "box_bicubic"
    """Kernel that makes the smaller copies."""
    network: CodecNetworkConfig = field(default_factory=CodecNetworkConfig)
    loss: CodecLossConfig = CodecLossConfig()
    loop: LoopConfig = LoopConfig(steps=2000, batch_size=32, preview_every=500)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.5, 0.9))
    discriminator: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.5, 0.9), rate="constant")
    ema: float = 0.995
    """Decay of the average of the weights, per step."""
    latent_std: float = 0.5
    """Standard deviation that the finished codec gives latents of these images."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32; bf16 on a GPU or a CPU with AMX or AVX512_BF16; auto: bf16 on such a CPU, float32 elsewhere."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's own choice."""

    def __post_init__(self) -> None:
        if self.size < self.network.factor or self.size % self.network.factor:
            raise ConfigError(
                f"size {self.size} is not a multiple of the codec's factor {self.network.factor} "
                f"({len(self.network.channels)} levels); use one, or fewer network.channels."
            )
        if self.loss.adversarial > 0:
            check_patches(self.size, self.loss.discriminator_layers)
        if not self.latent_std > 0:
            raise ConfigError(f"latent_std must be > 0, got {self.latent_std}.")


def widths_of(factor: int) -> tuple[int, ...]:
    """Widths of a small codec of this factor.

    Raises:
        ConfigError: not a power of two.
    """
    if factor < 1 or factor & (factor - 1):
        raise ConfigError(f"a codec's factor is a power of two, got {factor}.")
    return (32, 48, *[64] * factor.bit_length())[: factor.bit_length()]


def codec_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration as plain data, what decides the codec."""
    kept = {key: value for key, value in values.items() if key not in ("data", "source", "device", "threads")}
    unused = ("commitment",) if values["network"]["kind"] == "kl" else ("kl",)
    kept["loss"] = {key: value for key, value in values["loss"].items() if key not in unused}
    return kept
