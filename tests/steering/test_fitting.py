"""A user's image onto the model's square and back: every kind of file, masks, and pixels that are kept byte for byte."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pagoda.data import Downsampler
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.images import save_image
from pagoda.steering import (
    Square,
    choose_square,
    composite,
    cut_square,
    fill_picture,
    fit_mask,
    fit_picture,
    paint_mask,
    read_mask,
    read_picture,
    to_image,
    to_tensor,
)

REDUCE = Downsampler()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


# Reading.


def test_files_bytes_and_open_images_are_the_same_picture(tmp_path: Path) -> None:
    image = Image.fromarray(noise(9, 7))
    image.save(tmp_path / "x.png")
    pictures = [
        read_picture(i, channels=3) for i in (image, encoded(image), tmp_path / "x.png", str(tmp_path / "x.png"))
    ]
    assert len({picture.digest for picture in pictures}) == 1
    assert pictures[0].size == (9, 7)
    assert np.array_equal(pictures[0].pixels, noise(9, 7))


def test_transparent_pixels_are_seen_on_the_background_and_kept_as_they_are() -> None:
    pixels = noise(6, 5, 4)
    picture = read_picture(Image.fromarray(pixels), channels=3, background=(0, 0, 255))
    assert np.array_equal(picture.own, pixels[..., :3])
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha, pixels[..., 3])
    weights = pixels[..., 3:] / 255
    np.testing.assert_allclose(picture.pixels, pixels[..., :3] * weights + (1 - weights) * [0, 0, 255], atol=0.51)
    assert np.array_equal(np.asarray(to_image(picture)), pixels)


def test_exif_rotation_16_bits_and_palettes_are_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_picture(encoded(Image.fromarray(noise(9, 7)), exif=exif), channels=3)
    assert turned.size == (7, 9)
    assert np.array_equal(turned.pixels, np.rot90(noise(9, 7), -1))
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(noise(9, 7)), exif=exif)))
    assert np.array_equal(read_picture(opened, channels=3).pixels, turned.pixels)
    deep = Image.fromarray(noise(9, 7, 1).astype(np.uint16) * 257)
    for given in (deep, encoded(deep)):
        with pytest.warns(UserWarning, match="has 16 bits a channel. It is edited and written with 8"):
            assert np.array_equal(read_picture(given, channels=1).pixels[..., 0], noise(9, 7, 1))
    palette = Image.fromarray(noise(9, 7)).quantize(8)
    assert np.array_equal(read_picture(palette, channels=3).pixels, np.asarray(palette.convert("RGB")))


def deep_file(values: np.ndarray, exif: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel of values (H, W, C), which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    told = chunk(b"eXIf", exif) if exif else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + told + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_rounded_to_the_nearest_of_8_and_warned_about(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, channels)).astype(np.uint16)
    nearest = np.round(values / 257).astype(np.uint8)
    colours = nearest[..., :3] if channels > 2 else nearest[..., :1].repeat(3, -1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for content, turns in ((deep_file(values), 0), (deep_file(values, exif.tobytes().removeprefix(b"Exif\0\0")), -1)):
        with pytest.warns(UserWarning, match="the image has 16 bits a channel. It is edited and written with 8"):
            picture = read_picture(content, channels=3)
        assert np.array_equal(picture.own, np.rot90(colours, turns))
        if channels in (2, 4):
            assert picture.alpha is not None
            assert np.array_equal(picture.alpha, np.rot90(nearest[..., -1], turns))
    if channels > 1:
        with pytest.warns(UserWarning, match="of an image that Pillow has opened, colours are cut"):
            read_picture(Image.open(io.BytesIO(deep_file(values))), channels=3)


def test_grey_and_colour_meet_where_nothing_is_lost() -> None:
    grey = noise(5, 5, 1)
    assert np.array_equal(read_picture(Image.fromarray(grey), channels=3).pixels, np.stack([grey] * 3, -1))
    assert np.array_equal(read_picture(Image.fromarray(np.stack([grey] * 3, -1)), channels=1).pixels[..., 0], grey)
    with pytest.raises(
        DataError, match=r"coloured and the model makes grey images. Convert it first: image.convert\('L'\)"
    ):
        read_picture(Image.fromarray(noise(5, 5)), channels=1)


def test_an_animation_wants_a_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), (k * 60, 0, 0)) for k in range(3)]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for given in (path, Image.open(io.BytesIO(path.read_bytes()))):
        with pytest.raises(DataError, match=r"animated, 3 frames\. Choose one .* --frame \(in Python frame=\)"):
            read_picture(given, channels=3)
        assert read_picture(given, channels=3, frame=2).pixels[0, 0, 0] == 120
        with pytest.raises(DataError, match="has 3 frames, none of number 3"):
            read_picture(given, channels=3, frame=3)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png cannot be edited: unreadable"):
        read_picture(tmp_path / "nowhere.png", channels=3)
    (tmp_path / "text.png").write_text("words")
    with pytest.raises(DataError, match=r"text\.png cannot be edited: not an image"):
        read_picture(tmp_path / "text.png", channels=3)
    with pytest.raises(DataError, match="the image cannot be edited: 0 bytes"):
        read_picture(b"", channels=3)
    with pytest.raises(DataError, match="pixel format F has no known range"):
        read_picture(Image.new("F", (4, 4)), channels=3)


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpg"])
def test_a_profile_of_such_pixels_is_written_again(name: str, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    coloured = read_picture(encoded(Image.fromarray(noise(6, 5)), icc_profile=profile), channels=3)
    save_image(to_image(coloured), tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.info["icc_profile"] == profile
    cmyk = encoded(Image.new("CMYK", (6, 5)), "TIFF", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    assert "icc_profile" not in to_image(read_picture(cmyk, channels=3)).info


# Fitting and compositing.


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (16, 16), (5, 7), (1, 9)])
def test_the_square_holds_all_or_the_centre(size: tuple[int, int]) -> None:
    whole, centre = choose_square(size), choose_square(size, fit="crop")
    assert (whole.side, centre.side) == (max(size), min(size))
    rows, columns = whole.inside(*size)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (size[1], size[0])
    pixels = noise(*size)
    cut = cut_square(pixels, whole)
    assert cut.shape == (max(size), max(size), 3)
    left, top = -whole.left, -whole.top
    assert np.array_equal(cut[top : top + size[1], left : left + size[0]], pixels)
    assert np.array_equal(cut[0, left], pixels[0, 0])  # the edge is continued
    assert fit_picture(read_picture(Image.fromarray(pixels), channels=3), centre, 8, REDUCE).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (16, 16), (11, 9)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_compositing_keeps_what_is_to_be_kept_and_is_idempotent(fit: Any, size: tuple[int, int], alpha: bool) -> None:
    pixels = noise(*size, 4 if alpha else 3)
    picture = read_picture(Image.fromarray(pixels), channels=3)
    square = choose_square(size, fit=fit)
    keep = np.ones(size[::-1], bool)
    keep[size[1] // 2 : size[1] // 2 + 3, size[0] // 2 : size[0] // 2 + 2] = False
    edited = torch.rand(1, 3, 16, 16) * 2 - 1
    once = composite(picture, square, edited, REDUCE, keep=keep)
    made = np.asarray(to_image(once))
    assert np.array_equal(made[keep], pixels[keep])
    assert (made[~keep] != pixels[~keep]).any()
    if alpha:
        assert (made[~keep][:, 3] == 255).all()
    twice = composite(once, square, edited, REDUCE, keep=keep)
    assert np.array_equal(np.asarray(to_image(twice)), made)
    all_new = composite(picture, square, edited, REDUCE)
    assert np.array_equal(composite(all_new, square, edited, REDUCE).pixels, all_new.pixels)
    rows, columns = square.inside(*size)
    beside = np.ones(size[::-1], bool)
    beside[rows, columns] = False
    if beside.any():
        assert np.array_equal(np.asarray(to_image(all_new))[beside], pixels[beside])  # with its transparency
    if alpha and beside.any():
        assert all_new.alpha is not None
        assert (all_new.alpha[~beside] == 255).all()
    else:
        assert all_new.alpha is None


def test_what_was_put_in_is_cut_out_again() -> None:
    picture = read_picture(Image.fromarray(noise(30, 20)), channels=3)
    square = Square(7, 2, 16)
    edited = to_tensor(noise(16, 16))
    made = composite(picture, square, edited, REDUCE)
    assert torch.equal(fit_picture(made, square, 16, REDUCE), edited)
    outside = np.ones((20, 30), bool)
    outside[2:18, 7:23] = False
    assert np.array_equal(made.pixels[outside], picture.pixels[outside])


def test_boxes_and_shapes_that_do_not_fit_are_refused() -> None:
    for box in ((0, 0, 21), (-1, 0, 5), (18, 0, 5), (0, 0, 0)):
        with pytest.raises(ConfigError, match="does not lie within the image's 20 x 12 px"):
            choose_square((20, 12), box=box)
    with pytest.raises(ConfigError, match="fit must be pad or crop, got 'stretch'"):
        choose_square((20, 12), fit="stretch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the box \(0, 0, 4\) says where the square lies, and fit=crop says it too"):
        choose_square((20, 12), fit="crop", box=(0, 0, 4))
    picture = read_picture(Image.fromarray(noise(8, 8)), channels=3)
    with pytest.raises(ShapeError, match=r"must be \(1, 3, s, s\), got \(1, 1, 8, 8\)"):
        composite(picture, Square(0, 0, 8), torch.zeros(1, 1, 8, 8), REDUCE)
    with pytest.raises(ShapeError, match="the mask has 9 x 8 px, the image 8 x 8"):
        composite(picture, Square(0, 0, 8), torch.zeros(1, 3, 8, 8), REDUCE, keep=np.ones((8, 9), bool))


# Masks.


def test_white_pixels_of_a_mask_are_kept_or_are_the_hole(tmp_path: Path) -> None:
    keep = np.ones((5, 8), bool)
    keep[1:3, 2:6] = False
    files = {
        "bytes.png": keep * np.uint8(255),
        "numbers.png": keep.astype(np.uint8),
        "deep.png": keep * np.uint16(65535),
    }
    for name, values in files.items():
        Image.fromarray(values).save(tmp_path / name)
    Image.fromarray(keep).save(tmp_path / "bits.png")
    for mask in (*(tmp_path / name for name in (*files, "bits.png")), keep, torch.from_numpy(keep).float()):
        assert np.array_equal(read_mask(mask, (8, 5)), keep)
        assert np.array_equal(read_mask(mask, (8, 5), mask_is="holes"), ~keep)


def test_a_grey_mask_needs_a_threshold(tmp_path: Path) -> None:
    values = np.full((5, 8), 255, np.uint8)
    values[1:3, 2:6], values[3], values[0, 0] = 127, 128, 0
    Image.fromarray(values).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"also has 2 values between, from 127 to 128\. .* --mask-threshold N"):
        read_mask(tmp_path / "m.png", (8, 5))
    for threshold in (1, 128, 255):
        assert np.array_equal(read_mask(tmp_path / "m.png", (8, 5), threshold=threshold), values >= threshold)
    assert np.array_equal(read_mask(tmp_path / "m.png", (8, 5), mask_is="holes", threshold=128), values < 128)
    for options, message in (
        ({"threshold": 0}, "mask_threshold is a value of bytes from 1 to 255, got 0"),
        ({"mask_is": "white"}, "known or holes; got 'white'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_mask(tmp_path / "m.png", (8, 5), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="read for images; of an array give"):
        read_mask(values, (8, 5), threshold=128)


def test_masks_that_say_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="the mask has 5 x 8 px, the image 8 x 5 px"):
        read_mask(np.zeros((8, 5), bool), (8, 5))
    with pytest.raises(DataError, match="the mask has no hole"):
        read_mask(np.ones((5, 8), bool), (8, 5))
    with pytest.raises(DataError, match="the mask is all hole"):
        read_mask(Image.new("L", (8, 5)), (8, 5))
    with pytest.raises(DataError, match=r"0 \(black\) and 1 \(white\) only"):
        read_mask(np.full((5, 8), 0.5), (8, 5))
    with pytest.raises(DataError, match="the mask cannot be used: unreadable"):
        read_mask("nowhere.png", (8, 5))


def test_a_hole_may_be_painted_or_given_as_boxes() -> None:
    pixels = noise(9, 6)
    pixels[pixels[..., 0] == 255, 1] = 1
    pixels[2:4, 3:5] = (255, 0, 255)
    picture = read_picture(Image.fromarray(pixels), channels=3)
    expected = np.ones((6, 9), bool)
    expected[2:4, 3:5] = False
    assert np.array_equal(paint_mask(picture, colour="magenta"), expected)
    assert np.array_equal(paint_mask(picture, holes=[(3, 2, 2, 2)]), expected)
    clear = np.dstack([pixels, np.where(expected, 255, 0).astype(np.uint8)])
    assert np.array_equal(paint_mask(read_picture(Image.fromarray(clear), channels=3), colour="transparent"), expected)
    with pytest.raises(DataError, match="no transparent pixels"):
        paint_mask(picture, colour="transparent")
    with pytest.raises(DataError, match="no hole"):
        paint_mask(picture, colour="#010203")
    with pytest.raises(ConfigError, match="no colour: 'mauvish'"):
        paint_mask(picture, colour="mauvish")
    with pytest.raises(ConfigError, match="the hole 5,0,5,1 does not lie within the image's 9 x 6 px"):
        paint_mask(picture, holes=[(5, 0, 5, 1)])


@pytest.mark.parametrize(("side", "size"), [(32, 8), (30, 8), (8, 8), (5, 8), (7, 16)])
def test_a_model_pixel_is_known_where_everything_below_it_is(side: int, size: int) -> None:
    keep = np.random.default_rng(1).random((side, side)) > 0.05
    known = fit_mask(keep, Square(0, 0, side), size)[0, 0]
    for i in range(size):
        for j in range(size):
            rows = slice(i * side // size, -(-(i + 1) * side // size))
            columns = slice(j * side // size, -(-(j + 1) * side // size))
            assert bool(known[i, j]) == keep[rows, columns].all()


def test_a_hole_beyond_the_square_is_refused() -> None:
    keep = np.ones((12, 20), bool)
    keep[3, 1] = False
    with pytest.raises(DataError, match="the hole reaches beyond the model's square"):
        fit_mask(keep, choose_square((20, 12), fit="crop"), 8)
    assert not fit_mask(keep, choose_square((20, 12)), 8).all()


def test_nothing_of_a_hole_leaks_into_its_surroundings() -> None:
    pixels, keep = noise(16, 16), np.ones((16, 16), bool)
    keep[5:9, 4:10] = False
    other = pixels.copy()
    other[~keep] = 99
    filled = [fill_picture(read_picture(Image.fromarray(p), channels=3), keep).pixels for p in (pixels, other)]
    assert np.array_equal(*filled)
    assert np.array_equal(filled[0][keep], pixels[keep])
