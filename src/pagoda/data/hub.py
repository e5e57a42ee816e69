"""Images in Parquet files or in a data set of the Hugging Face hub, through the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagoda.data.decode import UndecodableError
from pagoda.data.protocol import SourceConfig
from pagoda.data.table import TableSource
from pagoda.errors import DataError, did_you_mean, import_extra


class HubSource(TableSource):
    """Rows of a `datasets.Dataset` with one image column; all other columns are metadata.

    The image column is the one whose type says so, else the only one that holds encoded files (bytes, or a struct of
    bytes and path). A class feature brings its class names.

    Args:
        name: A .parquet file, a folder of them, or a hub name "owner/name".

    Raises:
        DataError: it cannot be loaded, has no image column, or several.
        MissingExtraError: `datasets` is not installed.
    """

    def __init__(self, name: Path | str, *, options: SourceConfig) -> None:
        datasets = import_extra("datasets", "hub")
        loaded = _load(datasets, name, options.split)
        self._column = _image_column(datasets, loaded.features, str(name))
        if isinstance(loaded.features[self._column], datasets.Image):
            loaded = loaded.cast_column(self._column, datasets.Image(decode=False))
        self._images = loaded.select_columns([self._column])
        table = loaded.remove_columns([self._column])
        rows: list[dict[str, Any]] = [{} for _ in range(len(loaded))]
        if table.column_names:
            rows = [dict(row) for row in table]
        label_column = options.label_column or "label"
        feature = loaded.features.get(label_column)
        class_names = None
        if isinstance(feature, datasets.ClassLabel):
            class_names = list(feature.names)
        if not rows:
            raise DataError(f"`{name}` has no rows in split {options.split!r}. Choose another source.split.")
        names = [f"{index:08d}" for index in range(len(rows))]
        super().__init__(names, rows, options=options, class_names=class_names)

    def _read(self, row: int) -> bytes:
        value = self._images[row][self._column]
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            if content is None and path:
                try:
                    return Path(path).read_bytes()
                except OSError as error:
                    raise UndecodableError(f"unreadable: {error.strerror}") from error
            value = content
        if not isinstance(value, bytes):
            raise UndecodableError("no image in this row")
        return value

    def _content_hashes(self, rows: Sequence[int]) -> list[str]:
        hashes = []
        for row in rows:
            try:
                hashes.append(hashlib.sha256(self._read(row)).hexdigest())
            except UndecodableError:
                hashes.append("unreadable")
        return hashes


def find_parquet_files(path: Path, split: str) -> list[Path]:
    """The .parquet files of a path; in a folder, those whose name begins with the split, when any does.

    Raises:
        DataError: files are named after splits, and none after this one.
    """
    if path.is_file():
        if split != "train":
            raise DataError(
                f"`{path}` is one file without splits, and source.split={split!r} asks for one. Leave source.split out, or give its folder."
            )
        return [path]
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    by_split = [file for file in files if file.name.startswith(split)]
    named = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
    if not by_split and (split != "train" or "test" in named):
        raise DataError(
            f"no .parquet file in `{path}` belongs to split {split!r}; there are {', '.join(named) or 'none'}."
        )
    return by_split or files


def _load(datasets: Any, name: Path | str, split: str) -> Any:
    path = Path(name)
    try:
        if path.exists():
            files = [str(file) for file in find_parquet_files(path, split)]
            return datasets.load_dataset("parquet", data_files={"data": files}, split="data")
        return datasets.load_dataset(str(name), split=split)
    except DataError:
        raise
    except Exception as error:  # the library raises its own, pyarrow's, requests' and built-in errors
        reason = f"{type(error).__name__}: {error}"
        if path.exists():
            raise DataError(f"`{name}` cannot be read as Parquet ({reason}). Get the file again.") from error
        raise DataError(
            f"`{name}` is no file or folder here, and cannot be loaded from the hub ({reason}). "
            "Check the name, source.split and the network."
        ) from error


def _image_column(datasets: Any, features: Any, name: str) -> str:
    typed = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    columns = typed or [column for column, feature in features.items() if _holds_files(datasets, feature)]
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise DataError(
            f"`{name}` has no image column; its columns are {', '.join(features)}. Choose another data set."
        )
    nearest = did_you_mean("image", columns)
    raise DataError(f"`{name}` has several image columns: {', '.join(columns)}. Keep one of them. {nearest}")


def _holds_files(datasets: Any, feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
