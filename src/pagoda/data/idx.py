"""Images in IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pagoda.data.protocol import SourceConfig
from pagoda.data.table import TableSource
from pagoda.errors import ConfigError, DataError
from pagoda.files import hash_file

_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES_FILE = re.compile(r".*images[-.]idx3-ubyte(\.gz)?")


class IdxSource(TableSource):
    """8-bit grey images of an `images-idx3-ubyte` file (or .gz), labelled by the `labels-idx1-ubyte` file beside it.

    Args:
        path: The images file, or a folder that holds `train-...` or, for split "test", `t10k-...`; a path to a file
            already names the split.

    Raises:
        DataError: a file is missing, truncated, or not IDX; images and labels differ in number.
    """

    def __init__(self, path: Path | str, *, options: SourceConfig) -> None:
        if options.background not in ("black", SourceConfig.background):
            raise ConfigError(
                f"IDX files are white on black and padded with black; got source.background={options.background!r}."
            )
        path = Path(path)
        self.path = _images_file(path, options.split) if path.is_dir() else path
        self._pixels = _read_idx(self.path, axes=3)
        labels_file = _labels_file(self.path)
        self._files = [self.path] if labels_file is None else [self.path, labels_file]
        count = len(self._pixels)
        rows: list[dict[str, int]] = [{} for _ in range(count)]
        if labels_file is not None:
            labels = _read_idx(labels_file, axes=1)
            if len(labels) != count:
                raise DataError(
                    f"`{labels_file}` has {len(labels):,} labels for the {count:,} images of `{self.path}`. Get both again."
                )
            rows = [{"label": label} for label in labels.tolist()]
        super().__init__([f"{index:06d}" for index in range(count)], rows, options=options)

    @property
    def _background(self) -> tuple[int, int, int]:
        return (0, 0, 0)  # these sets are drawn in white on black: padding continues the black

    def _read(self, row: int) -> Image.Image:
        return Image.fromarray(self._pixels[row])

    def _content_hashes(self, rows: Sequence[int]) -> list[str]:
        return [hash_file(file) for file in self._files]


def find_idx_images(folder: Path) -> list[Path]:
    """Images files of IDX form in a folder."""
    return sorted(path for path in folder.iterdir() if _IMAGES_FILE.fullmatch(path.name))


def is_idx_images_file(path: Path) -> bool:
    """Whether the name is that of an images file of IDX form."""
    return _IMAGES_FILE.fullmatch(path.name) is not None


def _images_file(folder: Path, split: str) -> Path:
    if split not in _PREFIXES:
        raise DataError(f"IDX files have the splits {', '.join(_PREFIXES)}, got source.split={split!r}.")
    found = [path for path in find_idx_images(folder) if path.name.startswith(_PREFIXES[split])]
    if not found:
        raise DataError(f"`{folder}` holds no `{_PREFIXES[split]}-images-idx3-ubyte[.gz]`, needed for split {split}.")
    return found[0]


def _labels_file(images: Path) -> Path | None:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    for candidate in (name, f"{name}.gz", name.removesuffix(".gz")):
        if images.with_name(candidate).is_file():
            return images.with_name(candidate)
    return None


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file with the given number of axes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"`{path}` cannot be read ({error}): missing, truncated or not gzip. Get the file again."
        ) from error
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes((0, 0, 8, axes)):
        raise DataError(
            f"`{path}` is not an IDX file of bytes with {axes} axes: it starts with {content[:4].hex() or 'nothing'} "
            f"instead of {bytes((0, 0, 8, axes)).hex()}. Get the file again."
        )
    shape = tuple(np.frombuffer(content, dtype=">u4", count=axes, offset=4).tolist())
    expected = int(np.prod(shape))
    if len(content) - start != expected:
        raise DataError(
            f"`{path}` promises {expected:,} bytes after its header and has {len(content) - start:,}. Get the file again."
        )
    if expected == 0:
        raise DataError(f"`{path}` has no entries. Get the file again.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
