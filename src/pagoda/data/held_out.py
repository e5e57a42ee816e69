"""A part of a source's images that is left out of training, for the run to be judged on, and the rest.

Which images are held out is decided by their names, within each class by itself: so it does not depend on the order of the files, and
both parts show every class. Variants of one image under several names fall to either side; where there are any, split by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from pagoda.data.protocol import ImageSource, SourceConfig
from pagoda.data.wrapped import WrappedSource
from pagoda.errors import ConfigError
from pagoda.files import hash_json

Part = Literal["training", "held out"]


class PartSource(WrappedSource):
    """One of the two parts of another source, in its order.

    Args:
        source: All images.
        options: Its `hold_out` is the share that is held out: rounded, and one image of each class at the least.
        part: Which of the two.

    Raises:
        ConfigError: a class that has a single image, which cannot be on both sides.
    """

    def __init__(self, source: ImageSource, options: SourceConfig, part: Part) -> None:
        super().__init__(source, options)
        self.part = part
        held = set(held_out_rows(source, options.hold_out))
        self.rows = [row for row in range(len(source)) if (row in held) == (part == "held out")]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """The source's."""
        return self.source.image(self.rows[index])

    def label(self, index: int) -> int | None:
        """The source's."""
        return self.source.label(self.rows[index])

    def caption(self, index: int) -> str | None:
        """The source's."""
        return self.source.caption(self.rows[index])

    def sample_id(self, index: int) -> str:
        """The source's."""
        return self.source.sample_id(self.rows[index])

    def metadata(self, index: int) -> dict[str, Any]:
        """The source's."""
        return self.source.metadata(self.rows[index])

    @property
    def fingerprint(self) -> str:
        """Hash of all images' own, the share and the part."""
        return hash_json(["part", self.source.fingerprint, self.options.hold_out, self.part])


def held_out_rows(source: ImageSource, share: float) -> list[int]:
    """Rows of a source that are held out, in order: of each class those whose names have the smallest SHA-256.

    Raises:
        ConfigError: a class that has a single image.
    """
    classes: dict[int | None, list[int]] = {}
    for row in range(len(source)):
        classes.setdefault(source.label(row), []).append(row)
    held: list[int] = []
    for label, rows in classes.items():
        if len(rows) < 2:
            names = source.class_names
            what = "the only image" if label is None else f"the only image of class {names[label] if names else label}"
            raise ConfigError(
                f"source.hold_out={share:g} keeps images of every class on both sides, and `{source.sample_id(rows[0])}` is {what}: "
                "add images, filter the class out, or hold none out."
            )
        held += _first_by_name(source, rows)[: min(len(rows) - 1, max(1, round(share * len(rows))))]
    return sorted(held)


def _first_by_name(source: ImageSource, rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (hashlib.sha256(source.sample_id(row).encode()).digest(), row))
