"""Laws of the Fréchet distance and of the moments behind it."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.evaluation import FeatureMoments, class_balanced, frechet_bias, frechet_distance

DIM = 12


def features(count: int = 400, seed: int = 0, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + 3


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(FeatureMoments.from_features(a), FeatureMoments.from_features(b))


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureMoments:
    return FeatureMoments(count, mean, covariance * (count - 1))


def test_distance_of_a_set_to_itself_is_zero() -> None:
    scale = float(features().var(0).sum())
    assert distance(features(), features()) <= 1e-12 * scale


def test_distance_is_symmetric() -> None:
    a, b = features(seed=0), features(seed=1)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_translation_adds_its_squared_length() -> None:
    shift = torch.arange(DIM, dtype=torch.float64)
    assert distance(features(), features() + shift) == pytest.approx(float(shift.square().sum()), rel=1e-10)


def test_distance_scales_with_the_square_of_the_features() -> None:
    a, b = features(seed=0), features(seed=1)
    assert distance(3 * a, 3 * b) == pytest.approx(9 * distance(a, b), rel=1e-10)


def test_distance_ignores_rotations_of_the_feature_space_and_the_order_of_samples() -> None:
    a, b = features(seed=0), features(seed=1)
    rotation = torch.linalg.qr(features(DIM, seed=2))[0]
    assert distance(a @ rotation, b @ rotation) == pytest.approx(distance(a, b), rel=1e-10)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    assert distance(a[order], b) == pytest.approx(distance(a, b), rel=1e-12)


def test_distance_of_known_gaussians_is_the_formula() -> None:
    # Commuting covariances: |mu_a - mu_b|^2 + sum (sd_a - sd_b)^2.
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    sd_a, sd_b = torch.rand(2, DIM, generator=generator, dtype=torch.float64) + 0.1
    mean = torch.randn(DIM, generator=generator, dtype=torch.float64)
    a = gaussian(mean, rotation @ torch.diag(sd_a**2) @ rotation.T)
    b = gaussian(torch.zeros(DIM, dtype=torch.float64), rotation @ torch.diag(sd_b**2) @ rotation.T)
    expected = float(mean.square().sum() + (sd_a - sd_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_distance_agrees_with_the_matrix_square_root(dim: int) -> None:
    a, b = (FeatureMoments.from_features(features(300, seed, dim)) for seed in (0, 1))
    root = scipy.linalg.sqrtm((a.covariance() @ b.covariance()).numpy()).real
    expected = (
        float((a.mean - b.mean).square().sum() + a.covariance().trace() + b.covariance().trace()) - 2 * root.trace()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_distance_agrees_with_torchmetrics_on_the_same_features() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = (FeatureMoments.from_features(features(300, seed, 64)) for seed in (0, 1))
    theirs = float(fid._compute_fid(a.mean, a.covariance(), b.mean, b.covariance()))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("count", [400, 50])
def test_distance_is_that_of_the_features_own_singular_values(count: int) -> None:
    # tr (S_a S_b)^{1/2} is the nuclear norm of A B^T / sqrt((n - 1) (m - 1)) of the centred features: no covariance is formed.
    a, b = features(count, 0, 64), features(count + 20, 1, 64)
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    trace = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / ((count - 1) * (count + 19)) ** 0.5
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * trace
    assert distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_fewer_samples_than_dimensions_give_a_finite_distance_that_equals_that_of_the_spanned_space() -> None:
    # Ten samples in 40 dimensions span ten of them; a rotation into these leaves nothing singular about the rest.
    a, b = features(6, 0, 40), features(5, 1, 40)
    basis = torch.linalg.qr(torch.cat([a, b]).T)[0]  # (40, 11)
    assert distance(a, b) == pytest.approx(distance(a @ basis, b @ basis), rel=1e-9)


def test_bias_of_few_samples_is_about_the_predicted_one() -> None:
    dim, count, repeats = 16, 500, 20
    exact = gaussian(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(repeats):
        sample = torch.randn(count, dim, generator=generator, dtype=torch.float64)
        total += frechet_distance(exact, FeatureMoments.from_features(sample))
    # First order in 1 / N; the next order is a few percent at N = 500, the spread of 20 repeats as much.
    assert total / repeats == pytest.approx(frechet_bias(dim, count), rel=0.1)


@pytest.mark.parametrize("sizes", [[400], [1, 399], [100, 0, 7, 293], [50] * 8])
def test_streaming_equals_one_batch_for_any_split(sizes: list[int]) -> None:
    whole, stream = FeatureMoments.from_features(features()), FeatureMoments.empty(DIM)
    for piece in features().split(sizes):
        stream.update(piece)
    assert stream.count == whole.count
    torch.testing.assert_close(stream.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(stream.covariance(), whole.covariance(), rtol=1e-10, atol=1e-10)


def test_merged_moments_are_those_of_all_samples() -> None:
    a, b = features(100, 0), features(300, 1)
    merged = FeatureMoments.from_features(a).merge(FeatureMoments.from_features(b))
    torch.testing.assert_close(merged.covariance(), torch.cat([a, b]).T.cov(), rtol=1e-10, atol=1e-10)


def test_a_great_mean_does_not_cancel_the_covariance() -> None:
    stream = FeatureMoments.empty(DIM)
    for piece in (features() + 1e7).split(64):
        stream.update(piece)
    # Raw second moments of size 1e14 would keep two digits; 1e-7 is what the addition of 1e7 itself leaves of a float64.
    torch.testing.assert_close(stream.covariance(), features().T.cov(), rtol=1e-6, atol=1e-6)


def test_fingerprints_tell_references_apart() -> None:
    fingerprint = FeatureMoments.from_features(features()).fingerprint()
    assert fingerprint == FeatureMoments.from_features(features()).fingerprint()
    changed = features()
    changed[0, 0] += 1e-6
    assert fingerprint != FeatureMoments.from_features(changed).fingerprint()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_with_their_row(bad: float) -> None:
    broken = features()
    broken[7, 3] = bad
    stream = FeatureMoments.from_features(features(10))
    with pytest.raises(DataError, match=r"1 of 400 feature rows .* row 7"):
        stream.update(broken)
    assert stream.count == 10  # nothing of the bad batch was taken in


def test_too_few_samples_and_foreign_widths_are_refused() -> None:
    one = FeatureMoments.from_features(features(1))
    with pytest.raises(DataError, match=r"1 sample\(s\) have no covariance"):
        frechet_distance(one, one)
    with pytest.raises(ShapeError, match="12 and 5"):
        distance(features(), features(dim=5))
    with pytest.raises(ShapeError, match="12 and 5"):
        FeatureMoments.from_features(features()).update(features(dim=5))
    with pytest.raises(ShapeError, match="matrix"):
        FeatureMoments.from_features(torch.zeros(3))


def test_balanced_indices_hold_each_class_equally_without_repeats() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 20)[
        torch.randperm(80, generator=torch.Generator().manual_seed(0))
    ]
    rows = class_balanced(labels, num_classes=3, per_class=10, generator=torch.Generator().manual_seed(1))
    assert len(set(rows.tolist())) == 30
    assert torch.bincount(labels[rows]).tolist() == [10, 10, 10]
    again = class_balanced(labels, num_classes=3, per_class=10, generator=torch.Generator().manual_seed(1))
    other = class_balanced(labels, num_classes=3, per_class=10, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


def test_balance_that_the_data_cannot_give_is_refused() -> None:
    labels, generator = torch.tensor([0, 0, 1]), torch.Generator()
    with pytest.raises(DataError, match=r"\{1: 1\}"):
        class_balanced(labels, num_classes=2, per_class=2, generator=generator)
    with pytest.raises(DataError, match=r"0\.\.0"):
        class_balanced(labels, num_classes=1, per_class=1, generator=generator)
    with pytest.raises(ConfigError, match="per_class"):
        class_balanced(labels, num_classes=2, per_class=0, generator=generator)
