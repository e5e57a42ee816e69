"""`pagoda data check`: a look at every image before the long work."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pagoda.cli.settings import Settings, parse_settings
from pagoda.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Look at every image before the long work: counts, classes, sizes, and the name of every bad file.

    Examples:
      pagoda data check ~/photos --size 256
      pagoda data check emoji.zip --size 64 --filter skin_tone= --json report.json
    """

    data: tyro.conf.Positional[str]
    """Folder of images, zip, IDX folder, parquet file, hub name, or `shapes`."""
    size: int = 64
    """Side that images must have at least, in pixels."""
    filter: str | None = None
    """Keep rows of the metadata only, e.g. `skin_tone=`."""
    label_column: str | None = None
    """Metadata column of the labels."""
    caption_column: str | None = None
    """Metadata column of the captions."""
    captions: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every image must have a caption."""
    json: Path | None = None
    """Write the report as JSON too."""
    move_bad: Path | None = None
    """Move unusable files of a folder there."""
    set: Settings = ()
    """Other settings of the source, as in `pagoda train`, e.g. `--set source.pad=32 source.split=test`."""

    def run(self) -> None:
        """Check, report, and fail when something is unusable."""
        from pagoda.data import SourceConfig, check_source, move_bad, open_source
        from pagoda.files import write_text_atomic
        from pagoda.stages.config import override

        settings = parse_settings(self.set)
        foreign = [key for key in settings if not key.startswith("source.")]
        if foreign:
            raise ConfigError(f"`data check` reads settings of the source only, such as source.pad; got {foreign}.")
        options = SourceConfig(filter=self.filter, label_column=self.label_column, caption_column=self.caption_column)
        options = override(options, {key.removeprefix("source."): value for key, value in settings.items()})
        source = open_source(self.data, options=options)
        report = check_source(source, size=self.size, need_captions=self.captions)
        print(report.text())
        if self.json is not None:
            write_text_atomic(self.json, json.dumps(report.to_json(), indent=1))
        if self.move_bad is not None:
            for path in move_bad(report, source, self.move_bad):
                print(f"moved {path}")
            report = dataclasses.replace(report, total=report.usable, bad=[])
        report.raise_if_bad()
