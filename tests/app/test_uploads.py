"""Hostile uploads: each with its answer, the same as in docs/app.md."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pagoda.app import UploadLimits, clean_name, read_upload, read_uploaded_file
from pagoda.errors import ConfigError, DataError

LIMITS = UploadLimits(max_bytes=200_000, max_pixels=250_000, max_side=1000)


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that unpacks to width x height."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed comment unpacks to 20 MB."""
    whole = encoded(picture())
    packed = zlib.compress(b"a" * 20_000_000, 9)[:190_000]
    return whole[:33] + chunk(b"zTXt", b"Comment\0\0" + packed) + whole[33:]


def animated(format: str) -> bytes:
    frames = [picture(), picture().rotate(180)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is empty"),
    "text": (lambda: b"this is a text, not an image\n" * 9, "is not an image"),
    "a pickle": (lambda: b"\x80\x04\x95cposix\nsystem\n", "is not an image"),
    "an SVG with a script": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "is not an image"),
    "PostScript, which would be run": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "a zip": (lambda: b"PK\x03\x04" + bytes(99), "is not an image"),
    "too many bytes": (lambda: bytes(200_001), "at most 200,000 are taken"),
    "a truncated PNG": (lambda: encoded(picture(size=(99, 99)))[:-4000], "cannot be used: truncated"),
    "a truncated JPEG": (lambda: encoded(picture(size=(99, 99)), "JPEG")[:-900], "cannot be used: truncated"),
    "a header and nothing more": (lambda: bomb(9, 9)[:33], "damaged|cannot be used|is not an image"),
    "a decompression bomb": (lambda: bomb(60_000, 60_000), "more pixels than|60000 x 60000"),
    "a bomb below Pillow's own limit": (lambda: bomb(9_000, 9_000), "9000 x 9000 pixels; at most 250,000"),
    "one very wide line": (lambda: bomb(1_001, 1), "1001 x 1 pixels"),
    "a comment that unpacks to 20 MB": (text_bomb, "damaged|cannot be used"),
    "an animated GIF": (lambda: animated("GIF"), r"animated \(2 frames\)"),
    "an animated WebP": (lambda: animated("WEBP"), r"animated \(2 frames\)"),
    "an animated PNG": (lambda: animated("PNG"), r"animated \(2 frames\)"),
    "floating-point pixels": (lambda: encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "no known range"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_upload_is_refused_in_words(kind: str) -> None:
    make, answer = HOSTILE[kind]
    with pytest.raises(DataError, match=answer):
        read_upload(make(), "the upload.png", LIMITS)


def test_16_bits_come_down_to_8() -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    read = read_upload(encoded(Image.fromarray(values)), "deep.png", LIMITS).image
    assert np.asarray(read).tolist() == [[0, 100, 255]]


def test_exif_turns_the_picture_upright_and_nothing_of_it_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    info = PngImagePlugin.PngInfo()
    info.add_text("secret", "where I live")
    read = read_upload(encoded(picture(), exif=exif, pnginfo=info), "photo.png", LIMITS).image
    assert read.size == (9, 12)
    assert not read.info
    assert not dict(read.getexif())


def test_transparency_lies_on_white() -> None:
    read = read_upload(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), "clear.png", LIMITS).image
    assert read.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_ordinary_mode_is_read(mode: str) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    assert read_upload(encoded(picture(mode), format), "x", LIMITS).image.mode in ("L", "RGB")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Windows\\system32\\cat.png", "cat.png"),
        ("a\0b\n\r\x1b[31m.png", "ab[31m.png"),
        ("\u202egnp.exe", "gnp.exe"),
        ("..", "the file"),
        ("", "the file"),
        ("x" * 300 + ".png", "x" * 48 + "...xxxxx.png"),
    ],
)
def test_a_name_is_for_showing_only(name: str, shown: str) -> None:
    assert clean_name(name) == shown


def test_only_files_of_the_folder_of_uploads_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "cat.png").write_bytes(encoded(picture()))
    (tmp_path / "secret.png").write_bytes(encoded(picture()))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert read_uploaded_file(folder / "a" / "cat.png", folder).image.size == (12, 9)
    for path in (
        tmp_path / "secret.png",
        folder / ".." / "secret.png",
        folder / "link.png",
        folder,
        folder / "gone",
        "\0",
    ):
        with pytest.raises(DataError, match=r"no file that was uploaded|cannot be read"):
            read_uploaded_file(path, folder)


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_side", "max_seconds"])
def test_limits_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        UploadLimits(**{name: 0})
