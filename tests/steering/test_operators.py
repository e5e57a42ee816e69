"""Linear operators: adjoints, pseudo-inverses, and images that agree with what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.data import Downsampler
from pagoda.errors import ConfigError, ShapeError
from pagoda.steering import (
    LinearOperator,
    MaskOperator,
    Projections,
    SeparableOperator,
    back_project,
    box_blur,
    downsampling,
    fill_hole,
    least_squares,
)


class Gradients(LinearOperator):
    """Differences of neighbours in a row: an operator that has no pseudo-inverse of its own."""

    shape_in, shape_out = (6, 7), (6, 6)

    def _apply(self, x: Tensor) -> Tensor:
        return x.diff(dim=-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        zero = torch.zeros_like(y[..., :1])
        return torch.cat([zero, y], -1) - torch.cat([y, zero], -1)


def checkered(height: int, width: int) -> Tensor:
    return (torch.arange(height)[:, None] + torch.arange(width)) % 3 > 0


OPERATORS = {
    "mask": MaskOperator(checkered(9, 8)),
    "separable": SeparableOperator(torch.rand(5, 9, dtype=torch.float64), torch.rand(12, 8, dtype=torch.float64)),
    **{
        f"{kind} {old} to {new}": downsampling(old, new, Downsampler(kind))
        for kind in ("box_bicubic", "lanczos", "area", "bicubic_aa")
        for old, new in ((32, 8), (13, 5))
    },
    "blur": box_blur(16, 5),
    "few projections": Projections(12, 5),
    "many projections": Projections(8, 30),
    "differences": Gradients(),
}
each = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def images(operator: LinearOperator, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *operator.shape_in, dtype=torch.float64)


@each
def test_the_adjoint_is_the_adjoint(operator: LinearOperator) -> None:
    x, y = images(operator), torch.randn(2, 3, *operator.shape_out, dtype=torch.float64)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-6)])
def test_what_is_back_projected_agrees_with_the_measurement(
    operator: LinearOperator, dtype: torch.dtype, tolerance: float
) -> None:
    x, y = images(operator).to(dtype), operator(images(operator)).to(dtype)
    found = back_project(x, y, operator)
    assert found.dtype == dtype
    torch.testing.assert_close(operator(found.double()), y.double(), rtol=0, atol=tolerance)


@each
def test_an_image_that_agrees_already_is_not_moved(operator: LinearOperator) -> None:
    x = images(operator)
    torch.testing.assert_close(back_project(x, operator(x), operator), x, rtol=0, atol=1e-9)


@each
def test_the_pseudo_inverse_is_the_smallest_solution(operator: LinearOperator) -> None:
    x = images(operator)
    smallest = operator.pseudo_inverse(operator(x))
    assert bool((smallest.flatten(1).norm(dim=1) <= x.flatten(1).norm(dim=1) + 1e-9).all())
    # It is orthogonal to what the operator does not see.
    unseen = x - smallest
    torch.testing.assert_close((smallest * unseen).sum(), torch.tensor(0.0).double(), rtol=0, atol=1e-4)


@each
def test_a_damped_pseudo_inverse_solves_its_normal_equations(operator: LinearOperator) -> None:
    y = torch.randn(2, 3, *operator.shape_out, dtype=torch.float64)
    x = operator.pseudo_inverse(y, damping=0.01)
    residual = operator.adjoint(operator(x) - y) + 0.01 * x
    assert float(residual.abs().max()) < 1e-6


@each
def test_samples_do_not_mix(operator: LinearOperator) -> None:
    y = operator(images(operator, 3))
    together = operator.pseudo_inverse(y, damping=0.01)
    alone = torch.cat([operator.pseudo_inverse(row[None], damping=0.01) for row in y])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["box_bicubic", "lanczos", "area", "bicubic_aa"])
@pytest.mark.parametrize(("old", "new"), [(64, 16), (60, 13), (33, 32), (16, 16)])
def test_downsampling_is_the_downsampler_up_to_its_rounding(kind: str, old: int, new: int) -> None:
    downsampler = Downsampler(kind)  # type: ignore[arg-type]
    x = (torch.randint(80, 176, (2, 3, old, old)) / 127.5 - 1).double()  # overshoots of the kernels stay within bytes
    difference = downsampling(old, new, downsampler)(x) - downsampler.tensor(x, new)
    # Every pass rounds to bytes, and the box of `box_bicubic` makes up to three passes of two axes.
    assert float(difference.abs().max()) * 127.5 < (2.5 if kind == "box_bicubic" else 1.5)
    torch.testing.assert_close(
        downsampling(old, new, downsampler)(torch.ones_like(x)), torch.ones(2, 3, new, new).double()
    )


def test_a_box_blur_is_the_mean_of_its_window() -> None:
    x = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    blurred = box_blur(9, 3)(x)
    torch.testing.assert_close(blurred[0, 0, 4, 5], x[0, 0, 3:6, 4:7].mean())
    torch.testing.assert_close(
        blurred[0, 0, 0, 0], (4 * x[0, 0, 0, 0] + 2 * (x[0, 0, 0, 1] + x[0, 0, 1, 0]) + x[0, 0, 1, 1]) / 9
    )
    assert torch.equal(box_blur(9, 1)(x), x)


def test_projections_are_sums_along_rays() -> None:
    operator = Projections(11, 2)
    x = torch.randn(1, 1, 11, 11, dtype=torch.float64)
    across, down = operator(x)[0, 0] * operator.shape_out[1]
    half = (operator.shape_out[1] - 11) // 2
    torch.testing.assert_close(across[half : half + 11], x[0, 0].sum(0))  # angle 0: along columns
    torch.testing.assert_close(down[half : half + 11], x[0, 0].sum(1))
    torch.testing.assert_close(
        Projections(11, 7)(x).sum(-1) * operator.shape_out[1], x.sum((2, 3))[..., None].expand(1, 1, 7)
    )


def test_the_hole_is_continued_smoothly() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16).clone()
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[4:12, 5:11] = False
    spoilt = torch.where(mask, ramp, torch.tensor(7.0))
    torch.testing.assert_close(fill_hole(spoilt, mask), ramp, rtol=0, atol=1e-4)  # a ramp is harmonic
    noise = torch.rand(2, 3, 16, 16)
    filled = fill_hole(noise, mask)
    assert torch.equal(filled[..., mask], noise[..., mask])
    assert float(filled.min()) >= float(noise.min()) - 1e-6
    torch.testing.assert_close(fill_hole(noise[:1], mask), filled[:1], rtol=0, atol=1e-6)


def test_shapes_and_settings_are_refused_in_words() -> None:
    blur = box_blur(16, 5)
    with pytest.raises(ShapeError, match=r"images must be \(B, C, 16, 16\), got \(1, 3, 8, 8\)"):
        blur(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ShapeError, match="measurements must be"):
        blur.pseudo_inverse(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="damping must be >= 0, got -1"):
        blur.pseudo_inverse(torch.zeros(1, 3, 16, 16), damping=-1)
    for size, width in ((16, 4), (16, 17), (16, 0)):
        with pytest.raises(ConfigError, match=f"odd width from 1 to the image's 16 px, got {width}"):
            box_blur(size, width)
    with pytest.raises(ConfigError, match="1 or more, got 8, 0"):
        Projections(8, 0)
    with pytest.raises(ConfigError, match=r"0 \(unknown\) and 1 \(known\) only"):
        MaskOperator(torch.full((4, 4), 0.5))
    with pytest.raises(ShapeError, match=r"a mask is \(H, W\)"):
        MaskOperator(torch.ones(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="8 pixels cannot be reduced to 16"):
        downsampling(8, 16)
    with pytest.raises(ConfigError, match="nothing is known"):
        fill_hole(torch.zeros(1, 1, 4, 4), torch.zeros(4, 4))


def test_a_hopeless_system_is_given_up_in_words() -> None:
    steep = torch.logspace(0, -12, 40, dtype=torch.float64)[None, None, None]
    y = torch.ones(1, 1, 1, 40, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"nearly singular\. Give a damping above 0"):
        least_squares(lambda x: x * steep, lambda x: x * steep, y, max_steps=20)
