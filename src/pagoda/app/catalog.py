"""The run folders below a root: what there is, what state it is in, and nothing from anywhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pagoda.errors import ArtifactError, ConfigError, PagodaError
from pagoda.stages.run_folder import RunFolder
from pagoda.version import __version__

_DEPTH = 3
"""Folders between the root and a run, at most."""
_MOST = 500
"""Runs that are listed at most."""
_LONGEST_NAME = 400


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """A run as the catalog sees it.

    Attributes:
        name: Its path below the root, with `/`; the folder's own name where the root is a run itself.
        sizes: Sides of the images that it can make, in pixels; empty before the first generator is there.
        problem: Why it cannot be opened, or nothing.
    """

    name: str
    sizes: tuple[int, ...] = ()
    problem: str = ""


class RunCatalog:
    """Run folders below a root. Names come from visitors: each is checked every time.

    Args:
        root: A folder of run folders, or one run folder.

    Raises:
        ConfigError: the root is no folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise ConfigError(f"{root} is not a folder. Give the folder that holds your runs: `pagoda app runs/`.")
        self._alone = (self.root / "config.yaml").is_file()
        self._found_good: dict[Path, tuple[object, ...]] = {}

    def entries(self) -> list[RunEntry]:
        """All runs, by name; those that cannot be opened say why."""
        found = []
        for name in self._names():
            try:
                found.append(RunEntry(name=name, sizes=tuple(self.open(name).generator_sizes())))
            except PagodaError as error:
                found.append(RunEntry(name=name, problem=str(error)))
        return found

    def open(self, name: object) -> RunFolder:
        """The run of a name.

        Raises:
            ArtifactError: no such run below the root (any more), or one that a newer version has written to.
            ConfigError: its configuration is not one of this version.
        """
        path = self._path(name)
        if path is None:
            shown = str(name)[:80]
            raise ArtifactError(
                f"there is no run {shown!r} here (any more). Choose one of the list; `pagoda app` shows the folders below "
                f"{self.root.name}/ that hold a config.yaml."
            )
        run = RunFolder.open(path)
        # Reading the configuration takes longer than making an image, and every request and every call of a network asks.
        files = _files_read(run)
        if self._found_good.get(path) != files:
            _refuse_newer(run, str(name))
            run.config()
            if len(self._found_good) >= _MOST:
                self._found_good.clear()
            self._found_good[path] = files
        return run

    def _path(self, name: object) -> Path | None:
        """Folder of a run, or None for whatever is not a run below the root."""
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or not name.isprintable():
            return None
        if self._alone:
            return self.root if name == self.root.name and (self.root / "config.yaml").is_file() else None
        parts = name.split("/")
        if len(parts) > _DEPTH or any(
            part in ("", ".", "..") or part.startswith(".") or "\\" in part for part in parts
        ):
            return None
        try:
            path = self.root.joinpath(*parts).resolve()
            inside = path.is_relative_to(self.root) and (path / "config.yaml").is_file()
            # A link inside of the run may not lead out of the root either.
            inside = inside and (path / "config.yaml").resolve().is_relative_to(self.root)
        except (OSError, ValueError):  # names that no file system takes, loops of links
            return None
        return path if inside else None

    def _names(self) -> list[str]:
        if self._alone:
            return [self.root.name]
        names = []
        for name in _folders(self.root, "", _DEPTH):
            if self._path(name) is not None:
                names.append(name)
                if len(names) == _MOST:
                    break
        return sorted(names)


def _folders(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    """Names of the folders that hold a config.yaml; nothing is looked for inside of them."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # removed meanwhile, or not ours to read
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        name = prefix + entry.name
        if Path(entry.path, "config.yaml").is_file():
            yield name
        elif depth > 1 and not entry.is_symlink():
            yield from _folders(Path(entry.path), name + "/", depth - 1)


def _files_read(run: RunFolder) -> tuple[object, ...]:
    """Which files `RunCatalog.open` reads, and which writing of each: files are replaced, never changed in place."""
    found: list[tuple[str, int, int, int]] = []
    for path in (run.config_path, *sorted((run.path / "stages").glob("*.json"))):
        try:
            status = path.stat()
        except OSError:  # removed meanwhile: reading it says what that means
            continue
        found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _refuse_newer(run: RunFolder, name: str) -> None:
    """Refuse a run that another, newer version has worked on: it may mean other things by the same words.

    Raises:
        ArtifactError: a stage was started by a newer version, or its record cannot be read.
    """
    for path in sorted((run.path / "stages").glob("*.json")):
        try:
            made_by = str(json.loads(path.read_text(encoding="utf-8")).get("version", ""))
        except FileNotFoundError:
            continue  # removed meanwhile
        except (OSError, ValueError, AttributeError) as error:
            raise ArtifactError(f"stages/{path.name} of {name} cannot be read ({error}).") from error
        if _numbers(made_by) > _numbers(__version__):
            raise ArtifactError(
                f"stage `{path.stem}` of {name} was made by pagoda {made_by}, this is {__version__}. "
                "Run: pip install --upgrade pagoda"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """0.3.1.dev2 -> (0, 3, 1)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
