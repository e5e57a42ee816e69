"""Laws of the figures that are read off the pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pagoda.errors import ShapeError
from pagoda.evaluation import contrast, psnr, sharpness, ssim


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_psnr_of_a_known_error_is_the_formula() -> None:
    # An error of 0.02 everywhere on a range of length 2 is 40 dB.
    assert psnr(images() + 0.02, images()) == pytest.approx(40, abs=1e-4)
    assert psnr(images(), images()) == math.inf


def test_psnr_is_the_mean_over_images() -> None:
    noisy = images() + 0.01 * images(1)
    singles = [psnr(noisy[i : i + 1], images()[i : i + 1]) for i in range(4)]
    assert psnr(noisy, images()) == pytest.approx(sum(singles) / 4, rel=1e-12)


def test_contrast_scales_with_the_pixels_and_ignores_brightness() -> None:
    plain, scaled = contrast(images()), contrast(0.5 * images() + 0.25)
    assert scaled.per_image == pytest.approx(plain.per_image / 2, rel=1e-6)
    assert scaled.overall == pytest.approx(plain.overall / 2, rel=1e-6)


def test_overall_contrast_sees_differences_between_flat_images_and_the_other_does_not() -> None:
    flat = torch.tensor([-0.5, 0.5]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert contrast(flat).per_image == 0
    assert contrast(flat).overall == pytest.approx(0.5)


def test_sharpness_is_zero_on_a_ramp_and_four_on_a_lone_pixel() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) + torch.arange(8.0)[:, None] * 2
    assert sharpness(ramp) == pytest.approx(0, abs=1e-12)
    pixel = torch.zeros(1, 1, 5, 5)
    pixel[0, 0, 2, 2] = 1
    assert sharpness(pixel) == pytest.approx((4 + 4 * 1) / 9)  # the pixel and its four neighbours, over 3 x 3


def test_blur_lowers_sharpness_and_contrast() -> None:
    blurred = torch.nn.functional.avg_pool2d(images(), 3, 1, 1)
    assert sharpness(blurred) < 0.5 * sharpness(images())
    assert contrast(blurred).per_image < contrast(images()).per_image


def test_foreign_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 3, 8, 8\)"):
        psnr(images(), images()[:, :1])
    with pytest.raises(ShapeError, match="B, C, H, W"):
        contrast(images()[0])
    with pytest.raises(ShapeError, match="3 x 3"):
        sharpness(images()[..., :2])


def large(seed: int = 0) -> Tensor:
    return torch.rand(3, 3, 20, 17, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_ssim_of_equal_images_is_one_and_it_is_symmetric() -> None:
    assert ssim(large(), large()) == pytest.approx(1, abs=1e-12)
    assert ssim(large(), large(1)) == pytest.approx(ssim(large(1), large()), rel=1e-12)
    assert ssim(large(), -large()) < 0


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    a, b = torch.full((1, 1, 11, 11), 0.5), torch.full((1, 1, 11, 11), 0.2)
    x, y, c = 0.75, 0.6, 0.01**2  # the same pixels in [0, 1]
    assert ssim(a, b) == pytest.approx((2 * x * y + c) / (x**2 + y**2 + c), rel=1e-5)


def test_ssim_falls_with_noise_and_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    noise = torch.randn(large().shape, generator=torch.Generator().manual_seed(2))
    values = [ssim(large() + level * noise, large()) for level in (0.0, 0.1, 0.3, 1.0)]
    assert values == sorted(values, reverse=True)
    _, theirs = functional.structural_similarity_index_measure(
        (large() + 0.3 * noise).double() / 2 + 0.5, large().double() / 2 + 0.5, data_range=1.0, return_full_image=True
    )
    inside = theirs[..., 5:-5, 5:-5]  # windows that reach over the edge are filled by reflection there
    assert values[2] == pytest.approx(float(inside.mean()), rel=1e-10)


def test_ssim_needs_images_as_large_as_its_window() -> None:
    with pytest.raises(ShapeError, match="at least 11 pixels"):
        ssim(images(), images())
