"""One kernel for everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from pagoda.data import Downsampler, DownsamplerKind
from pagoda.errors import ConfigError, ShapeError

KINDS = get_args(DownsamplerKind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_flat_image_stays_flat_at_every_size(kind: DownsamplerKind, mode: str) -> None:
    image = Image.new(mode, (37, 50), 77 if mode == "L" else (10, 128, 250))
    for size in (1, 5, 8, 18, 19, 37):
        small = Downsampler(kind)(image, size)
        assert small.shape == (size, size, len(mode))
        assert small.dtype == np.uint8
        assert (small == np.asarray(image)[0, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_mirroring_commutes_with_reducing(kind: DownsamplerKind, picture: Callable[..., Image.Image]) -> None:
    image = picture(0, size=48)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = Downsampler(kind)(mirrored, 12)[:, ::-1].astype(int) - Downsampler(kind)(image, 12)
    assert abs(difference).max() <= 1  # rounding


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_the_size_is_only_cut_at_the_centre(kind: DownsamplerKind) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 22, 3), dtype=np.uint8)
    assert (Downsampler(kind)(Image.fromarray(pixels), 16) == pixels[:, 3:19]).all()


@pytest.mark.parametrize(("side", "size"), [(15, 10), (12, 4), (11, 3)])
def test_area_is_the_exact_mean_over_what_a_pixel_covers(side: int, size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (side, side)).astype(np.uint8)
    fine = np.kron(pixels.astype(float), np.ones((size, size)))  # side * size is a multiple of both
    expected = fine.reshape(size, side, size, side).mean((1, 3))
    assert abs(Downsampler("area")(Image.fromarray(pixels), size)[:, :, 0] - expected).max() <= 0.5 + 1e-9


def test_box_bicubic_is_pure_box_means_at_powers_of_two() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32)).astype(np.uint8)
    image = Image.fromarray(pixels)
    half = image.resize((16, 16), Image.Resampling.BOX).resize((8, 8), Image.Resampling.BOX)
    assert (Downsampler()(image, 8)[:, :, 0] == np.asarray(half)).all()


def test_bicubic_aa_does_not_alias_a_fine_checkerboard() -> None:
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    for kind in KINDS:
        inner = Downsampler(kind)(board, 8)[2:6, 2:6].astype(int)
        assert abs(inner - 127.5).max() <= 3, kind


def test_images_are_never_enlarged() -> None:
    with pytest.raises(ShapeError, match="20x7 pixels cannot be reduced to 8x8"):
        Downsampler()(Image.new("L", (20, 7)), 8)
    with pytest.raises(ShapeError, match="mode L or RGB, got RGBA"):
        Downsampler()(Image.new("RGBA", (20, 20)), 8)


def test_fingerprints_tell_kinds_apart_and_an_unknown_kind_is_named() -> None:
    assert len({Downsampler(kind).fingerprint for kind in KINDS}) == len(KINDS)
    assert Downsampler("area").fingerprint == Downsampler("area").fingerprint
    with pytest.raises(ConfigError, match="Did you mean `lanczos`"):
        Downsampler("lancsos")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_go_through_the_same_kernel(channels: int, picture: Callable[..., Image.Image]) -> None:
    images = [picture(seed, size=20, channels=channels) for seed in range(3)]
    stacked = np.stack([np.asarray(image).reshape(20, 20, channels) for image in images])
    batch = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = Downsampler().tensor(batch, 8)
    for image, result in zip(images, small, strict=True):
        expected = torch.from_numpy(Downsampler()(image, 8)).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(result, expected)
    with pytest.raises(ShapeError, match="1 or 3"):
        Downsampler().tensor(torch.zeros(2, 4, 8, 8), 4)
