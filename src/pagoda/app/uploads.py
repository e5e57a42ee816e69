"""Uploaded images, read with limits: what a file says of itself is looked at before any of its pixels is made."""

from __future__ import annotations

import io
import time
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from pagoda.data.decode import UndecodableError, decode_image
from pagoda.errors import ConfigError, DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are opened; others have decoders that nobody here needs."""
_LONGEST_NAME = 60
_BOMB = (Image.DecompressionBombWarning, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What an upload may be at most."""

    max_bytes: int = 16 * 2**20
    """Of the file."""
    max_pixels: int = 4096 * 4096
    """Width times height, as the file's header says it."""
    max_side: int = 8192
    """Width, and height."""
    max_seconds: float = 10.0
    """For the decoding of one file; and, on the wire, between one piece of a body and the next."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_side", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class UploadedImage:
    """An image that was read.

    Attributes:
        name: What the visitor called it, without folders and control characters; for showing, never a path.
        image: Upright, opaque, 8 bits, mode "L" or "RGB"; nothing of the file's metadata is kept.
    """

    name: str
    image: Image.Image


def read_upload(content: bytes, name: str, limits: UploadLimits | None = None) -> UploadedImage:
    """The pixels of an uploaded file. Turned upright by its EXIF; 16-bit values come down to 8; transparency lies on white.

    Args:
        content: The whole file.
        name: Whatever the visitor's browser said; it decides nothing.
        limits: The defaults when None.

    Raises:
        DataError: too large in bytes or pixels, no image, truncated, animated, of a format or range that is not read, or too slow.
    """
    limits = UploadLimits() if limits is None else limits
    shown = clean_name(name)
    if len(content) > limits.max_bytes:
        raise DataError(
            f"{shown} has {len(content):,} bytes, at most {limits.max_bytes:,} are taken. Make it smaller and upload it again."
        )
    started = time.monotonic()
    _look_at_header(content, shown, limits)
    try:
        image = decode_image(content, (255, 255, 255))
    except UndecodableError as error:
        raise DataError(f"{shown} cannot be used: {error}. Give a whole {_listed()} file.") from error
    if time.monotonic() - started > limits.max_seconds:
        raise DataError(f"{shown} took longer than {limits.max_seconds:g} s to decode. Make it smaller.")
    image.info.clear()
    return UploadedImage(name=shown, image=image)


def read_uploaded_file(path: Path | str, folder: Path | str, limits: UploadLimits | None = None) -> UploadedImage:
    """`read_upload` of a file that the web server put into its folder of uploads.

    Raises:
        DataError: see `read_upload`; also a path outside of that folder.
    """
    limits = UploadLimits() if limits is None else limits
    return read_upload(uploaded_bytes(path, folder, limits), Path(path).name, limits)


def uploaded_bytes(path: Path | str, folder: Path | str, limits: UploadLimits) -> bytes:
    """The content of an uploaded file, as far as it is worth reading.

    Raises:
        DataError: the path leads out of the folder of uploads, or the file is gone.
    """
    try:
        resolved = Path(path).resolve()
        if not resolved.is_relative_to(Path(folder).resolve()) or not resolved.is_file():
            raise DataError("this is no file that was uploaded here. Upload it again.")
        with resolved.open("rb") as file:
            return file.read(limits.max_bytes + 1)  # one more than allowed is enough to refuse it
    except (OSError, ValueError) as error:
        raise DataError("the uploaded file cannot be read any more. Upload it again.") from error


def clean_name(name: str) -> str:
    """The last part of a name, for showing: no folders of either system, no control or invisible characters, not long."""
    last = PureWindowsPath(PurePosixPath(name.replace("\0", "")).name).name
    kept = "".join(c for c in last if unicodedata.category(c)[0] not in "CZ" or c == " ").strip()
    if len(kept) > _LONGEST_NAME:
        kept = kept[: _LONGEST_NAME - 12] + "..." + kept[-9:]
    return kept if kept.strip(".") else "the file"


def _look_at_header(content: bytes, shown: str, limits: UploadLimits) -> None:
    """Refuse by the header alone.

    Raises:
        DataError: see `read_upload`.
    """
    if not content:
        raise DataError(f"{shown} is empty (0 bytes). Upload it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                frames = int(getattr(image, "n_frames", 1))
    except _BOMB as error:
        raise DataError(f"{shown} has more pixels than the {limits.max_pixels:,} that are taken.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{shown} is not an image of a format that is read here: {_listed()}.") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{shown} is damaged ({str(error)[:80]}). Give a whole {_listed()} file.") from error
    except (
        Exception
    ) as error:  # decoders raise what they like (struct.error, KeyError, ZeroDivisionError) on hostile headers
        raise DataError(f"{shown} is damaged ({type(error).__name__}). Give a whole {_listed()} file.") from error
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise DataError(
            f"{shown} has {width} x {height} pixels; at most {limits.max_pixels:,} pixels and {limits.max_side:,} a side are taken."
        )
    if frames > 1:
        raise DataError(f"{shown} is animated ({frames} frames). Upload one picture.")


def _listed() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
