"""Holes drawn by a diffusion model: what is known stays and decides, and a seed is a sample's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import RandomFeatures
from pagoda.steering import draw_hole, most_typical


class TwoImages(Denoiser):
    """The exact denoiser of data that are one of `images` (K, C, H, W), each as likely as the other."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.levels: list[float] = []

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.levels.append(float(sigma[0]))
        distance = (x[:, None] - self.images[None]).square().flatten(2).sum(2)
        shares = torch.softmax(-distance / (2 * sigma[:, None].square()), dim=1)
        return torch.einsum("bk,kchw->bchw", shares, self.images)


@pytest.fixture
def pair() -> Tensor:
    return torch.stack([torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), -0.5)])


@pytest.fixture
def known() -> Tensor:
    mask = torch.ones(4, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:7, 2:7] = False
    return mask


def test_the_known_part_decides_what_is_drawn(pair: Tensor, known: Tensor) -> None:
    shown = pair[[0, 1, 1, 0]]
    start = torch.where(known, shown, -shown)  # the guess says the contrary
    made = draw_hole(TwoImages(pair), start, known, seeds=[1, 2, 3, 4])
    torch.testing.assert_close(made, shown, rtol=0, atol=1e-4)


def test_without_anything_known_both_images_are_drawn(pair: Tensor) -> None:
    start = torch.zeros(64, 3, 8, 8)
    nothing = torch.zeros(64, 1, 8, 8, dtype=torch.bool)
    made = draw_hole(TwoImages(pair), start, nothing, seeds=list(range(64)), sigma=10.0)
    torch.testing.assert_close(made.abs(), torch.full_like(made, 0.5), rtol=0, atol=1e-4)
    positive = int((made.mean((1, 2, 3)) > 0).sum())
    assert 18 <= positive <= 46  # 32 +- 3.5 standard deviations of 64 fair draws


def test_known_pixels_stay_bit_for_bit_and_seeds_belong_to_images(known: Tensor) -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    denoiser = TwoImages(torch.rand(5, 3, 8, 8) * 2 - 1)
    made = draw_hole(denoiser, images, known, seeds=[7, 8, 7, 9])
    assert torch.equal(made[known.expand_as(made)], images[known.expand_as(made)])
    assert not torch.equal(made, images)
    alone = draw_hole(denoiser, images[2:3], known[2:3], seeds=[7])
    torch.testing.assert_close(made[2:3], alone, rtol=0, atol=1e-5)
    nothing = torch.ones_like(known)
    assert torch.equal(draw_hole(denoiser, images, nothing, seeds=[1, 2, 3, 4]), images)


def test_every_level_is_asked_as_often_as_said(pair: Tensor, known: Tensor) -> None:
    class Low(TwoImages):
        @property
        def sigma_range(self) -> tuple[float, float]:
            return 0.1, 1.5

    denoiser = Low(pair)
    draw_hole(denoiser, pair[[0, 0, 1, 1]], known, seeds=[1, 2, 3, 4], nodes=4, repeats=3)
    assert len(denoiser.levels) == 12
    assert denoiser.levels[0] == denoiser.levels[2] == pytest.approx(1.5)
    assert denoiser.levels[-1] == pytest.approx(0.1)
    assert denoiser.levels == sorted(denoiser.levels, reverse=True)


def test_clipping_can_be_left_out(known: Tensor) -> None:
    far = TwoImages(torch.full((1, 3, 8, 8), 3.0))
    start = torch.zeros(4, 3, 8, 8)
    hole = ~known.expand_as(start)
    assert float(draw_hole(far, start, known, seeds=[1, 2, 3, 4])[hole].max()) == 1
    assert float(draw_hole(far, start, known, seeds=[1, 2, 3, 4], clip=False)[hole].min()) == pytest.approx(3)


def test_what_cannot_be_drawn_is_refused(pair: Tensor, known: Tensor) -> None:
    start = torch.zeros(4, 3, 8, 8)
    for given, message in (
        ({"seeds": [1]}, "4 images need one each, got 1"),
        ({"seeds": [1, 2, 3, 4], "repeats": 0}, "nodes must be >= 2, repeats >= 1 and sigma > 0, got 10, 0, 2.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw_hole(TwoImages(pair), start, known, **given)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"a mask of images \(4, 3, 8, 8\) is \(B, 1, H, W\), got \(1, 1, 8, 8\)"):
        draw_hole(TwoImages(pair), start, known[:1], seeds=[1, 2, 3, 4])


def test_the_most_typical_drawing_is_none_that_stands_alone() -> None:
    shown = torch.rand(2, 3, 16, 16) * 2 - 1
    drawn = shown + 0.05 * torch.randn(5, 2, 3, 16, 16)
    drawn[0, 0] = -shown[0]  # of the first image the first stands alone, of the second the last
    drawn[4, 1] = 1.0
    stack = RandomFeatures(3, seed=0)
    chosen = most_typical(drawn, stack)
    for image, alone in ((0, 0), (1, 4)):
        found = [torch.equal(chosen[image], drawing) for drawing in drawn[:, image]]
        assert sum(found) == 1
        assert not found[alone]
        assert torch.equal(most_typical(drawn[:, image : image + 1], stack)[0], chosen[image])  # of no other image
    same = drawn[:1].expand(4, -1, -1, -1, -1)
    assert torch.equal(most_typical(same, stack), drawn[0])


def test_the_most_typical_of_two_kinds_is_of_the_commoner_one() -> None:
    rare, common = torch.full((2, 1, 3, 16, 16), -0.7), torch.full((3, 1, 3, 16, 16), 0.2)
    noise = 0.1 * torch.randn(5, 1, 3, 16, 16)
    chosen = most_typical(torch.cat([rare, common]) + noise, RandomFeatures(3, seed=1))
    assert float(chosen.mean()) > 0
