"""The diffusion classifier against exact answers: Bayes on oracles, paired noise, nested schedules, counted calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from tests.understanding.conftest import NUM_CLASSES, edm, make_network
from torch import Tensor

from pagoda.diffusion import Condition, Denoiser, DiscreteVPSchedule, GaussianDenoiser, GaussianMixtureDenoiser
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.understanding import (
    AtRisk,
    Candidates,
    DenoisingErrors,
    DiffusionClassifier,
    ErrorConfig,
    Full,
    KeepBest,
    LevelGrid,
    calibration_error,
    count_calls,
    fit_temperature,
    level_weights,
)
from pagoda.understanding.elimination import student_cdf, student_quantile

EXACT = {"sigma_range": (1e-6, 1e6)}


def mixture(std: float | list[float] = 0.6, count: int = 3, seed: int = 0) -> GaussianMixtureDenoiser:
    """Classes N(m_c, s_c^2 I) over 1 x 3 x 3 pixels, whose Bayes answers are known."""
    means = torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stds = torch.tensor(std, dtype=torch.float64) * torch.ones(count, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, stds)


def log_likelihood(oracle: GaussianMixtureDenoiser, x: Tensor) -> Tensor:
    """ln p(x | c), (B, K)."""
    distance = (x[:, None] - oracle.means[None]).flatten(2).square().sum(2)
    dim = x[0].numel()
    return -distance / (2 * oracle.stds**2) - dim * oracle.stds.log() - dim / 2 * math.log(2 * math.pi)


def draw(oracle: GaussianMixtureDenoiser, count: int) -> tuple[Tensor, Tensor]:
    return oracle.draw(count, torch.Generator().manual_seed(7))


@pytest.mark.parametrize("weighting", ["elbo", "eps", "edm", "x0"])
def test_equal_covariances_give_the_nearest_mean_under_any_weighting(weighting: str) -> None:
    """|D_c - x|^2 = const + f(sigma) |x - m_c|^2 + a noise term that vanishes on average."""
    oracle = mixture()
    x, _ = draw(oracle, 64)
    likelihood = log_likelihood(oracle, x)
    best = likelihood.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1.5  # away from the boundary
    classifier = DiffusionClassifier(
        oracle,
        Candidates.of_labels([0, 1, 2]),
        grid=LevelGrid.log_uniform(128, sigma_min=0.05, sigma_max=20),
        elimination=Full(),
        config=ErrorConfig(weighting=weighting),  # type: ignore[arg-type]
        **EXACT,
    )
    found = classifier.predict(x, seeds=range(64)).classes
    agreement = (found == likelihood.argmax(1))[clear].double().mean()
    assert int(clear.sum()) > 40
    assert float(agreement) > 0.97


def test_elbo_weights_give_exact_log_likelihood_ratios_with_unequal_covariances() -> None:
    oracle = mixture([0.3, 0.6, 1.2])
    x, _ = draw(oracle, 12)
    errors = DenoisingErrors(
        oracle,
        LevelGrid.log_uniform(1024, sigma_min=2e-3, sigma_max=200),
        ErrorConfig(weighting="elbo"),
        **EXACT,
    )(x, Candidates.of_labels([0, 1, 2]), seeds=range(12))
    gap = errors - errors[:, :1]
    measured, exact = -gap.mean(2), log_likelihood(oracle, x)
    error = gap.std(2) / math.sqrt(gap.shape[2]) + 1e-9
    z = ((measured - (exact - exact[:, :1])) / error)[:, 1:]
    assert float(z.abs().max()) < 4.5
    assert float(z.square().mean()) < 1.5  # 1 for independent draws; stratification only lowers it


def test_the_posterior_of_the_classifier_is_that_of_the_model() -> None:
    oracle = mixture([0.5, 0.8, 0.8])
    x, _ = draw(oracle, 8)
    classifier = DiffusionClassifier(
        oracle,
        Candidates.of_labels([0, 1, 2]),
        grid=LevelGrid.log_uniform(1536, sigma_min=2e-3, sigma_max=200),
        elimination=Full(),
        config=ErrorConfig(weighting="elbo"),
        **EXACT,
    )
    found = classifier.predict(x, seeds=range(8)).probabilities
    torch.testing.assert_close(found, log_likelihood(oracle, x).softmax(1), atol=0.1, rtol=0)


def test_the_density_of_every_grid_integrates_to_one_over_ln_sigma() -> None:
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for grid in (
        LevelGrid.log_uniform(512, sigma_min=0.1, sigma_max=10),
        LevelGrid.log_normal(512, mean=-1, std=1.5),
        LevelGrid.of_schedule(999, DiscreteVPSchedule(table)),
    ):
        order = grid.sigmas.argsort()
        strata = grid.sigmas[order].log().diff() * (grid.density[order][1:] + grid.density[order][:-1]) / 2
        torch.testing.assert_close(strata.sum(), torch.tensor(1.0, dtype=torch.float64), atol=0.02, rtol=0)
        assert torch.allclose(strata[10:-10], torch.full_like(strata[10:-10], 1 / len(grid)), rtol=0.25)
        assert bool((level_weights(grid, "elbo") * grid.sigmas**2 * grid.density - 1).abs().max() < 1e-12)


def conditional(seed: int = 0) -> tuple[Denoiser, Tensor]:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return edm(make_network("unet")), images[:COUNT]


COUNT = 3
GRID = LevelGrid.log_normal(16)
SEEDS = [5, 6, 7]


def test_errors_do_not_depend_on_how_they_are_batched() -> None:
    denoiser, images = conditional()
    denoiser.double()
    candidates = Candidates.of_labels([0, 1, 2, 3])
    whole = DenoisingErrors(denoiser, GRID, ErrorConfig(batch_size=1000))(images.double(), candidates, seeds=SEEDS)
    pieces = DenoisingErrors(denoiser, GRID, ErrorConfig(batch_size=7))
    torch.testing.assert_close(pieces(images.double(), candidates, seeds=SEEDS), whole, atol=1e-11, rtol=1e-11)
    alone = torch.cat([pieces(images[i : i + 1].double(), candidates, seeds=SEEDS[i : i + 1]) for i in range(COUNT)])
    torch.testing.assert_close(alone, whole, atol=1e-11, rtol=1e-11)
    few = pieces(images.double(), candidates, seeds=SEEDS, levels=[3, 11])
    torch.testing.assert_close(few, whole[:, :, [3, 11]], atol=1e-11, rtol=1e-11)


def test_permuted_candidates_permute_the_errors() -> None:
    denoiser, images = conditional()
    errors = DenoisingErrors(denoiser, GRID)
    order = [2, 0, 3, 1]
    a = errors(images, Candidates.of_labels([0, 1, 2, 3]), seeds=SEEDS)
    torch.testing.assert_close(
        errors(images, Candidates.of_labels(order), seeds=SEEDS), a[:, order], rtol=1e-4, atol=1e-3
    )


def test_paired_noise_cancels() -> None:
    """Differences under shared noise vary far less than under noise of their own."""
    oracle = mixture(0.6, count=2)
    oracle.means *= 0.3  # close classes: most of an error is common to both
    x, _ = draw(oracle, 32)
    both = Candidates.of_labels([0, 1])
    grid = LevelGrid(torch.full((64,), 0.5, dtype=torch.float64), torch.ones(64, dtype=torch.float64))
    a = DenoisingErrors(oracle, grid, ErrorConfig(seed=0), **EXACT)(x, both, seeds=range(32))
    b = DenoisingErrors(oracle, grid, ErrorConfig(seed=1), **EXACT)(x, both, seeds=range(32))
    paired, unpaired = (a[:, 0] - a[:, 1]).var(1).mean(), (a[:, 0] - b[:, 1]).var(1).mean()
    assert float(paired) < 0.25 * float(unpaired)
    assert torch.equal(DenoisingErrors(oracle, grid, ErrorConfig(seed=0), **EXACT)(x, both, seeds=range(32)), a)


def test_the_same_candidate_twice_ties_and_the_first_wins() -> None:
    denoiser, images = conditional()
    twice = Candidates(Condition.of_labels([1, 1, 2]), torch.arange(3), ("a", "b", "c"))
    errors = DenoisingErrors(denoiser, GRID, ErrorConfig(batch_size=1))(images, twice, seeds=SEEDS)
    assert torch.equal(errors[:, 0], errors[:, 1])
    for elimination in (Full(), AtRisk(), KeepBest(((4, 2), (16, 1)))):
        found = DiffusionClassifier(
            denoiser, twice, grid=GRID, elimination=elimination, config=ErrorConfig(batch_size=1)
        )
        assert set(found.predict(images, seeds=SEEDS).classes.tolist()) <= {0, 2}  # never the second of equals


def test_the_best_prompt_of_a_class_decides() -> None:
    denoiser, images = conditional()
    labels = Candidates.of_labels([0, 1, 2, 3])
    one = DiffusionClassifier(denoiser, labels, grid=GRID, elimination=Full()).predict(images, seeds=SEEDS)
    grouped = Candidates(labels.condition, torch.tensor([0, 1, 1, 0]), ("outer", "inner"))
    two = DiffusionClassifier(denoiser, grouped, grid=GRID, elimination=Full()).predict(images, seeds=SEEDS)
    assert torch.equal(two.classes, torch.tensor([0, 1, 1, 0])[one.classes])
    assert torch.equal(two.probabilities.argmax(1), two.classes)


# Elimination.


def test_schedules_nest_and_cost_what_the_paper_says() -> None:
    """Those schedules of the official code whose grids nest: CIFAR-10 and Pets."""
    assert count_calls(KeepBest(((50, 5), (500, 1))), 500, [10, 5]) == 2750
    assert count_calls(KeepBest(((25, 5), (250, 1))), 250, [37, 5]) == 2050
    assert count_calls(Full(), 64, [10]) == 640
    found = KeepBest(((4, 3), (8, 2), (16, 1)))
    denoiser, images = conditional()
    result = DiffusionClassifier(denoiser, grid=GRID, elimination=found).predict(images, seeds=SEEDS)
    assert result.calls.tolist() == [count_calls(found, 16, [4, 3, 2])] * COUNT
    assert sorted(result.levels_seen[0].tolist()) == [4, 8, 16, 16]


def test_one_stage_is_the_full_evaluation() -> None:
    denoiser, images = conditional()
    full = DiffusionClassifier(denoiser, grid=GRID, elimination=Full()).predict(images, seeds=SEEDS)
    once = DiffusionClassifier(denoiser, grid=GRID, elimination=KeepBest(((16, 1),))).predict(images, seeds=SEEDS)
    assert torch.equal(full.classes, once.classes)
    assert torch.equal(full.probabilities, once.probabilities)
    errors = DenoisingErrors(denoiser, GRID)(images, Candidates.of_labels([0, 1, 2, 3]), seeds=SEEDS)
    assert torch.equal(full.classes, errors.mean(2).argmin(1))


def test_elimination_at_a_stated_risk_keeps_to_it_and_saves_calls() -> None:
    """On an oracle with close classes: rarely another answer than the full evaluation's, for fewer calls."""
    oracle = mixture(0.8, count=6)
    x, _ = draw(oracle, 300)
    options = {"grid": LevelGrid.log_uniform(64, sigma_min=0.1, sigma_max=10), **EXACT}
    six = Candidates.of_labels(list(range(6)))
    full = DiffusionClassifier(oracle, six, elimination=Full(), **options).predict(x, seeds=range(300))
    cheap = DiffusionClassifier(oracle, six, elimination=AtRisk(risk=0.05), **options).predict(x, seeds=range(300))
    assert float((full.classes == cheap.classes).double().mean()) >= 0.95
    assert float(cheap.calls.double().mean()) < 0.6 * float(full.calls.double().mean())
    bold = DiffusionClassifier(oracle, six, elimination=AtRisk(risk=0.5), **options).predict(x, seeds=range(300))
    assert float(bold.calls.double().mean()) < float(cheap.calls.double().mean())


