"""`pagoda text train`, `pagoda data caption`: the small encoder of images and captions, and captions from a model."""

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
      pagoda text train shapes --out encoders/judge --seed 1 --set text.two_tower.vision=convnext
    """

    data: tyro.conf.Positional[str]
    """Captioned images: folder, zip, parquet file, hub name, or `shapes`."""
    out: Path
    """Folder of the encoder, in the Hugging Face layout."""
    set: Settings = ()
    """Settings of the encoder as in `pagoda train`, e.g. `--set text.two_tower.loop.steps=2000`."""
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

        settings, prefix = parse_settings(self.set), "text.two_tower."
        foreign = [key for key in settings if not key.startswith(prefix)]
        if foreign:
            raise ConfigError(f"`text train` reads settings of {prefix}* only, got {foreign}.")
        config = override(TwoTowerConfig(), {key.removeprefix(prefix): value for key, value in settings.items()})
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


@dataclass(frozen=True, kw_only=True)
class DataCaption:
    """Let an image-to-text model write a caption of every image; the old captions are kept beside. Run it again to continue.

    Examples:
      pagoda data caption ~/photos --model models/blip --out captions.jsonl
      pagoda data caption ~/photos --model models/git --only-missing --out captions.jsonl

    `--set source.captions=captions.jsonl` of `pagoda train` reads them.
    """

    data: tyro.conf.Positional[str]
    """Images: folder, zip, IDX folder, parquet file or hub name."""
    model: str
    """A folder in the Hugging Face layout, or a hub name: BLIP, GIT, LLaVA, an image encoder with a text decoder, ..."""
    out: Path
    """File to write, one JSON object a line."""
    prompt: str = ""
    """What the model is asked, or what its text begins with; the model's own way when not given."""
    max_tokens: int = 40
    """New tokens of a caption at most."""
    only_missing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep captions that are there."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=`."""
    caption_column: str | None = None
    """Metadata column of the captions that there are; `text` or `caption` when not given and there."""
    batch_size: int = 8
    """Images at once."""
    allow_download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch a model that is not in the hub's cache."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing but errors."""

    def run(self) -> None:
        """Caption every image."""
        from pagoda.data import SourceConfig, open_source
        from pagoda.text import Captioner, caption_source
        from pagoda.training import Runtime, StatusLine

        options = SourceConfig(filter=self.filter, caption_column=self.caption_column)
        source = open_source(self.data, options=options)
        captioner = Captioner(
            self.model,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            allow_download=self.allow_download,
            device=Runtime(self.device).device,
        )
        status = StatusLine(quiet=self.quiet)
        written = caption_source(
            source,
            captioner,
            self.out,
            only_missing=self.only_missing,
            batch_size=self.batch_size,
            progress=lambda done, total: status.show(f"captions  {done}/{total}"),
        )
        status.done()
        print(f"{self.out}: {written} captions written now")
