"""onnxruntime for browsers: one pinned release from npm, checked before it is used."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.errors import ArtifactError
from pagoda.files import write_bytes_atomic

RUNTIME_NAME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_FILES = {
    "ort.wasm.bundle.min.mjs": "1KcF8CWAZeqtTcvLgKPtOMXIbkWeh++LDCQpDhQ5ARVxHAL1VNL5rr0OI+MxTbmNIANldE/A/q+O4gSKgSMjWQ==",
    "ort-wasm-simd-threaded.wasm": "Gt7e1iIDIZ/PXEhM/OVleqWHVom0kEI/hs8cod0crXcV9jDGM39B23HuQnlOOgDOC3x4k5pxIgtdgzaL9up3MA==",
}
"""The two files of the package that a page needs, in its folder `dist`, and their SHA-512 in base64."""
NPM_SECONDS = 600
_SCRIPT, _WASM = RUNTIME_FILES


@dataclass(frozen=True, kw_only=True)
class WebRuntime:
    """What a page needs of onnxruntime-web.

    Attributes:
        script: The module that holds onnxruntime's JavaScript, its loader of WebAssembly among it.
        wasm: The WebAssembly binary.
    """

    script: str = field(repr=False)
    wasm: bytes = field(repr=False)


def find_runtime(path: Path | str | None = None, *, cache: Path | None = None) -> WebRuntime:
    """The pinned onnxruntime-web: from `path`, else from the cache, else from npm, which fills the cache.

    Args:
        path: The package as `npm pack` (a .tgz) or `npm install` (a folder) leaves it, or a folder with its two files.
        cache: Folder for the two files; `pagoda/onnxruntime-web-<version>` in the user's cache when None.

    Raises:
        ArtifactError: nothing is there, npm is missing or fails, or a file is not the pinned one.
    """
    if path is not None:
        return _read(Path(path))
    cache = _cache_folder() if cache is None else cache
    if all((cache / name).is_file() for name in RUNTIME_FILES):
        return _read(cache)
    runtime = _fetch()
    write_bytes_atomic(cache / _SCRIPT, runtime.script.encode("utf-8"))
    write_bytes_atomic(cache / _WASM, runtime.wasm)
    return runtime


def pack_command() -> str:
    """The command that gets the package by hand."""
    return f"npm pack {RUNTIME_NAME}@{RUNTIME_VERSION}"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pagoda" / f"{RUNTIME_NAME}-{RUNTIME_VERSION}"


def _read(path: Path) -> WebRuntime:
    if path.is_file():
        return _checked(lambda: _unpack(path), path)
    for folder in (path, path / "dist", path / "package" / "dist", path / "node_modules" / RUNTIME_NAME / "dist"):
        if all((folder / name).is_file() for name in RUNTIME_FILES):
            return _checked(lambda: {name: (folder / name).read_bytes() for name in RUNTIME_FILES}, folder)  # noqa: B023
    raise ArtifactError(
        f"{path} holds no {' and '.join(RUNTIME_FILES)} of {RUNTIME_NAME}. Run `{pack_command()}` and give the file "
        f"that it writes: --runtime {RUNTIME_NAME}-{RUNTIME_VERSION}.tgz"
    )


def _fetch() -> WebRuntime:
    npm = shutil.which("npm")
    by_hand = (
        f"Run `{pack_command()}` where there is npm and a network, and give the file that it writes: "
        f"--runtime {RUNTIME_NAME}-{RUNTIME_VERSION}.tgz"
    )
    if npm is None:
        raise ArtifactError(
            f"a page needs {RUNTIME_NAME} {RUNTIME_VERSION}, and there is no npm here to fetch it. {by_hand}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{RUNTIME_NAME}@{RUNTIME_VERSION}", "--silent"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_SECONDS)
            package = next(Path(folder).glob("*.tgz"))
        except (subprocess.SubprocessError, OSError, StopIteration) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()[-300:]
            raise ArtifactError(
                f"npm could not fetch {RUNTIME_NAME} {RUNTIME_VERSION}: {said or 'it said nothing'}. {by_hand}"
            ) from error
        return _read(package)


def _unpack(package: Path) -> dict[str, bytes]:
    with tarfile.open(package, "r:gz") as archive:
        found = {}
        for name in RUNTIME_FILES:
            file = archive.extractfile(f"package/dist/{name}")  # read, never extracted onto the disk
            if file is None:
                raise KeyError(name)
            found[name] = file.read()
        return found


def _checked(read: Callable[[], Mapping[str, bytes]], place: Path) -> WebRuntime:
    try:
        found = read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise ArtifactError(
            f"{place} cannot be read as the package {RUNTIME_NAME} ({error}). Run `{pack_command()}` again."
        ) from error
    for name, wanted in RUNTIME_FILES.items():
        digest = base64.b64encode(hashlib.sha512(found[name]).digest()).decode("ascii")
        if digest != wanted:
            raise ArtifactError(
                f"{name} in {place} is not that of {RUNTIME_NAME} {RUNTIME_VERSION}: its SHA-512 is {digest[:16]}..., "
                f"expected {wanted[:16]}.... Run `{pack_command()}` and give what it writes by --runtime."
            )
    return WebRuntime(script=found[_SCRIPT].decode("utf-8"), wasm=found[_WASM])
