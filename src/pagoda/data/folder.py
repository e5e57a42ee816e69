"""Images in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pagoda.data.decode import UndecodableError
from pagoda.data.layout import find_layout
from pagoda.data.protocol import SourceConfig
from pagoda.data.table import TableSource
from pagoda.errors import DataError
from pagoda.files import hash_file


class FolderSource(TableSource):
    """Image files in a folder, arranged in one of the ways of `layout`. The fingerprint reads every file once.

    Raises:
        DataError: the folder is missing, unreadable, holds no images, or its metadata is unusable.
    """

    def __init__(self, path: Path | str, *, options: SourceConfig) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"there is no folder `{self.path}`. Check the path.")
        files = sorted(_walk(self.path))
        layout = find_layout(files, self._read_text, split=options.split, where=str(self.path))
        self._root = self.path / layout.root
        super().__init__(layout.names, layout.rows, options=options, class_names=layout.class_names)

    def file_path(self, index: int) -> Path:
        """The file of image `index`."""
        return self._root / self.sample_id(index)

    def _read_text(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def _read(self, row: int) -> bytes:
        try:
            return (self._root / self._names[row]).read_bytes()
        except FileNotFoundError as error:
            raise UndecodableError("missing") from error
        except OSError as error:
            raise UndecodableError(f"unreadable: {error.strerror}") from error

    def _content_hashes(self, rows: Sequence[int]) -> list[str]:
        paths = [self._root / self._names[row] for row in rows]
        return [hash_file(path) if path.is_file() and os.access(path, os.R_OK) else "unreadable" for path in paths]


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files below, relative and with forward slashes; links to folders are followed, once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"`{error.filename}` cannot be read ({error.strerror}). Check its permissions.") from error

    seen: set[str] = set()
    for directory, subdirectories, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(directory)
        if real in seen:  # a link back up would never end
            subdirectories.clear()
            continue
        seen.add(real)
        for file in files:
            yield Path(directory, file).relative_to(folder).as_posix()
