"""Images in a zip archive, read in place."""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagoda.data.decode import UndecodableError
from pagoda.data.layout import find_layout
from pagoda.data.protocol import SourceConfig
from pagoda.data.table import TableSource
from pagoda.errors import DataError

_LARGEST_ENTRY = 1 << 30  # bytes, unpacked


class ZipSource(TableSource):
    """Image files in a .zip, arranged in one of the ways of `layout`, without unpacking.

    The archive is opened when first needed and again in every process that receives a copy of the source. The
    fingerprint takes sizes and CRC-32 sums from the archive's directory and reads no image.

    Raises:
        DataError: the file is missing, not a complete zip archive, holds no images, or its metadata is unusable.
    """

    def __init__(self, path: Path | str, *, options: SourceConfig) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        try:
            entries = [entry for entry in self._opened().infolist() if not entry.is_dir()]
        except FileNotFoundError as error:
            raise DataError(f"there is no file `{self.path}`. Check the path.") from error
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"`{self.path}` is not a complete zip archive ({error}). Copy or pack it again.") from error
        self._entries = {entry.filename.removeprefix("./"): entry for entry in entries}
        layout = find_layout(sorted(self._entries), self._read_text, split=options.split, where=str(self.path))
        self._root = layout.root
        super().__init__(layout.names, layout.rows, options=options, class_names=layout.class_names)

    def __getstate__(self) -> dict[str, Any]:
        # Another process must not share the position in the open file.
        return {name: value for name, value in vars(self).items() if name not in ("_archive", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _archive=None, _lock=threading.Lock())

    def close(self) -> None:
        """Close the archive; the next image opens it again."""
        with self._lock:
            if self._archive is not None:
                self._archive.close()
                self._archive = None

    def __del__(self) -> None:
        archive = getattr(self, "_archive", None)
        if archive is not None:
            archive.close()

    def _opened(self) -> zipfile.ZipFile:
        with self._lock:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self.path)
            return self._archive

    def _read_text(self, name: str) -> bytes:
        try:
            return self._read_entry(name)
        except UndecodableError as error:
            raise DataError(f"`{name}` in `{self.path}` cannot be read: {error}. Pack the archive again.") from error

    def _read(self, row: int) -> bytes:
        return self._read_entry(self._root + self._names[row])

    def _read_entry(self, name: str) -> bytes:
        entry = self._entries.get(name)
        if entry is None:
            raise UndecodableError("missing")
        if entry.file_size > _LARGEST_ENTRY:
            raise UndecodableError(f"{entry.file_size:,} bytes, more than a file here may have")
        try:
            return self._opened().read(entry)
        except RuntimeError as error:  # zipfile has no better word for a password or an unknown method
            raise UndecodableError("encrypted, or packed in an unknown way") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UndecodableError(f"damaged in the archive: {error}") from error

    def _content_hashes(self, rows: Sequence[int]) -> list[str]:
        entries = [self._entries.get(self._root + self._names[row]) for row in rows]
        return [f"{entry.file_size}-{entry.CRC:08x}" if entry else "unreadable" for entry in entries]
