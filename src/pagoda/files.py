"""Files that are whole or absent: atomic writes, hashes, disk checks, and safetensors that refuse anything else.

A reader never sees half a file: everything is written under a temporary name in the same folder, flushed to the disk,
and renamed over the final name in one step. A process killed in the middle leaves at most a `.name.<host>-<pid>.tmp`
behind, which the next writer of that name on the same machine removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pagoda.errors import ArtifactError, ResourceError

_CHUNK = 1 << 20


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; on success its file is flushed to disk and renamed to `path`.

    When the body raises, the temporary file is removed and `path` is left as it was.

        with atomic_path("weights.safetensors") as temporary:
            save_file(tensors, temporary)

    Args:
        path: Final name of a file. Its folder is created when missing.

    Raises:
        ResourceError: the disk became full while the body was writing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with named_disk_errors(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # the rename itself is only durable once the folder is on disk


@contextmanager
def named_disk_errors(path: Path | str) -> Iterator[None]:
    """Say what was being written when the disk refused: it is full, or what lies there may not be changed.

    Args:
        path: What the block writes; named in the message.

    Raises:
        ResourceError: in place of the error of the disk. Errors of other kinds pass.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise ResourceError(
                f"the disk became full while `{path}` was being written; an earlier version of it is untouched. "
                "Free space and run the same command again."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"`{path}` may not be written ({error.strerror}); what was there is untouched. Change the rights of its folder, or choose "
                "another folder, and run the same command again."
            ) from error
        raise


def _host() -> str:
    return "".join(character for character in socket.gethostname() if character.isalnum()) or "host"


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` whose process on this machine no longer runs."""
    if os.name == "nt":  # no harmless way to ask whether a process runs
        return
    prefix = f".{path.name}.{_host()}-"
    for entry in os.scandir(path.parent):
        process = entry.name[len(prefix) : -len(".tmp")]
        if entry.name.startswith(prefix) and entry.name.endswith(".tmp") and process.isdecimal():
            try:
                os.kill(int(process), 0)  # signal 0 only asks
            except ProcessLookupError:
                Path(entry.path).unlink(missing_ok=True)
            except PermissionError:  # runs, under another user
                continue


def _is_disk_full(error: BaseException) -> bool:
    """Whether Python, or the safetensors library (which only has words for it), ran out of space."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def _flush(path: Path) -> None:
    """Ask the operating system to put a file (or a folder's entries) on the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path | str, content: bytes) -> None:
    """Write a whole file, or leave the old one untouched."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write a whole UTF-8 text file, or leave the old one untouched."""
    write_bytes_atomic(path, text.encode("utf-8"))


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's content, 64 hexadecimal characters, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """First 16 hexadecimal characters of the SHA-256 of a JSON value; the order of keys does not matter.

    Raises:
        TypeError: `value` holds something that JSON cannot express.
        ValueError: `value` holds a NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def check_disk(path: Path | str, needed_bytes: int, what: str) -> None:
    """Make sure that `needed_bytes` fit on the disk that holds `path`, which need not exist yet.

    Args:
        what: What wants the space, as the subject of the message: "the image cache".

    Raises:
        ResourceError: less is free.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"{what} needs {_megabytes(needed_bytes)} on the disk of `{folder}`, and {_megabytes(free)} are free. "
            f"Free {_megabytes(needed_bytes - free)}, or choose a folder on another disk."
        )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Args:
        tensors: Named tensors on any device; written contiguous, from the CPU.
        metadata: Short strings kept in the header.
    """
    # safetensors refuses tensors that share memory (tied weights), so each goes in as its own contiguous copy.
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata or {}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata. Nothing but safetensors is ever read.

    Raises:
        ArtifactError: the file is missing, empty, truncated, a pickle, a torch archive, or not safetensors at all.
    """
    with _opened(Path(path)) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors, metadata


def tensor_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by name; the tensors are not read.

    Raises:
        ArtifactError: as `load_tensors`.
    """
    with _opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is said in our words."""
    if not path.is_file():
        raise ArtifactError(f"`{path}` does not exist or is not a file. Check the path, or make it again.")
    refuse_foreign(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ArtifactError(
            f"`{path}` is not a complete safetensors file ({error}): it is truncated or was written by something else. "
            "Delete it and run the step that writes it again."
        ) from error


def refuse_foreign(path: Path | str) -> None:
    """Recognise by their first bytes the files that are never read as safetensors.

    Raises:
        ArtifactError: the file is empty, a pickle, or a zip archive as `torch.save` writes.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise ArtifactError(f"`{path}` is empty (0 bytes). Delete it and run the step that writes it again.")
    # A pickle of protocol 2 or later starts with 0x80 and its number. So may a safetensors header of 640 bytes and the
    # like, whose bytes 3 to 7 are zero (the length of the header) and whose ninth is the brace that opens the JSON.
    is_safetensors = head[8:9] == b"{" and head[4:8] == bytes(4)
    kind = None
    if head[:2] == b"PK":
        kind = "a zip archive, as torch.save writes (.pt)"
    elif head[:1] == b"\x80" and not is_safetensors:
        kind = "a pickle"
    if kind is not None:
        raise ArtifactError(
            f"`{path}` is {kind}. Only safetensors is read here, because loading a pickle can run any code. "
            "Convert it where you trust it: safetensors.torch.save_file(state_dict, 'name.safetensors')."
        )
