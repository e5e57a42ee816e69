"""What all sources that are read from files share: rows, filter, labels, captions, modes, padding, fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from pagoda.data.captions import read_captions
from pagoda.data.decode import UndecodableError, decode_image, has_colour, pad_image
from pagoda.data.filters import filter_rows
from pagoda.data.labels import read_labels
from pagoda.data.protocol import BadImageError, SourceConfig
from pagoda.errors import DataError, did_you_mean
from pagoda.files import hash_json

_MODE_SAMPLE = 32
_CAPTION_COLUMNS = ("text", "caption")


class TableSource(ABC):
    """Images with one row of metadata each. A concrete source says how to read an image and how to hash its content.

    Args:
        names: One unique stable name per row.
        rows: One mapping per row, without the image.
        options: Filter, columns, background, ...
        class_names: Known beforehand (class folders, a class feature), or None.

    Raises:
        DataError: there is no row, names repeat, a column is unknown, or labels are unusable.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[dict[str, Any]],
        *,
        options: SourceConfig,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if len(set(names)) < len(names):
            seen: set[str] = set()
            twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise DataError(f"`{twice}` is listed more than once. Keep one row per image in the metadata file.")
        self.options = options
        self._names = list(names)
        self._table = list(rows)
        everything = range(len(self._table))
        self._kept = list(everything) if options.filter is None else filter_rows(self._table, options.filter)
        named = class_names if options.label_column in (None, "label") else None
        labels = read_labels(
            self._table, self._kept, column=options.label_column, compact=options.compact_labels, names=named
        )
        self._labels = None if labels is None else labels.values
        self.class_names: list[str] | None = None if labels is None else labels.names
        self._caption_column = _find_caption_column(self._table, options.caption_column)
        self._captions = None if options.captions is None else read_captions(options.captions, self._names)

    @abstractmethod
    def _read(self, row: int) -> bytes | Image.Image:
        """Content of the image file of a row (before the filter), or its pixels, "L" or "RGB".

        Raises:
            UndecodableError: it cannot be read.
        """

    @abstractmethod
    def _content_hashes(self, rows: Sequence[int]) -> list[str]:
        """What identifies the content of these rows' images."""

    @property
    def _background(self) -> tuple[int, int, int]:
        return self.options.background_rgb

    def __len__(self) -> int:
        return len(self._kept)

    def image(self, index: int) -> Image.Image:
        """Mode "L" or "RGB" as `channels` says; raises `BadImageError` when it cannot be used."""
        channels = self.channels
        try:
            image = self._plain(index)
            if channels == 1 and image.mode == "RGB":
                if self.options.mode == "auto" and has_colour(image):
                    raise UndecodableError("has colour, in a grey set; set source.mode to rgb or grey")
                image = image.convert("L")
        except UndecodableError as error:
            raise BadImageError(self.sample_id(index), str(error)) from error
        return image.convert("RGB") if channels == 3 and image.mode == "L" else image

    def _plain(self, index: int) -> Image.Image:
        """Upright, opaque and padded, in its own mode."""
        content = self._read(self._kept[index])
        image = decode_image(content, self._background) if isinstance(content, bytes) else content
        return image if self.options.pad is None else pad_image(image, self.options.pad, self._background)

    def original_mode(self, index: int) -> str:
        """ "L" or "RGB": what the image is before `channels` makes all alike.

        Raises:
            BadImageError: it cannot be read.
        """
        try:
            return "RGB" if has_colour(self._plain(index)) else "L"
        except UndecodableError as error:
            raise BadImageError(self.sample_id(index), str(error)) from error

    def label(self, index: int) -> int | None:
        """Class of the image, or None without labels."""
        return None if self._labels is None else self._labels[index]

    def caption(self, index: int) -> str | None:
        """Text of the file of captions, or of the caption column; a list is joined by commas; None where there is none."""
        if self._captions is not None:
            return self._captions.get(self.sample_id(index)) or None
        if self._caption_column is None:
            return None
        value = self._table[self._kept[index]].get(self._caption_column)
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(part) for part in value)
        text = "" if value is None else str(value).strip()
        return text or None

    def sample_id(self, index: int) -> str:
        """The file name, or the row number."""
        return self._names[self._kept[index]]

    def metadata(self, index: int) -> dict[str, Any]:
        """The row as it was read."""
        return dict(self._table[self._kept[index]])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names or [])

    @cached_property
    def channels(self) -> int:
        """1 or 3. With mode "auto": 1 when none of 32 images spread over the set has any colour."""
        if self.options.mode != "auto":
            return 1 if self.options.mode == "grey" else 3
        count = min(len(self), _MODE_SAMPLE)
        grey = 0
        for index in sorted({step * len(self) // count for step in range(count)}):
            try:
                if self.original_mode(index) == "RGB":
                    return 3
                grey += 1
            except BadImageError:  # named when it is used; here it only says nothing about colour
                continue
        return 1 if grey else 3

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names, contents, labels and captions of the chosen images, and the options that change pixels."""
        return hash_json(
            {
                "names": [self.sample_id(index) for index in range(len(self))],
                "contents": self._content_hashes(self._kept),
                "labels": self._labels,
                "class_names": self.class_names,
                "captions": [self.caption(index) for index in range(len(self))],
                "pixels": [self.options.mode, self.options.pad, list(self._background)],
            }
        )


def _find_caption_column(rows: Sequence[dict[str, Any]], wanted: str | None) -> str | None:
    columns = {column for row in rows for column in row}
    if wanted is None:
        return next((column for column in _CAPTION_COLUMNS if column in columns), None)
    if wanted not in columns:
        hint = did_you_mean(wanted, columns) if columns else "These images have no metadata columns."
        raise DataError(f"source.caption_column: there is no column `{wanted}`. {hint}")
    return wanted
