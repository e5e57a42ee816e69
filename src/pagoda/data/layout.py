"""How images are arranged in a folder or a zip archive: a metadata file, class subfolders, or flat.

Names are relative, with forward slashes. Arrangements, in the order in which they are looked for:

1. `metadata.jsonl` or `metadata.csv` at the root, with a `file_name` column: one row per image.
2. `train/`, `test/`, ... at the root: the one that `split` names is the root.
3. Two or more subfolders with images: the label is the first subfolder, numbered in sorted order.
4. Everything in one subfolder: that subfolder is the root.
5. Images at the root: no labels.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pagoda.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jfif", ".avif"}
)
"""Endings of file names that are taken for images; other files are left alone."""

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Layout:
    """The images of a folder or archive, in order."""

    root: str
    """Folder inside of the source that the names are relative to; empty or ending in a slash."""
    names: list[str]
    rows: list[dict[str, Any]]
    class_names: list[str] | None
    """Names of the class folders, or None when labels come from the rows, or from nowhere."""


def find_layout(files: Sequence[str], read: Callable[[str], bytes], *, split: str, where: str) -> Layout:
    """Work out the arrangement.

    Args:
        files: Names of all files.
        read: Content of a file by its name.
        split: Which of `train/`, `test/`, ... to use, when there are several.
        where: The folder or archive, for messages.

    Raises:
        DataError: there is no image, the split is missing, the metadata is unusable, or arrangements are mixed.
    """
    visible = [name for name in files if not _is_hidden(name)]
    root, used_split = "", False
    while True:
        inner = sorted(name[len(root) :] for name in visible if name.startswith(root))
        metadata = [name for name in _METADATA_FILES if name in inner]
        images = [name for name in inner if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        tops = sorted({name.split("/")[0] for name in images if "/" in name})
        loose = [name for name in images if "/" not in name]
        if metadata or loose or not images:
            break
        if not used_split and all(top in _SPLITS for top in tops) and (len(tops) > 1 or tops[0] == split):
            if split not in tops:
                raise DataError(
                    f"`{where}` has the splits {', '.join(tops)}, and no `{split}`. Set source.split to one of them."
                )
            root, used_split = f"{root}{split}/", True
        elif len(tops) == 1:
            root = f"{root}{tops[0]}/"
        else:
            break
    if split != "train" and not used_split:
        raise DataError(
            f"`{where}` has no splits, so source.split={split!r} cannot be met. Leave source.split as it is."
        )
    if len(metadata) > 1:
        raise DataError(f"`{where}` holds both {' and '.join(metadata)}. Keep one of them.")
    if metadata:
        rows = _read_metadata(metadata[0], read(root + metadata[0]), where)
        return Layout(root, [_checked_name(row, number, metadata[0]) for number, row in enumerate(rows)], rows, None)
    if not images:
        accepted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"`{where}` holds no images among {len(files):,} files. Accepted are {accepted}.")
    if loose and tops:
        raise DataError(
            f"`{where}` holds {len(loose):,} images beside the folders {', '.join(tops[:5])}, so it is unclear whether the "
            "folders are classes. Move those images into a folder, or list all in a metadata.csv with a file_name column."
        )
    if not tops:
        return Layout(root, images, [{} for _ in images], None)
    return Layout(root, images, [{"label": name.split("/")[0]} for name in images], tops)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _checked_name(row: dict[str, Any], number: int, metadata: str) -> str:
    """The file name of a row, which must stay inside of the source."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"row {number} of `{metadata}` has no `file_name`. Every row must name its image file.")
    name = name.replace("\\", "/")
    if name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/"):
        raise DataError(
            f"row {number} of `{metadata}` names `{name}`, outside of the data. Use relative names inside of it."
        )
    return str(PurePosixPath(name))


def _read_metadata(name: str, content: bytes, where: str) -> list[dict[str, Any]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"`{name}` in `{where}` is not UTF-8 text ({error}). Save it as UTF-8.") from error
    rows = _read_csv(text, name) if name.endswith(".csv") else _read_jsonl(text, name)
    if not rows:
        raise DataError(f"`{name}` in `{where}` has no rows. Write one row per image, or delete it.")
    return rows


def _read_jsonl(text: str, name: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of `{name}` is not JSON ({error}). Write one JSON object per line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} of `{name}` is not a JSON object. Write one JSON object per line.")
        rows.append(row)
    return rows


def _read_csv(text: str, name: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} of `{name}` is not CSV ({error}). Quote values that hold commas."
        ) from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise DataError(
                f"row {number} of `{name}` has another number of values than the header. Quote commas in values."
            )
    return [dict(row) for row in rows]
