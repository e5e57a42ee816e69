"""The smooth continuation of holes: the same as the solution over the whole image, by work that grows with the holes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pagoda.steering import fill_hole, fill_picture, holes, read_picture, split_hole


def whole_solution(image: Tensor, known: Tensor) -> Tensor:
    """The harmonic continuation (C, H, W), by one dense system over every pixel of the image."""
    height, width = known.shape
    matrix = torch.eye(height * width, dtype=torch.float64)
    for y, x in (~known).nonzero().tolist():
        row, beside = y * width + x, [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        there = [i * width + j for i, j in beside if 0 <= i < height and 0 <= j < width]
        matrix[row, row] = len(there)
        matrix[row, there] = -1.0
    fixed = torch.where(known, image.double(), 0.0).flatten(1)
    return torch.linalg.solve(matrix, fixed.T).T.reshape(image.shape)


def several_holes() -> Tensor:
    """Holes in two corners, at an edge, that touch in a corner alone, around a known island, and one that is not convex."""
    known = torch.ones(20, 24, dtype=torch.bool)
    known[:3, :4] = known[17:, 20:] = known[8:11, 22:] = False
    known[4:6, 8:10] = known[6:8, 10:12] = False
    known[10:16, 2:9] = False
    known[12:14, 4:7] = True
    known[14:18, 12:14] = known[16:18, 14:18] = False
    return known


@pytest.mark.parametrize("seed", range(4))
def test_parts_by_themselves_give_the_solution_of_the_whole(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = several_holes() if seed == 0 else torch.rand(20, 24, generator=generator) > (0.1, 0.4, 0.8)[seed - 1]
    images = torch.rand(2, 3, 20, 24, generator=generator) * 2 - 1
    other = torch.rand(20, 24, generator=generator) > 0.5
    filled = fill_hole(images, torch.stack([known, other])[:, None])
    for image, made, mask in zip(images, filled, (known, other), strict=True):
        torch.testing.assert_close(made.double(), whole_solution(image, mask), rtol=0, atol=1e-5)
        assert torch.equal(made[:, mask], image[:, mask])
        spoilt = torch.where(mask, image, torch.tensor(float("nan")))
        assert torch.equal(fill_hole(spoilt[None], mask)[0], fill_hole(image[None], mask)[0])  # holes are not read


def test_parts_hold_the_whole_hole_and_do_not_touch() -> None:
    hole = ~several_holes()
    seen = torch.zeros_like(hole, dtype=torch.int)
    for index, (top, bottom, left, right) in enumerate(split_hole(hole), start=1):
        inside = hole[top:bottom, left:right]
        assert not bool(seen[top:bottom, left:right][inside].any())
        seen[top:bottom, left:right][inside] = index
    assert torch.equal(seen > 0, hole)
    for one, other in ((seen[1:], seen[:-1]), (seen[:, 1:], seen[:, :-1])):
        assert bool((one == other)[(one > 0) & (other > 0)].all())


def test_work_on_a_large_photo_grows_with_its_holes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[int] = []
    solve = holes.conjugate_gradients

    def counted(apply: object, target: Tensor, **options: object) -> Tensor:
        worked.append(target[:, 0].numel())
        return solve(apply, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(holes, "conjugate_gradients", counted)
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    keep = np.ones((2000, 3000), bool)
    keep[10:30, 20:44] = keep[1900:1912, 2700:2730] = False
    keep[500:1500:100, 1000] = False  # ten single pixels: one call
    filled = fill_picture(read_picture(Image.fromarray(pixels), channels=3), keep)
    assert sum(worked) == 22 * 26 + 14 * 32 + 10 * 9
    assert len(worked) == 3
    assert np.array_equal(filled.pixels[keep], pixels[keep])
    around = [pixels[500 + dy, 1000 + dx].astype(float) for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    assert np.abs(filled.pixels[500, 1000] - np.mean(around, 0)).max() <= 0.5 + 1e-3
