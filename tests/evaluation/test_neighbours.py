"""Laws of precision, recall, density, coverage and of the search for copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError
from pagoda.evaluation import memorisation, nearest_neighbours, neighbour_scores

DIM = 5


def normal(count: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def four(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float, float, float]:
    found = neighbour_scores(real, fake, k=k)
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize("k", [1, 3])
def test_they_are_the_definitions_by_brute_force(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.evaluation.neighbours._ROWS", rows)
    real, fake = normal(31), normal(23, 1, 0.5)

    def radius(points: Tensor, i: int) -> float:
        return sorted(float((points[i] - p).norm()) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(points: Tensor, x: Tensor) -> list[bool]:
        return [float((x - p).norm()) <= radius(points, i) for i, p in enumerate(points)]

    in_real = [inside(real, g) for g in fake]
    in_fake = [inside(fake, r) for r in real]
    expected = (
        sum(any(row) for row in in_real) / 23,
        sum(any(row) for row in in_fake) / 31,
        sum(sum(row) for row in in_real) / (k * 23),
        sum(any(row[i] for row in in_real) for i in range(31)) / 31,
    )
    assert four(real, fake, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_set_covers_itself(offset: float) -> None:
    x = normal(200) + offset
    precision, recall, density, coverage = four(x, x)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert density == pytest.approx(1 + 1 / 3, abs=1e-12)  # each ball holds its k neighbours and its own centre


def test_equal_distributions_have_density_one_and_the_expected_coverage() -> None:
    _, _, density, coverage = four(normal(1500), normal(1500, 1), k=5)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.02)  # Naeem et al. 2020, eq. 8, for large N


def test_sets_apart_share_nothing() -> None:
    assert four(normal(100), normal(100, 1, 100.0)) == (0, 0, 0, 0)


def test_a_dropped_mode_lowers_recall_and_coverage_to_the_kept_share_but_not_precision() -> None:
    real = torch.cat([normal(300, 0), normal(100, 1, 50.0)])
    precision, recall, density, coverage = four(real, normal(400, 2), k=5)
    assert precision > 0.9
    assert density > 0.9
    assert recall == pytest.approx(0.75, abs=0.05)
    assert coverage == pytest.approx(0.75, abs=0.05)


def test_outliers_among_generated_images_inflate_recall_but_not_coverage() -> None:
    real = torch.cat([normal(300, 0), normal(100, 1, 50.0)])
    strange = torch.cat([normal(380, 2), 200 * normal(20, 3)])
    _, recall, _, coverage = four(real, strange, k=5)
    assert recall > 0.95
    assert coverage < 0.8


def test_shifts_rotations_and_order_do_not_matter() -> None:
    real, fake = normal(80), normal(70, 1, 0.3)
    rotation = torch.linalg.qr(normal(DIM, 9))[0]
    assert four(real @ rotation + 3, fake @ rotation + 3) == pytest.approx(four(real, fake))
    assert four(real.flip(0), fake.flip(0)) == pytest.approx(four(real, fake))


def test_identical_points_lie_in_their_balls_of_radius_zero() -> None:
    point = torch.ones(6, DIM, dtype=torch.float64)
    assert four(point, point) == (1, 1, 2, 1)


def test_a_ball_needs_more_samples_than_neighbours() -> None:
    with pytest.raises(DataError, match="3 generated images have no 3-th neighbour"):
        neighbour_scores(normal(10), normal(3), k=3)
    with pytest.raises(ShapeError, match="5 and 4"):
        neighbour_scores(normal(10), normal(10)[:, :4])


def test_copies_of_training_images_are_found_with_their_originals() -> None:
    training, held_out = normal(300), normal(200, 1)
    copies = torch.tensor([5, 17, 200])
    fake = torch.cat([training[copies] + 1e-9, normal(97, 2)])
    found = memorisation(fake, training, held_out)
    assert found.nearest[:3].tolist() == copies.tolist()
    assert found.share >= 0.03
    assert found.floor == pytest.approx(0.01)
    assert bool((found.distances[:3] < 1e-6).all())


def test_fresh_samples_are_as_near_as_held_out_ones() -> None:
    found = memorisation(normal(2000, 2), normal(1000), normal(2000, 1), quantile=0.05)
    assert found.share == pytest.approx(0.05, abs=0.02)


def test_the_share_of_copies_rises_with_their_number() -> None:
    training, held_out = normal(300), normal(200, 1)
    shares = [
        memorisation(torch.cat([training[:n], normal(100 - n, 2)]), training, held_out).share for n in (0, 25, 50, 100)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_nearest_of_equal_images_is_at_distance_zero() -> None:
    distances, nearest = nearest_neighbours(normal(50) + 1e3, normal(50) + 1e3)
    assert distances.tolist() == [0.0] * 50
    assert nearest.tolist() == list(range(50))


def test_a_quantile_that_the_held_out_images_cannot_show_is_refused() -> None:
    with pytest.raises(DataError, match=r"99 held-out images .* give 100 or more"):
        memorisation(normal(9), normal(9), normal(99))


def test_without_held_out_images_each_training_image_stands_in_with_the_others_around_it() -> None:
    training = normal(500)
    found = memorisation(torch.cat([training[:50], normal(50, 2)]), training)
    distances = torch.cdist(training.double(), training.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    assert found.threshold == pytest.approx(float(distances.min(1).values.sort().values[4]), rel=1e-9)
    assert found.share >= 0.5
    assert found.floor == pytest.approx(0.01, abs=0.005)


def test_training_images_that_occur_twice_do_not_look_held_out() -> None:
    training = torch.cat([normal(200), normal(200)])
    assert memorisation(normal(100, 2), training).threshold == 0