@pytest.mark.parametrize("prior", [0, 8])
def test_a_rival_goes_when_students_test_of_its_paired_differences_says_so(prior: int) -> None:
    """Two candidates, one look, levels that are few beside those of the full evaluation: scipy's test, by hand where it is moderated."""
    elimination = AtRisk(risk=0.1, first=5, growth=1e9, prior=prior)
    errors = torch.randn(200, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors[:, 1] += torch.linspace(-1, 3, 200, dtype=torch.float64)[:, None]
    kept = elimination.survivors(errors, torch.ones(200, 2, dtype=torch.bool), 0, 10**9)
    gap = (errors[:, 1] - errors[:, 0]).numpy()
    statistic = abs(gap.mean(1)) / (gap.std(1, ddof=1) / math.sqrt(5))
    expected = stats.t.sf(statistic, 4 + prior) < 0.1  # of two, the rivals' mean variance is the rival's own
    assert (kept.sum(1) == 1).tolist() == expected.tolist()
    assert 20 < expected.sum() < 180
    if not prior:
        by_scipy = stats.ttest_1samp(gap, 0, axis=1).pvalue / 2 < 0.1
        assert expected.tolist() == by_scipy.tolist()


def test_an_evaluation_ends_when_every_image_is_decided() -> None:
    oracle = mixture(0.05, count=3)  # far apart: the first looks decide
    x, labels = draw(oracle, 8)
    three, grid = Candidates.of_labels([0, 1, 2]), LevelGrid.log_uniform(64, sigma_min=0.05, sigma_max=5)
    found = DiffusionClassifier(oracle, three, grid=grid, elimination=AtRisk(risk=0.2), **EXACT).predict(
        x, seeds=range(8)
    )
    assert torch.equal(found.classes, labels)
    assert int(found.levels_seen.max()) < 64


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    denoiser, images = conditional()
    classifier = DiffusionClassifier(denoiser, grid=GRID)
    whole = classifier.predict(images, seeds=SEEDS)
    alone = [classifier.predict(images[i : i + 1], seeds=SEEDS[i : i + 1]) for i in range(COUNT)]
    assert [int(result.classes) for result in alone] == whole.classes.tolist()
    assert [int(result.calls) for result in alone] == whole.calls.tolist()


def test_stages_of_a_risk_rise_to_the_whole_grid() -> None:
    for levels in (2, 6, 7, 64, 1000):
        stages = AtRisk().stages(levels)
        assert stages[-1] == levels
        assert all(a < b for a, b in itertools.pairwise(stages))


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 8, 31, 200])
def test_students_law_agrees_with_scipy(degrees: int) -> None:
    for value in (-3.0, -0.2, 0.0, 0.7, 2.5, 9.0):
        assert student_cdf(value, degrees) == pytest.approx(stats.t.cdf(value, degrees), abs=1e-12)
    for probability in (0.01, 0.4, 0.9, 0.999, 0.99999):
        assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-7)


