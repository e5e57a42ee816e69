"""CEP by its laws, the corruption of conditions, and the theory that can be solved in closed form."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.pretraining.tiny import DIT, LAW, UNET, load, make_network, make_setup, make_trainer

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, DataError
from pagoda.networks import BackboneConfig, DiffusersNetwork
from pagoda.networks.recording import class_tables, shift_class_embedding
from pagoda.pretraining import CepConfig, ConditionPerturbation, corrupt_labels, perturbed_law, swap_captions
from pagoda.training import NoisyInputs, StepRandom

RANDOM = StepRandom(0, 3, 100_000, slice(0, 100_000))


def inputs(condition: Condition, batch: int = 8) -> NoisyInputs:
    images = torch.zeros(batch, 3, 8, 8)
    sigma = torch.ones(batch)
    indices, flips = torch.arange(batch), torch.zeros(batch, dtype=torch.bool)
    return NoisyInputs(
        images=images,
        noise=images,
        sigma=sigma,
        quantile=LAW.quantile(sigma),
        condition=condition,
        indices=indices,
        flips=flips,
    )


def prepared(config: CepConfig, network: DiffusersNetwork | None = None) -> ConditionPerturbation:
    technique = config.build()
    technique.prepare(network or make_network(), make_setup())
    return technique


@pytest.mark.parametrize("width", [4, 16])
def test_uniform_noise_has_its_bound_and_its_variance(width: int) -> None:
    delta = CepConfig(kind="uniform", gamma=2.0).build().draw(RANDOM, "label", (width,))
    assert delta.abs().max() <= 2 / math.sqrt(width)
    assert delta.var().item() == pytest.approx(4 / (3 * width), rel=0.01)


@pytest.mark.parametrize("width", [4, 16])
def test_gaussian_noise_has_the_standard_deviation_gamma_over_root_d(width: int) -> None:
    delta = CepConfig(kind="gaussian", gamma=2.0).build().draw(RANDOM, "label", (width,))
    assert delta.std().item() == pytest.approx(2 / math.sqrt(width), rel=0.01)
    assert delta.norm(dim=1).square().mean().item() == pytest.approx(4, rel=0.01)  # its length does not depend on d


def test_the_shift_is_what_the_class_embedding_gains() -> None:
    """Shifting every row of the tables is the same network as shifting the embedding in one call."""
    for backbone in (DIT, UNET):
        network = make_network(backbone, random=True).eval()
        x, t, condition = torch.randn(4, 3, 8, 8), torch.linspace(-20, 20, 4), Condition.of_labels([0, 1, 2, -1])
        tables = class_tables(network)
        shift = torch.randn(tables[0].shape[1])
        plain = network(x, t, condition)
        with shift_class_embedding(network, shift.expand(4, -1)):
            shifted = network(x, t, condition)
        with torch.no_grad():
            for table in tables:
                table.add_(shift)
        torch.testing.assert_close(network(x, t, condition), shifted, atol=1e-6, rtol=0)
        assert not torch.allclose(plain, shifted, atol=1e-4)


@pytest.mark.parametrize("backbone", [DIT, UNET], ids=["dit", "unet"])
def test_nothing_is_left_behind(backbone: BackboneConfig) -> None:
    network = make_network(backbone, random=True).eval()
    x, t, condition = torch.randn(2, 3, 8, 8), torch.zeros(2), Condition.of_labels([0, 1])
    before = network(x, t, condition)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        shift_class_embedding(network, torch.ones(2, class_tables(network)[0].shape[1])),
    ):
        raise RuntimeError("on purpose")
    assert torch.equal(network(x, t, condition), before)


def test_samples_without_a_condition_are_left_alone_when_asked() -> None:
    condition = Condition.of_labels([0, -1, 2, -1, 0, 1, 2, -1])
    random = StepRandom(0, 0, 8, slice(0, 8))
    everywhere = prepared(CepConfig()).perturb(inputs(condition), random).class_shift
    conditioned = prepared(CepConfig(apply_to_null=False)).perturb(inputs(condition), random).class_shift
    assert everywhere is not None
    assert conditioned is not None
    null = condition.label == -1
    assert (everywhere[null] != 0).all()
    assert (conditioned[null] == 0).all()
    assert torch.equal(conditioned[~null], everywhere[~null])


def test_tokens_are_perturbed_one_by_one_or_all_alike() -> None:
    condition = Condition(tokens=torch.zeros(8, 5, 16), tokens_mask=torch.ones(8, 5, dtype=torch.bool))
    random = StepRandom(0, 0, 8, slice(0, 8))
    each = CepConfig().build().perturb(inputs(condition), random).condition.tokens
    alike = CepConfig(per_token=False).build().perturb(inputs(condition), random).condition.tokens
    assert each is not None
    assert alike is not None
    assert (each[:, 0] != each[:, 1]).any()
    assert torch.equal(alike[:, 0], alike[:, 4])
    assert each.abs().max() <= 1 / 4  # gamma / sqrt(16): the width of a token, not their number


def test_the_draw_depends_on_the_row_and_the_step_alone() -> None:
    whole = StepRandom(7, 2, 8, slice(0, 8))
    part = replace(whole, rows=slice(4, 8))
    technique = CepConfig().build()
    assert torch.equal(technique.draw(whole, "label", (16,))[4:], technique.draw(part, "label", (16,)))
    assert not torch.equal(
        technique.draw(whole, "label", (16,)), technique.draw(replace(whole, step=3), "label", (16,))
    )


def test_relative_noise_grows_with_the_embedding() -> None:
    network, random = make_network(), StepRandom(0, 0, 8, slice(0, 8))
    technique = prepared(CepConfig(relative=True), network)
    condition = Condition.of_labels(torch.arange(8) % 3)
    before = technique.perturb(inputs(condition), random).class_shift
    with torch.no_grad():
        for table in class_tables(network):
            table.mul_(3)
    after = technique.perturb(inputs(condition), random).class_shift
    torch.testing.assert_close(after, 3 * before)


def test_an_unconditional_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither labels nor captions"):
        CepConfig().build().prepare(make_network(labelled=False), make_setup(labelled=False))


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_bad_sizes_are_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match="gamma must be finite and >= 0"):
        CepConfig(gamma=gamma)


def test_the_noise_is_logged_beside_the_embedding(tmp_path: Path) -> None:
    trainer = make_trainer([CepConfig()], tmp_path, steps=1)
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    ratio = losses.named["cep/noise_to_embedding"]
    table = class_tables(trainer.objective.network)[0]  # type: ignore[attr-defined]
    assert ratio.shape == (8,)
    assert ratio.mean().item() == pytest.approx(math.sqrt(1 / 3) / table.norm(dim=1).mean().item(), rel=0.4)
    assert load(torch.tensor([0]), torch.tensor([False]))[1].label is not None


# Corruption.


def test_exactly_the_asked_share_of_labels_is_wrong() -> None:
    labels = torch.arange(1000) % 7
    for ratio in (0.0, 0.025, 0.5, 1.0):
        wrong, record = corrupt_labels(labels, ratio, seed=1)
        assert int((wrong != labels).sum()) == round(1000 * ratio) == int(record.changed.sum())
        assert torch.equal(record.changed, wrong != labels)
        assert record.to_json()["count"] == round(1000 * ratio)
    again, _ = corrupt_labels(labels, 0.5, seed=1)
    other, _ = corrupt_labels(labels, 0.5, seed=2)
    assert torch.equal(again, corrupt_labels(labels, 0.5, seed=1)[0])
    assert not torch.equal(again, other)


def test_wrong_labels_keep_the_prior_of_the_classes() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    wrong, _ = corrupt_labels(labels, 1.0)
    # Expected counts of "another class drawn by its frequency": 0 <- 300 * 6/7 + 100 * 6/9, and so on.
    expected = {0: 300 * 6 / 7 + 100 * 6 / 9, 1: 600 * 3 / 4 + 100 * 3 / 9, 2: 600 * 1 / 4 + 300 * 1 / 7}
    for value, count in Counter(wrong.tolist()).items():
        assert count == pytest.approx(expected[value], abs=60)


def test_asymmetric_corruption_stays_in_its_group() -> None:
    labels = torch.arange(600) % 6
    wrong, record = corrupt_labels(labels, 0.2, mode="asymmetric", group=[1, 4])
    assert set(labels[record.changed].tolist()) == {1, 4} == set(wrong[record.changed].tolist())
    assert torch.equal(wrong[~record.changed], labels[~record.changed])


def test_swapped_captions_are_a_permutation_without_fixed_points() -> None:
    captions = [f"caption {i}" for i in range(50)]
    swapped, record = swap_captions(captions, 0.3)
    assert sorted(swapped) == sorted(captions)
    assert [a != b for a, b in zip(swapped, captions, strict=True)] == record.changed.tolist()
    assert int(record.changed.sum()) == 15
    assert swap_captions(captions, 0.0)[0] == captions


def test_bad_corruption_is_refused() -> None:
    labels = torch.arange(10) % 2
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\], got 1.5"):
        corrupt_labels(labels, 1.5)
    with pytest.raises(DataError, match="two classes or more, got 1"):
        corrupt_labels(torch.zeros(10, dtype=torch.int64), 0.1)
    with pytest.raises(ConfigError, match="needs a group"):
        corrupt_labels(labels, 0.1, mode="asymmetric")
    with pytest.raises(ConfigError, match="'validation'"):
        corrupt_labels(labels, 0.1, split="validation")
    with pytest.raises(DataError, match="two or more, got 1"):
        swap_captions(["one"], 0.5)
    with pytest.raises(DataError, match="only 5 samples may change"):
        corrupt_labels(torch.tensor([0, 1] * 2 + [2] * 1 + [-1] * 5), 1.0)


# Theory.


def normal_equations(samples: torch.Tensor, gamma: float, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, b) of the least-squares optimum of eps from r x + s eps and (1 + gamma xi): all moments are known exactly."""
    d = samples.shape[1]
    r, s = math.exp(-t), math.sqrt(1 - math.exp(-2 * t))
    mean, second = samples.mean(0), samples.T @ samples / len(samples)
    xx = r**2 * second + s**2 * torch.eye(d).to(samples)
    xc = r * mean[:, None]  # E[x_t c], E[c] = 1
    cc = torch.full((1, 1), 1 + gamma**2, dtype=samples.dtype)
    gram = torch.cat([torch.cat([xx, xc], 1), torch.cat([xc.T, cc], 1)])
    target = torch.cat([s * torch.eye(d).to(samples), torch.zeros(1, d).to(samples)])
    solution = torch.linalg.solve(gram, target).T
    return solution[:, :d], solution[:, d]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_exact_form_solves_the_normal_equations(gamma: float) -> None:
    torch.manual_seed(0)
    samples = torch.randn(40, 5, dtype=torch.float64) + 0.7
    law = perturbed_law(samples, gamma)
    for t in (0.1, 1.0):
        weight, bias = normal_equations(samples, gamma, t)
        r, s = math.exp(-t), math.sqrt(1 - math.exp(-2 * t))
        expected = s * torch.linalg.inv(s**2 * torch.eye(5).double() + r**2 * law.covariance)
        torch.testing.assert_close(weight, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(bias, -r * weight @ law.mean, atol=1e-10, rtol=0)


def test_the_probability_flow_of_the_optimum_makes_that_law() -> None:
    torch.manual_seed(1)
    samples = torch.randn(30, 3, dtype=torch.float64) * 0.8 + 0.5
    gamma, steps, end = 0.7, 4000, 8.0
    law = perturbed_law(samples, gamma)
    # dz/dtau = z + score, tau = T - t, with score = -eps / s; linear, so that moments can be carried along exactly.
    mean, covariance = torch.zeros(3).double(), torch.eye(3).double()
    h = end / steps

    def drift(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = normal_equations(samples, gamma, t)
        s = math.sqrt(1 - math.exp(-2 * t))
        return torch.eye(3).double() - weight / s, -bias / s

    for k in range(steps):
        matrix, offset = drift(max(end - (k + 0.5) * h, 1e-4))
        step = torch.linalg.matrix_exp(h * matrix)
        shift = torch.linalg.solve(matrix, (step - torch.eye(3).double()) @ offset)
        mean, covariance = step @ mean + shift, step @ covariance @ step.T
    torch.testing.assert_close(mean, law.mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(covariance, law.covariance, atol=1e-3, rtol=0)


def test_both_formulas_agree_in_one_dimension_and_only_there() -> None:
    torch.manual_seed(2)
    one, three = torch.randn(20, 1, dtype=torch.float64) + 1, torch.randn(20, 3, dtype=torch.float64) + 1
    torch.testing.assert_close(perturbed_law(one, 0.5).covariance, perturbed_law(one, 0.5, "paper").covariance)
    exact, paper = perturbed_law(three, 0.5).covariance, perturbed_law(three, 0.5, "paper").covariance
    assert torch.linalg.eigvalsh(paper - exact)[0] > -1e-12  # the paper's is the larger one
    assert (paper - exact).abs().max() > 1e-2


def test_the_entropy_gain_has_a_closed_form() -> None:
    torch.manual_seed(3)
    samples = torch.randn(50, 4, dtype=torch.float64) + 0.5
    clean, noisy = perturbed_law(samples, 0.0), perturbed_law(samples, 0.6)
    k = 0.36 / 1.36
    expected = 0.5 * torch.log(1 + k * clean.mean @ torch.linalg.solve(clean.covariance, clean.mean))
    torch.testing.assert_close(noisy.entropy_gain(clean), expected)
    assert expected > 0


def test_a_little_noise_helps_and_much_hurts_with_few_samples() -> None:
    """Squared Wasserstein distance to the truth over training sets: better for small gamma, best near 4 / sqrt(n), worse at 8."""
    torch.manual_seed(4)
    n, d = 50, 16
    truth = torch.zeros(d, dtype=torch.float64)
    truth[0] = 1.0
    gains = dict.fromkeys((1, 3, 4, 5, 8), 0.0)
    for _ in range(300):
        samples = torch.randn(n, d, dtype=torch.float64) + truth
        clean = perturbed_law(samples, 0.0).wasserstein_squared(truth)
        for factor in gains:
            gains[factor] += (
                float(clean - perturbed_law(samples, factor / math.sqrt(n)).wasserstein_squared(truth)) / 300
            )
    assert gains[1] > 0
    assert max(gains, key=lambda factor: gains[factor]) in (3, 4, 5)
    assert gains[8] < 0
