"""The preconditioner of smooth continuations: a symmetric inverse that makes the steps independent of the hole's size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pagoda.steering import fill_hole, holes
from pagoda.steering.multigrid import Laplacian, Multigrid


def blobs(height: int, width: int, seed: int, *, border: int = 0) -> Tensor:
    """Random holes (1, 1, H, W) of 0 and 1 of many shapes and sizes, over two thirds of the pixels; none within `border` of the edge."""
    coarse = torch.rand(1, 1, height // 7 + 2, width // 7 + 2, generator=torch.Generator().manual_seed(seed))
    hole = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic") < 0.6
    inner = torch.zeros(1, 1, height, width, dtype=torch.bool)
    inner[..., border : height - border, border : width - border] = True
    return (hole & inner).double()


def matrix_of(apply: Callable[[Tensor], Tensor], hole: Tensor) -> Tensor:
    """A linear map of a hole's pixels as a matrix."""
    pixels = hole.flatten().nonzero().flatten()
    units = torch.zeros(len(pixels), hole.numel(), dtype=torch.float64)
    units[torch.arange(len(pixels)), pixels] = 1
    return apply(units.reshape(1, len(pixels), *hole.shape[-2:])).reshape(len(pixels), -1)[:, pixels].T


def all_but_a_corner(height: int, width: int) -> Tensor:
    """The hole whose continuation is decided furthest away."""
    hole = torch.ones(1, 1, height, width, dtype=torch.float64)
    hole[..., 0, 0] = 0
    return hole


@pytest.mark.parametrize("size", [(9, 13), (16, 16), (31, 40)])
@pytest.mark.parametrize("kind", ["blobs", "all but a corner"])
def test_it_is_symmetric_and_leaves_a_problem_of_bounded_condition(size: tuple[int, int], kind: str) -> None:
    hole = blobs(*size, seed=0) if kind == "blobs" else all_but_a_corner(*size)
    laplacian, inverse = (matrix_of(apply, hole) for apply in (Laplacian.of_hole(hole), Multigrid(hole)))
    for matrix in (laplacian, inverse):
        torch.testing.assert_close(matrix, matrix.T)
        assert float(torch.linalg.eigvalsh(matrix).min()) > 0
    eigenvalues = torch.linalg.eigvals(inverse @ laplacian).real
    assert float(eigenvalues.max() / eigenvalues.min()) < 16
    assert float(torch.linalg.cond(laplacian)) > 45  # and over 20,000 where a corner decides 1,239 pixels


def test_a_sample_does_not_depend_on_its_batch() -> None:
    hole = torch.cat([blobs(31, 70, seed=0), blobs(31, 70, seed=1)])
    u = hole * torch.randn(2, 3, 31, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(Multigrid(hole)(u)[1:], Multigrid(hole[1:])(u[1:]))


@pytest.mark.parametrize("size", [(90, 131), (300, 260)])
def test_a_harmonic_image_comes_back_in_few_steps(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in size)
    steps = (y[1] - y[0], x[1] - x[0])
    # Second differences of both squares are 2 h^2, which the factors make equal: the sum is harmonic on the grid.
    image = ((x / steps[1]) ** 2 - (y[:, None] / steps[0]) ** 2) / max(size) ** 2 + 0.3 * x
    known = blobs(*size, seed=3, border=1) == 0
    called: list[int] = []
    solve = holes.conjugate_gradients

    def counted(apply: object, target: Tensor, **options: object) -> Tensor:
        def noted(u: Tensor) -> Tensor:
            called.append(1)
            return apply(u)  # type: ignore[no-any-return,operator]

        return solve(noted, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(holes, "conjugate_gradients", counted)
    filled = fill_hole(image.expand(1, 1, *size), known)
    torch.testing.assert_close(filled[0, 0], image, rtol=0, atol=1e-4)
    parts = len(holes.split_hole(~known[0, 0]))
    assert len(called) <= 40 * parts


def test_with_and_without_it_holes_at_edges_are_filled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 80, 90, generator=torch.Generator().manual_seed(4)) * 2 - 1
    known = blobs(80, 90, seed=5) == 0
    with_it = fill_hole(images, known)
    monkeypatch.setattr(holes, "_LARGE", 1000)
    without = fill_hole(images, known)
    assert not torch.equal(with_it, without), "nothing was preconditioned"
    torch.testing.assert_close(with_it, without, rtol=0, atol=1e-4)