# Calibration.


def test_calibration_finds_the_temperature_that_labels_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).flatten()
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert fit_temperature(1000 * logits, labels) == pytest.approx(1000 * temperature, rel=1e-6)
    assert calibration_error((logits / temperature).softmax(1), labels) < 0.02
    assert calibration_error(logits.softmax(1), labels) > 0.1


def test_calibrating_changes_probabilities_and_no_answer() -> None:
    oracle = mixture(0.8)
    x, labels = draw(oracle, 200)
    classifier = DiffusionClassifier(
        oracle, Candidates.of_labels([0, 1, 2]), grid=LevelGrid.log_uniform(32, sigma_min=0.1, sigma_max=10), **EXACT
    )
    before = classifier.predict(x, seeds=range(200))
    temperature = classifier.calibrate(x[:100], labels[:100], seeds=range(100))
    after = classifier.predict(x, seeds=range(200))
    assert temperature == classifier.temperature != 1.0
    assert torch.equal(before.classes, after.classes)
    held = slice(100, 200)
    assert calibration_error(after.probabilities[held], labels[held], 5) < calibration_error(
        before.probabilities[held], labels[held], 5
    )


# Bad input.


def test_models_and_classes_that_leave_nothing_to_choose_are_refused() -> None:
    with pytest.raises(ConfigError, match="trained without labels"):
        DiffusionClassifier(edm(make_network("unet", num_classes=0)))
    with pytest.raises(ConfigError, match="trained without labels"):
        DiffusionClassifier(GaussianDenoiser(0.0, 1.0))
    with pytest.raises(ConfigError, match="nothing to choose"):
        DiffusionClassifier(edm(make_network("unet", num_classes=1)))
    with pytest.raises(ConfigError, match="nothing to choose"):
        Candidates.of_labels([2])
    with pytest.raises(ConfigError, match="label of no class"):
        Candidates.of_labels([-1, 0])
    with pytest.raises(ConfigError, match="must differ"):
        Candidates.of_labels([1, 1])
    with pytest.raises(ConfigError, match="numbered 0, 1, 2"):
        Candidates(Condition.of_labels([0, 1]), torch.tensor([0, 2]), ("a", "b"))
    with pytest.raises(ConfigError, match="3 names for 2 classes"):
        Candidates.of_labels([0, 1], ["a", "b", "c"])
    blind = DiffusionClassifier(GaussianDenoiser(0.0, 1.0), Candidates.of_labels([0, 1]), **EXACT)
    with pytest.raises(ConfigError, match="does not look at this condition"):
        blind.predict(torch.zeros(2, 1, 4, 4), seeds=[0, 1])


