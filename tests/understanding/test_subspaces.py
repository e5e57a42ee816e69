"""Low-rank mixtures are exact, their training is PCA or subspace clustering, and Jacobians are read without being made."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tests.understanding.conftest import edm, make_network, vp

from pagoda.diffusion import Condition, Denoiser, GaussianDenoiser, sample
from pagoda.errors import ConfigError, DataError, ResourceError, ShapeError
from pagoda.understanding import (
    DenoiserJacobian,
    LowRankConfig,
    LowRankDenoiser,
    LowRankMixture,
    assign,
    clustering_accuracy,
    k_subspaces,
    projector_distance,
    rank_profile,
    subspace_error,
    train_low_rank,
)
from pagoda.understanding.subspaces import match

SHAPE = (3, 2, 4)
SIZE = 24


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(ranks: tuple[int, ...] = (3, 5), **options: object) -> LowRankMixture:
    return LowRankMixture.random(SHAPE, ranks, seeded(), **options)  # type: ignore[arg-type]


# The oracle.


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_denoiser_is_the_posterior_mean_by_brute_force(noise: float) -> None:
    oracle = mixture(weights=torch.tensor([0.3, 0.7], dtype=torch.float64), variances=1.7, noise=noise)
    x = torch.randn(6, *SHAPE, generator=seeded(1), dtype=torch.float64)
    for sigma in (0.15, 1.0, 5.0):
        likelihood, means = [], []
        for basis, weight in zip(oracle.bases, (0.3, 0.7), strict=True):
            clean = 1.7 * basis @ basis.T + noise**2 * torch.eye(SIZE, dtype=torch.float64)
            noisy = clean + sigma**2 * torch.eye(SIZE, dtype=torch.float64)
            law = torch.distributions.MultivariateNormal(torch.zeros(SIZE, dtype=torch.float64), noisy)
            likelihood.append(math.log(weight) + law.log_prob(x.flatten(1)))
            means.append(x.flatten(1) @ torch.linalg.solve(noisy, clean))
        joint = torch.stack(likelihood, 1)
        expected = torch.einsum("bk,kbn->bn", joint.softmax(1), torch.stack(means))
        torch.testing.assert_close(oracle(x, sigma).flatten(1), expected, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(oracle.log_prob(x, sigma), joint.logsumexp(1), atol=1e-9, rtol=1e-11)
        alone = oracle(x, sigma, Condition.of_labels([1] * 6)).flatten(1)
        torch.testing.assert_close(alone, means[1], atol=1e-11, rtol=1e-11)


def test_the_score_is_the_gradient_of_the_density() -> None:
    oracle = mixture(noise=0.1)
    x = torch.randn(4, *SHAPE, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(oracle.log_prob(x, 0.7).sum(), x)
    torch.testing.assert_close((oracle(x, 0.7) - x) / 0.7**2, gradient, atol=1e-10, rtol=1e-10)


def test_drawn_data_lie_on_their_subspace_with_the_right_frequency_and_variance() -> None:
    oracle = mixture(weights=torch.tensor([1.0, 3.0], dtype=torch.float64), variances=2.0)
    x, component = oracle.draw(4000, seeded(2))
    assert float((component == 1).double().mean()) == pytest.approx(0.75, abs=0.03)
    for k, basis in enumerate(oracle.bases):
        mine = x[component == k].flatten(1)
        assert float((mine - mine @ basis @ basis.T).abs().max()) < 1e-12
        assert float((mine @ basis).var()) == pytest.approx(2.0, rel=0.08)


def test_samplers_carry_noise_to_the_union_of_subspaces() -> None:
    oracle = mixture((2, 3))
    z = torch.randn(300, *SHAPE, generator=seeded(3), dtype=torch.float64)
    made = sample(oracle, z).flatten(1)
    inside = torch.stack([(made @ basis).square().sum(1) for basis in oracle.bases], 1)
    assert float(1 - inside.amax(1).sum() / made.square().sum()) < 0.02
    assert float((inside.argmax(1) == 0).double().mean()) == pytest.approx(0.5, abs=0.12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit side by side into 24"):
        mixture((12, 13))
    with pytest.raises(ShapeError, match="matrices of 24 rows"):
        LowRankMixture([torch.eye(5)], SHAPE)
    with pytest.raises(ConfigError, match="orthonormal"):
        LowRankMixture([2 * torch.eye(SIZE)[:, :3]], SHAPE)
    with pytest.raises(ConfigError, match="as many weights"):
        mixture(weights=torch.tensor([1.0]))
    with pytest.raises(ConfigError, match="no density without noise"):
        mixture().log_prob(torch.zeros(1, *SHAPE, dtype=torch.float64))
    with pytest.raises(ConfigError, match="need num_subspaces"):
        LowRankDenoiser(SHAPE, 2, 30, seeded())
    with pytest.raises(DataError, match="do not fit 3 samples"):
        k_subspaces(torch.zeros(3, *SHAPE), 4, 2, seeded())
    with pytest.raises(DataError, match="finite images"):
        train_low_rank(torch.full((4, *SHAPE), torch.nan), LowRankConfig(num_subspaces=1, rank=2))


# Clustering and training.


def test_one_subspace_is_pca() -> None:
    """The loss of one sample is |x|^2 - (2c - c^2)|U^T x|^2 + c^2 s^2 d, so the best U is that of PCA, whatever the noise levels."""
    x = (torch.randn(40, SIZE, generator=seeded(1), dtype=torch.float64) * torch.linspace(3, 0.1, SIZE)).reshape(
        40, *SHAPE
    )
    model, _ = train_low_rank(x, LowRankConfig(num_subspaces=1, rank=4, steps=300, restarts=1))
    pca = torch.linalg.svd(x.flatten(1), full_matrices=False).Vh[:4].T
    assert projector_distance(model.bases()[0], pca) < 0.05
    captured = float((x.flatten(1) @ model.bases()[0]).square().sum())
    assert captured > 0.9999 * float((x.flatten(1) @ pca).square().sum())


def test_the_loss_of_one_subspace_is_its_closed_form() -> None:
    sigma, draws = 0.8, 20_000
    model = LowRankDenoiser(SHAPE, 1, 4, seeded(), variance=1.0)
    x = torch.randn(1, *SHAPE, generator=seeded(1), dtype=torch.float64)
    noise = torch.randn(draws, *SHAPE, generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        errors = (model(x + sigma * noise, sigma) - x).square().flatten(1).sum(1)
        c, inside = 1 / (1 + sigma**2), float((x.flatten(1) @ model.bases()[0]).square().sum())
    expected = float(x.square().sum()) - (2 * c - c**2) * inside + c**2 * sigma**2 * 4
    assert float(errors.mean()) == pytest.approx(expected, abs=4 * float(errors.std()) / math.sqrt(draws))


def test_training_finds_the_subspaces_that_the_reference_finds() -> None:
    oracle = mixture((3, 3))
    x, labels = oracle.draw(60, seeded(5))
    reference = k_subspaces(x, 2, 3, seeded(6))
    model, assignment = train_low_rank(x, LowRankConfig(num_subspaces=2, rank=3, steps=200, restarts=3))
    assert clustering_accuracy(reference.assignment, labels) == 1.0
    assert clustering_accuracy(assignment, labels) >= 0.98
    assert subspace_error(reference.bases, oracle.bases) < 1e-9
    assert subspace_error(list(model.bases()), oracle.bases) < 0.3
    assert torch.equal(assign(x, reference.bases), reference.assignment)


def test_more_starts_never_fit_worse_and_leave_the_others_alone() -> None:
    x, _ = mixture((4, 4)).draw(24, seeded(5))

    def left_out(starts: int) -> float:
        model, _ = train_low_rank(x, LowRankConfig(num_subspaces=2, rank=4, steps=40, restarts=starts))
        held = torch.einsum("bn,knd->bkd", x.flatten(1), model.bases()).square().sum(2).amax(1)
        return float((x.flatten(1).square().sum(1) - held).mean())

    residuals = [left_out(starts) for starts in (1, 2, 6)]
    # Products of more starts at once are summed in another order on some processors: the same start ends a few roundings away.
    rounding = 1e-12
    assert residuals[1] <= residuals[0] * (1 + rounding)
    assert residuals[2] <= residuals[1] * (1 + rounding)
    assert residuals[2] < residuals[0] * (1 - rounding)
    with pytest.raises(ConfigError, match="restarts must be at least 1"):
        train_low_rank(x, LowRankConfig(num_subspaces=2, rank=4, restarts=0))


def test_fewer_samples_than_dimensions_cannot_show_the_subspace() -> None:
    """The phase transition: exact from d samples on; below it the missing directions are arbitrary."""
    d = 6
    oracle = LowRankMixture.random(SHAPE, [d], seeded())
    errors = []
    for count in (2, 4, 5, 6, 8):
        x, _ = oracle.draw(count, seeded(count))
        found = k_subspaces(x, 1, d, seeded(9), restarts=3)
        errors.append(subspace_error(found.bases, oracle.bases))
    assert max(errors[3:]) < 1e-9
    assert min(errors[:3]) > 0.5
    assert errors[0] > errors[2]


def test_the_matching_is_scipys() -> None:
    for size in (1, 2, 5, 9):
        cost = torch.rand(size, size, generator=seeded(size), dtype=torch.float64)
        rows, columns = linear_sum_assignment(cost.numpy())
        assert match(cost) == columns.tolist(), rows
    few = torch.rand(4, 4, generator=seeded(3), dtype=torch.float64)
    best = min(itertools.permutations(range(4)), key=lambda p: sum(float(few[i, j]) for i, j in enumerate(p)))
    assert match(few) == list(best)


def test_clusters_are_counted_under_the_best_naming() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert clustering_accuracy(torch.tensor([2, 2, 0, 0, 1, 1]), labels) == 1.0
    assert clustering_accuracy(torch.tensor([0, 0, 0, 0, 1, 1]), labels) == pytest.approx(4 / 6)
    with pytest.raises(ShapeError, match="assignments"):
        clustering_accuracy(labels[:3], labels)


# Jacobians.


def network_jacobian(kind: str, wrapper: str) -> DenoiserJacobian:
    make = {"edm": edm, "vp": vp}[wrapper]
    x = torch.randn(1, 3, 8, 8, generator=seeded(4)) * 0.7
    return DenoiserJacobian(make(make_network(kind)), x, 0.5, condition=Condition.of_labels([1]), batch_size=50)


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("wrapper", ["edm", "vp"])
def test_products_are_those_of_the_dense_jacobian(kind: str, wrapper: str) -> None:
    jacobian = network_jacobian(kind, wrapper)
    vectors = torch.randn(jacobian.size, 3, generator=seeded(5), dtype=torch.float64)
    label = Condition.of_labels([1])
    dense = torch.autograd.functional.jacobian(
        lambda x: jacobian.denoiser(x, 0.5, label), jacobian.x
    ).reshape(jacobian.size, jacobian.size).double()  # fmt: skip
    torch.testing.assert_close(jacobian.jvp(vectors), dense @ vectors, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(jacobian.vjp(vectors), dense.T @ vectors, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_largest_triplets_are_those_of_the_dense_svd(kind: str) -> None:
    jacobian = network_jacobian(kind, "edm")
    found = jacobian.svd(6, tolerance=1e-5)
    _, s, vh = torch.linalg.svd(jacobian.dense())
    torch.testing.assert_close(found.s, s[:6], atol=1e-4 * float(s[0]), rtol=1e-4)
    overlap = torch.linalg.svdvals(found.v.T @ vh[:6].T)  # cosines of the angles between the spaces
    if float(s[5] - s[6]) > 1e-3 * float(s[0]):
        assert float(overlap.min()) > 1 - 1e-3
    torch.testing.assert_close(jacobian.jvp(found.v), found.u * found.s, atol=1e-3, rtol=1e-3)
    assert found.residual < 1e-5


def test_one_subspace_has_exactly_d_equal_singular_values() -> None:
    oracle = LowRankMixture.random(SHAPE, [5], seeded())
    x, _ = oracle.draw(1, seeded(1))
    for sigma in (0.1, 1.0, 4.0):
        jacobian = DenoiserJacobian(oracle, x, sigma)
        found = jacobian.svd(8)
        expected = torch.zeros(8, dtype=torch.float64)
        expected[:5] = 1 / (1 + sigma**2)
        torch.testing.assert_close(found.s, expected, atol=1e-10, rtol=1e-10)
        assert projector_distance(found.v[:, :5], oracle.bases[0]) < 1e-6
        rank = jacobian.numerical_rank()
        assert (rank.rank, rank.is_lower_bound) == (5, False)
        assert rank.participation == pytest.approx(5, rel=1e-6)
        assert rank.norm == pytest.approx(math.sqrt(5) / (1 + sigma**2), rel=1e-6)
        assert jacobian.trace(probes=600) == pytest.approx(5 / (1 + sigma**2), rel=0.15)


def test_the_rank_agrees_with_its_definition_on_a_network() -> None:
    jacobian = network_jacobian("unet", "edm")
    s = torch.linalg.svdvals(jacobian.dense())
    amplitude = s.square().cumsum(0).sqrt() / s.norm()
    for eta in (0.5,):
        expected = int((amplitude > eta).nonzero()[0]) + 1
        found = jacobian.numerical_rank(eta=eta, max_rank=128, probes=32)
        assert abs(found.rank - expected) <= max(2, 0.06 * expected), (eta, found, expected)
        assert found.norm == pytest.approx(float(s.norm()), rel=0.03)
    cut = jacobian.numerical_rank(eta=0.99, start_rank=2, max_rank=4)
    assert (cut.rank, cut.is_lower_bound) == (4, True)


def test_a_profile_is_lowest_where_the_data_are_seen_and_the_noise_is_not() -> None:
    """Data of 4 dimensions with a little ambient noise: full rank below that noise, 4 above it."""
    oracle = LowRankMixture.random(SHAPE, [4], seeded(), noise=0.02)
    x, _ = oracle.draw(2, seeded(1))
    profile = rank_profile(oracle, x, [0.001, 0.3, 1.0])
    assert profile.rank.tolist() == [SIZE, 4.0, 4.0]
    assert profile.intrinsic_dimension == 4.0
    assert float(profile.trace[1]) == pytest.approx(4, rel=0.2)
    assert profile.size == SIZE


def test_a_mask_keeps_rows_of_the_jacobian() -> None:
    jacobian = network_jacobian("unet", "edm")
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:6] = True
    masked = DenoiserJacobian(jacobian.denoiser, jacobian.x, 0.5, condition=Condition.of_labels([1]), mask=mask)
    rows = mask.expand(3, 8, 8).flatten().double()[:, None]
    torch.testing.assert_close(masked.dense(), rows * jacobian.dense(), atol=1e-5, rtol=1e-4)


def test_reading_a_jacobian_leaves_no_trace() -> None:
    denoiser: Denoiser = edm(make_network("unet"))
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    with torch.no_grad():
        before = denoiser(x, 0.5)
    DenoiserJacobian(denoiser, x[0], 0.5).svd(2, max_blocks=2)
    with torch.no_grad():
        assert torch.equal(denoiser(x, 0.5), before)
    assert not any(parameter.grad is not None for parameter in denoiser.parameters())


def test_jacobians_that_cannot_be_taken_are_refused() -> None:
    oracle = GaussianDenoiser(0.0, 1.0)
    with pytest.raises(ShapeError, match="at one image"):
        DenoiserJacobian(oracle, torch.zeros(2, 1, 4, 4), 0.5)
    with pytest.raises(ConfigError, match="outside of what this model knows"):
        DenoiserJacobian(oracle, torch.zeros(1, 4, 4), -0.5)
    with pytest.raises(ConfigError, match="selects nothing"):
        DenoiserJacobian(oracle, torch.zeros(1, 4, 4), 0.5, mask=torch.zeros(4, 4))
    with pytest.raises(ShapeError, match="does not broadcast"):
        DenoiserJacobian(oracle, torch.zeros(1, 4, 4), 0.5, mask=torch.ones(3, 3))
    with pytest.raises(ResourceError, match="use `svd`"):
        DenoiserJacobian(oracle, torch.zeros(3, 64, 64), 0.5).dense()
    small = DenoiserJacobian(oracle, torch.zeros(1, 4, 4), 0.5)
    with pytest.raises(ConfigError, match=r"1\.\.16"):
        small.svd(17)
    with pytest.raises(ShapeError, match="columns"):
        small.jvp(torch.zeros(4, 1))
    with pytest.raises(ConfigError, match="eta"):
        small.numerical_rank(eta=1.0)
    torch.testing.assert_close(small.svd(3).s, torch.full((3,), 0.8, dtype=torch.float64), atol=1e-5, rtol=1e-5)
