"""From any file to plain pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pagoda.data.decode import UndecodableError, decode_image, has_colour, pad_image, to_plain

WHITE, TEAL = (255, 255, 255), (0, 128, 130)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded_or_reason(content: bytes) -> Image.Image | str:
    try:
        return decode_image(content, WHITE)
    except UndecodableError as error:
        return str(error)


@pytest.mark.parametrize("background", [WHITE, TEAL, (0, 0, 0)])
def test_rgba_is_composited_exactly_for_every_value_and_alpha(background: tuple[int, int, int]) -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([value, 255 - value, value // 2, alpha], axis=-1).astype(np.uint8)
    plain = np.asarray(decode_image(encoded(Image.fromarray(pixels)), background)).astype(int)
    share = alpha[:, :, None] / 255
    assert abs(plain - (pixels[:, :, :3] * share + np.array(background) * (1 - share))).max() <= 0.5 + 1e-9


def test_grey_with_alpha_stays_grey_on_grey_and_becomes_rgb_on_a_colour() -> None:
    pixels = np.stack([np.full((4, 4), 100), np.full((4, 4), 51)], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    assert image.mode == "LA"
    on_white = decode_image(encoded(image), WHITE)
    assert (on_white.mode, on_white.getpixel((0, 0))) == ("L", 224)  # 0.2 * 100 + 0.8 * 255
    on_teal = decode_image(encoded(image), TEAL)
    assert (on_teal.mode, on_teal.getpixel((0, 0))) == ("RGB", (20, 122, 124))


def test_a_palette_with_a_transparent_entry_shows_the_background_there() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    plain = decode_image(encoded(image, transparency=1), TEAL)
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), TEAL]
    half = decode_image(encoded(image, transparency=bytes([255, 128])), WHITE)
    assert half.getpixel((1, 0)) == (127, 127, 255)


def test_a_transparent_colour_key_of_an_rgb_file_shows_the_background() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (200, 100, 0))
    plain = decode_image(encoded(image, transparency=(1, 2, 3)), TEAL)
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [TEAL, (200, 100, 0)]


def test_sixteen_bits_map_the_whole_range_onto_eight() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    plain = decode_image(encoded(Image.fromarray(values)), WHITE)
    assert plain.mode == "L"
    assert abs(np.asarray(plain) - values / 257).max() <= 0.5
    wide = Image.fromarray(values.astype(np.int32))
    assert (np.asarray(to_plain(wide, WHITE)) == np.asarray(plain)).all()
    with pytest.raises(UndecodableError, match="no known range"):
        to_plain(Image.fromarray(values.astype(np.int32) * 10), WHITE)
    with pytest.raises(UndecodableError, match="pixel format F has no known range"):
        to_plain(Image.fromarray(values.astype(np.float32)), WHITE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int, picture: Callable[..., Image.Image]) -> None:
    upright = Image.fromarray(np.repeat(np.repeat(np.asarray(picture(0, size=3)), 8, 0), 8, 1)[:16])  # 24 x 16
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decode_image(encoded(stored, exif=exif), WHITE)
    assert plain.size == (24, 16)
    assert (np.asarray(plain) == np.asarray(upright)).all()


def test_cmyk_one_bit_and_animations_become_plain() -> None:
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), WHITE)
    assert (cmyk.mode, cmyk.getpixel((0, 0))) == ("RGB", (255, 0, 0))
    bits = decode_image(encoded(Image.new("1", (8, 8), 1)), WHITE)
    assert (bits.mode, bits.getpixel((0, 0))) == ("L", 255)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    animated = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), WHITE)
    assert (animated.mode, animated.getpixel((0, 0))) == ("RGB", (255, 0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_no_truncation_crashes_and_half_a_file_is_called_truncated(
    kind: str, picture: Callable[..., Image.Image]
) -> None:
    content = encoded(picture(0, size=24), kind)
    for length in range(0, len(content) - 1, max(1, len(content) // 60)):
        found = decoded_or_reason(content[:length])
        assert found if isinstance(found, str) else found.size == (24, 24)  # only unneeded bytes at the end were cut
    with pytest.raises(UndecodableError, match=r"truncated|damaged"):
        decode_image(content[: len(content) // 2], WHITE)


def test_every_single_damaged_byte_of_a_png_is_an_image_or_a_reason(picture: Callable[..., Image.Image]) -> None:
    content = encoded(picture(0, size=6))
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        found = decoded_or_reason(bytes(damaged))
        assert found if isinstance(found, str) else found.mode in ("L", "RGB")


def test_reasons_are_in_words() -> None:
    with pytest.raises(UndecodableError, match="0 bytes"):
        decode_image(b"", WHITE)
    with pytest.raises(UndecodableError, match="not an image"):
        decode_image(b"this is a letter to a friend", WHITE)


def test_a_decompression_bomb_is_refused_before_its_pixels_are_unpacked() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (10_000, 60_000):  # beyond Pillow's limit of a warning, and of an error
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(UndecodableError, match="too many pixels"):
            decode_image(bomb, WHITE)


def test_padding_centres_the_image_and_refuses_to_cut_it(picture: Callable[..., Image.Image]) -> None:
    image = picture(0, size=6)
    padded = np.asarray(pad_image(image, 10, TEAL))
    assert (padded[2:8, 2:8] == np.asarray(image)).all()
    frame = np.ones((10, 10), dtype=bool)
    frame[2:8, 2:8] = False
    assert (padded[frame] == TEAL).all()
    assert pad_image(picture(0, channels=1), 20, (7, 7, 7)).mode == "L"
    with pytest.raises(UndecodableError, match=r"do not fit into source\.pad=5"):
        pad_image(image, 5, TEAL)


def test_colour_is_found_in_a_single_pixel() -> None:
    image = Image.new("RGB", (9, 9), (8, 8, 8))
    assert not has_colour(image)
    image.putpixel((4, 4), (8, 8, 9))
    assert has_colour(image)
    assert not has_colour(Image.new("L", (2, 2)))