def test_other_mistakes_are_named() -> None:
    denoiser, images = conditional()
    classifier = DiffusionClassifier(denoiser, grid=GRID)
    with pytest.raises(DataError, match="NaN or infinity"):
        classifier.predict(images * torch.nan, seeds=SEEDS)
    with pytest.raises(ShapeError, match="as many seeds"):
        classifier.predict(images, seeds=[1])
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        classifier.predict(images[0], seeds=[1])
    with pytest.raises(ConfigError, match="outside of what this model knows"):
        DiffusionClassifier(denoiser, grid=LevelGrid.log_uniform(8, sigma_min=0.1, sigma_max=500))
    with pytest.raises(ConfigError, match="out of range"):
        DiffusionClassifier(denoiser, Candidates.of_labels([0, NUM_CLASSES]), grid=GRID).predict(images, seeds=SEEDS)
    with pytest.raises(ConfigError, match="wants 500 noise levels"):
        DiffusionClassifier(denoiser, grid=GRID, elimination=KeepBest(((50, 2), (500, 1))))
    for schedule in (((8, 4), (4, 1)), ((4, 2), (8, 2)), ((4, 1), (8, 2)), ()):
        with pytest.raises(ConfigError, match="end with 1"):
            KeepBest(schedule)
    with pytest.raises(ConfigError, match="0 < risk < 1"):
        AtRisk(risk=0.0)
    with pytest.raises(ConfigError, match="weighting must be one of"):
        ErrorConfig(weighting="vlb")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        DiffusionClassifier(denoiser, temperature=0.0)
    with pytest.raises(DataError, match="of one class"):
        fit_temperature(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
