"""`pagoda text train`: the small encoder of images and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pagoda.cli.settings import Settings, parse_settings
from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextTrain:
    """Train a small encoder of images and captions on your own, by InfoNCE. Run it again to continue.

    Examples:
      pagoda text train emoji.zip --out encoders/emoji --filter skin_tone=
      pagoda text train shapes --out encoders/judge --seed 1 --set vision=convnext loop.steps=500
    """

    data: tyro.conf.Positional[str]
    """Captioned images: folder, zip, parquet file, hub name, or `shapes`."""
    out: Path
    """Folder of the encoder, in the Hugging Face layout."""
    set: Settings = ()
    """Single settings, e.g. `--set loop.steps=2000 width=192`."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=`."""
    caption_column: str | None = None
    """Metadata column of the captions; `text` or `caption` when not given and there."""
    mirror: bool = True
    """Images are as good mirrored; turn it off where captions say left and right."""
    seed: int = 0
    """Seed of every random draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def run(self) -> None:
        """Train and say how well images find their captions."""
        from pagoda.data import Downsampler, SourceConfig, check_source, open_source, prepare_images
        from pagoda.stages.config import override
        from pagoda.text import TwoTowerConfig, train_two_tower
        from pagoda.text.training import RETRIEVED_AMONG
        from pagoda.training import Runtime, StatusLine

        config = override(TwoTowerConfig(), parse_settings(self.set))
        if self.seed < 0:
            raise ConfigError(f"--seed must be >= 0, got {self.seed}.")
        options = SourceConfig(filter=self.filter, caption_column=self.caption_column)
        shapes = self.data.split(":")[0] == "shapes"
        source = open_source(self.data, options=None if shapes and options == SourceConfig() else options)
        check_source(source, size=config.image_size, need_captions=True, progress=not self.quiet).raise_if_bad()
        data = prepare_images(
            source, sizes=(config.image_size,), downsampler=Downsampler(), cache_dir=None, progress=not self.quiet
        )
        facts = train_two_tower(
            data,
            config,
            self.out,
            seed=self.seed,
            mirror=self.mirror,
            runtime=Runtime(self.device),
            status=StatusLine(quiet=self.quiet),
        )
        print(self.out)
        if facts["retrieval"] is not None:
            print(f"images find their own among {RETRIEVED_AMONG} captions: {facts['retrieval']:.3f} (training images)")
