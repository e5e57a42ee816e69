"""`pagoda codec ...`: autoencoders for diffusion on latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pagoda.cli.settings import Settings, parse_settings

if TYPE_CHECKING:
    from pagoda.stages.codec_config import CodecTrainConfig


@dataclass(frozen=True, kw_only=True)
class CodecTrain:
    """An image codec of your own: an autoencoder with a KL or a VQ latent, from these images alone. Run it again to continue.

    Examples:
      pagoda codec train shapes --out runs/codec --size 32 --factor 2
      pagoda codec train ~/photos --out runs/codec --size 128 --factor 8 --kind vq
    """

    data: tyro.conf.Positional[str]
    """Folder of images, zip, IDX folder, parquet file, hub name, or `shapes` (drawn on the spot)."""
    out: Path
    """Folder to train in; made when missing, continued when it is there. The codec will be in its `codec/`."""
    size: int = 64
    """Side of the images that it is trained on, in pixels."""
    factor: int = 4
    """By which latents are smaller than images: a power of two."""
    kind: Literal["kl", "vq"] = "kl"
    """kl: a Gaussian posterior; vq: a codebook."""
    set: Settings = ()
    """Single settings, e.g. `--set loop.steps=5000 loss.adversarial=0 network.latent_channels=8`; see `--dry-run`."""
    seed: int = 0
    """Seed of every random draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration and stop."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def resolve(self) -> CodecTrainConfig:
        """Named options, then single settings."""
        from pagoda.stages.codec_config import CodecNetworkConfig, CodecTrainConfig, widths_of
        from pagoda.stages.config import override
        from pagoda.stages.unread_codec_settings import check_codec_read

        network = CodecNetworkConfig(kind=self.kind, channels=widths_of(self.factor))
        config = CodecTrainConfig(data=self.data, size=self.size, network=network, seed=self.seed, device=self.device)
        settings: dict[str, Any] = parse_settings(self.set)
        config = override(config, settings)
        check_codec_read(config, settings)
        return config

    def run(self) -> None:
        """Train."""
        from pagoda.stages.codec import train_codec
        from pagoda.stages.config import to_yaml

        config = self.resolve()
        if self.dry_run:
            print(to_yaml(config), end="")
            return
        train_codec(config, self.out, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class CodecScale:
    """Measure the scale of a codec on your images, and write it beside its weights: for one that came without, or for other images.

    Examples:
      pagoda codec scale ~/sd-vae-ft-mse ~/photos --size 256
      pagoda codec scale models/vae emoji.zip --size 128 --filter skin_tone=
    """

    codec: tyro.conf.Positional[Path]
    """Folder of an AutoencoderKL, AutoencoderTiny or VQModel that belongs to no pipeline; its `codec.json` is written."""
    data: tyro.conf.Positional[str]
    """Images that it will encode: folder, zip, IDX folder, parquet file, hub name, or `shapes`."""
    size: int = 64
    """Side that they are reduced to, in pixels: that of the images of the run."""
    std: float = 0.5
    """Standard deviation that the latents get."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def run(self) -> None:
        """Measure, write and say what was found."""
        from pagoda.data import SourceConfig
        from pagoda.stages.codec_scale import scale_codec

        source = None if self.filter is None else SourceConfig(filter=self.filter)
        codec = scale_codec(
            self.codec, self.data, size=self.size, std=self.std, source=source, device=self.device, quiet=self.quiet
        )
        if not self.quiet:
            print(f"{self.codec}: scale {codec.scale:.4g}, shift {codec.shift:.3g}")
