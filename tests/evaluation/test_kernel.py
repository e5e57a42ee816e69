"""Laws of the kernel distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation import kernel_distance, kernel_distance_subsets
from pagoda.evaluation.kernel import polynomial_kernel

DIM = 6


def normal(count: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_it_is_the_double_loop_of_the_definition() -> None:
    x, y = normal(7, 0), normal(9, 1, 0.5)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / DIM + 1) ** 3)

    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    within += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
    expected = within - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-12)


def test_pieces_of_the_kernel_matrix_do_not_change_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernel_distance(normal(50), normal(60, 1))
    monkeypatch.setattr("pagoda.evaluation.kernel._ROWS", 7)
    pieces = kernel_distance(normal(50), normal(60, 1))
    assert pieces == pytest.approx(whole, rel=1e-10)


def test_it_is_unbiased_at_any_count() -> None:
    for count in (10, 40):
        values = torch.tensor(
            [kernel_distance(normal(count, 2 * s), normal(count, 2 * s + 1)).value for s in range(200)]
        )
        assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of four well separated classes, exactly as many of each."""
    classes = torch.arange(count) % 4
    centres = 2 * torch.randn(4, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return centres[classes] + 0.3 * normal(count, seed), classes


def test_with_strata_it_is_unbiased_where_the_number_of_each_class_was_chosen() -> None:
    plain, known = [], []
    for seed in range(100):
        (x, of_x), (y, of_y) = clusters(80, 2 * seed), clusters(40, 2 * seed + 1)
        plain.append(kernel_distance(x, y).value)
        found = kernel_distance(x, y, strata=(of_x, of_y))
        known.append(found.value)
    mean, spread = (float(f(torch.tensor(known))) for f in (torch.mean, torch.std))
    assert abs(mean) < 3 * spread / 10
    assert sum(plain) / 100 < -20 * spread / 10  # two of one class meet too rarely among different samples


def test_strata_are_the_double_loop_with_proportions_for_weights() -> None:
    (x, of_x), (y, of_y) = clusters(9, 0), clusters(13, 1)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / DIM + 1) ** 3)

    def within(values: Tensor, classes: Tensor) -> float:
        total = 0.0
        for c in range(4):
            for d in range(4):
                of_c, of_d = values[classes == c], values[classes == d]
                meets = [k(a, b) for i, a in enumerate(of_c) for j, b in enumerate(of_d) if c != d or i != j]
                total += len(of_c) * len(of_d) / len(values) ** 2 * sum(meets) / len(meets)
        return total

    across = sum(k(a, b) for a in x for b in y) / (9 * 13)
    expected = within(x, of_x) + within(y, of_y) - 2 * across
    assert kernel_distance(x, y, strata=(of_x, of_y)).value == pytest.approx(expected, rel=1e-12)


def test_one_stratum_is_none_and_classes_of_one_sample_are_one() -> None:
    x, y = normal(12), normal(10, 1)
    plain = kernel_distance(x, y)
    assert kernel_distance(x, y, strata=(torch.full((12,), 7), torch.zeros(10, dtype=torch.int64))) == plain
    assert kernel_distance(x, y, strata=(torch.arange(12), torch.arange(10))) == pytest.approx(plain)
    lone = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])  # joins the largest
    joined = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    ones = torch.zeros(12, dtype=torch.int64)
    assert kernel_distance(x, y, strata=(ones, lone)) == kernel_distance(x, y, strata=(ones, joined))


def test_the_standard_error_with_strata_is_the_spread_over_fresh_samples() -> None:
    real, of_real = clusters(400, 1000)
    moved = [clusters(120, seed) for seed in range(60)]
    found = [kernel_distance(real, y + 0.2, strata=(of_real, of_y)) for y, of_y in moved]
    spread = float(torch.tensor([f.value for f in found]).std())
    claimed = sum(f.standard_error for f in found) / len(found)
    assert claimed == pytest.approx(spread, rel=0.25)


def test_it_is_symmetric_ignores_order_and_sees_a_shift() -> None:
    x, y = normal(200), normal(200, 1, 0.7)
    assert kernel_distance(x, y).value == pytest.approx(kernel_distance(y, x).value, rel=1e-9)
    assert kernel_distance(x.flip(0), y).value == pytest.approx(kernel_distance(x, y).value, rel=1e-9)
    assert kernel_distance(x, y).value > 10 * abs(kernel_distance(x, normal(200, 2)).value)


def test_the_standard_error_is_the_spread_over_fresh_samples() -> None:
    real = normal(400, 1000)
    found = [kernel_distance(real, normal(150, seed, 0.5)) for seed in range(60)]
    spread = float(torch.tensor([f.value for f in found]).std())
    claimed = sum(f.standard_error for f in found) / len(found)
    assert claimed == pytest.approx(spread, rel=0.25)  # 60 draws know a spread to 9 %


def test_subsets_of_everything_are_the_whole_estimate() -> None:
    x, y = normal(30), normal(30, 1)
    found = kernel_distance_subsets(x, y, num_subsets=3, size=30)
    assert found.value == pytest.approx(kernel_distance(x, y).value, rel=1e-10)
    assert found.standard_error < 1e-12


def test_it_agrees_with_torchmetrics_on_the_same_subset() -> None:
    image_kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(40), normal(40, 1, 0.3)
    assert kernel_distance(x, y).value == pytest.approx(float(image_kid.poly_mmd(x, y)), rel=1e-10)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ShapeError, match="6 and 5"):
        kernel_distance(normal(9), normal(9)[:, :5])
    with pytest.raises(DataError, match="3 samples a side"):
        kernel_distance(normal(2), normal(9))
    with pytest.raises(DataError, match="use a size of 2 to 9"):
        kernel_distance_subsets(normal(9), normal(12), size=10)
    with pytest.raises(ShapeError, match=r"\(3,\) do not name a class for each of 9"):
        kernel_distance(normal(9), normal(9), strata=(torch.zeros(3), torch.zeros(9)))
    with pytest.raises(DataError, match="NaN"):
        kernel_distance(normal(9), normal(9) * torch.nan)


def test_the_kernel_of_one_pair_is_the_polynomial() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert float(polynomial_kernel(a, b)) == pytest.approx((1 / 2 + 1) ** 3)
