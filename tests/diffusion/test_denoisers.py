"""Laws of the denoisers: the contract of the interface, guidance, and the closed-form oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pagoda.diffusion import (
    NULL_LABEL,
    UNCONDITIONAL,
    Condition,
    CosineVPSchedule,
    Denoiser,
    EDMDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    ScheduledDenoiser,
    convert,
)
from pagoda.errors import ConfigError, ShapeError


class Labelled(Denoiser):
    """A made-up conditional model; records how many images it was asked about."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.images = 0

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.images += len(x)
        assert condition.label is not None
        assert condition.guidance is None
        return torch.tanh(x) * 0.7 + condition.label.reshape(-1, 1, 1, 1) * 0.31 + self.shift


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LABELS = Condition.of_labels([0, 1, 2, 3])


def means() -> Tensor:
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def mixture() -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(
        means(),
        torch.tensor([0.3, 0.5, 0.2, 0.4], dtype=torch.float64),
        weights=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        labels=torch.tensor([0, 0, 1, 1]),
    )


def test_sigma_may_be_a_number_or_one_per_sample() -> None:
    denoiser = GaussianDenoiser(0.1, 0.5)
    torch.testing.assert_close(denoiser(images(), 2.0), denoiser(images(), torch.full((4,), 2.0)), rtol=0, atol=0)
    levels = torch.tensor([0.1, 1.0, 10.0, 80.0])
    rows = [denoiser(images()[i : i + 1], float(levels[i])) for i in range(4)]
    torch.testing.assert_close(denoiser(images(), levels), torch.cat(rows), rtol=1e-6, atol=1e-6)


def test_batch_mismatches_are_refused() -> None:
    denoiser = GaussianDenoiser(0.1, 0.5)
    with pytest.raises(ShapeError, match=r"shape \(4,\), got \(3,\)"):
        denoiser(images(), torch.ones(3))
    with pytest.raises(ShapeError, match="2 rows for 4 images"):
        denoiser(images(), 1.0, Condition.of_labels([0, 1]))


def test_edm_preconditioning_has_its_known_scalings() -> None:
    # Karras et al. 2022, table 1: unit-variance input and target; c_skip -> 1 at no noise, -> 0 at much.
    denoiser = EDMDenoiser(lambda x, t, condition: x, sigma_data=0.5)
    sigma = torch.tensor([1e-4, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in = denoiser.scalings(sigma)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), torch.ones(3, dtype=torch.float64))
    target_variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-4)


def test_edm_denoiser_of_a_silent_network_is_the_skip() -> None:
    denoiser = EDMDenoiser(lambda x, t, condition: torch.zeros_like(x), sigma_data=0.5)
    torch.testing.assert_close(denoiser(images(), 0.5), images() / 2)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity", "score"])
def test_a_network_that_knows_the_truth_becomes_the_exact_denoiser(prediction: str) -> None:
    schedule, truth = CosineVPSchedule(), mixture()

    def network(x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        t = time.reshape(-1, 1, 1, 1)
        x0 = truth(x_t / schedule.alpha(t), schedule.nu(time), condition)
        return convert(x0, x_t, t, "x0", prediction, schedule)

    x, sigma = images(dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64)
    ours = ScheduledDenoiser(network, schedule, prediction)(x, sigma)
    torch.testing.assert_close(ours, truth(x, sigma), rtol=1e-9, atol=1e-9)


def test_guidance_of_one_is_the_plain_model_bit_for_bit() -> None:
    model = Labelled()
    plain = model(images(), 1.0, LABELS)
    model.images = 0
    assert torch.equal(GuidedDenoiser(model, 1.0)(images(), 1.0, LABELS), plain)
    assert model.images == 4  # the unconditional half was not computed


def test_guidance_of_zero_is_the_unconditional_model() -> None:
    model = Labelled()
    guided = GuidedDenoiser(model, 0.0)(images(), 1.0, LABELS)
    torch.testing.assert_close(guided, model(images(), 1.0, LABELS.null()), rtol=0, atol=0)


def test_guidance_extrapolates_linearly_in_its_weight() -> None:
    model = Labelled()
    results = [GuidedDenoiser(model, w)(images(), 1.0, LABELS) for w in (0.0, 1.0, 2.0, 3.0)]
    torch.testing.assert_close(results[2] - results[1], results[1] - results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[3] - results[2], results[1] - results[0], rtol=1e-5, atol=1e-5)


def test_guidance_weights_per_sample_are_those_of_single_runs() -> None:
    model, weights = Labelled(), [0.0, 1.0, 2.5, 4.0]
    condition = Condition(label=LABELS.label, guidance=torch.tensor(weights))
    together = GuidedDenoiser(model, None)(images(), 1.0, condition)
    for row, weight in enumerate(weights):
        single = GuidedDenoiser(model, weight)(images()[row : row + 1], 1.0, LABELS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, rtol=1e-6, atol=1e-6)


def test_autoguidance_uses_the_weaker_model_with_the_same_condition() -> None:
    model, weak = Labelled(), Labelled(shift=0.5)
    guided = GuidedDenoiser(model, 3.0, other=weak)(images(), 1.0, LABELS)
    good, bad = model(images(), 1.0, LABELS), weak(images(), 1.0, LABELS)
    torch.testing.assert_close(guided, bad + 3 * (good - bad))


def test_guidance_acts_only_inside_its_interval() -> None:
    model = Labelled()
    guided = GuidedDenoiser(model, 3.0, interval=(0.5, 2.0))
    sigma = torch.tensor([0.5, 0.6, 2.0, 2.1])  # the low end is outside, the high end inside
    changed = (guided(images(), sigma, LABELS) != model(images(), sigma, LABELS)).flatten(1).any(1)
    assert changed.tolist() == [False, True, True, False]


def test_guidance_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="none was given"):
        GuidedDenoiser(Labelled(), 2.0)(images(), 1.0, UNCONDITIONAL)
    with pytest.raises(ConfigError, match=r"condition\.guidance"):
        GuidedDenoiser(Labelled(), None)(images(), 1.0, LABELS)
    with pytest.raises(ConfigError, match="finite"):
        GuidedDenoiser(Labelled(), float("inf"))
    with pytest.raises(ConfigError, match="low < high"):
        GuidedDenoiser(Labelled(), 2.0, interval=(1.0, 1.0))


def test_mixture_of_one_is_the_gaussian() -> None:
    one = GaussianMixtureDenoiser(means()[:1], torch.tensor([0.3], dtype=torch.float64))
    gauss = GaussianDenoiser(means()[0], torch.tensor(0.3, dtype=torch.float64))
    x = images(dtype=torch.float64)
    torch.testing.assert_close(one(x, 0.7), gauss(x, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [NULL_LABEL, 0, 1])
def test_mixture_follows_tweedie(label: int) -> None:
    # E[x0 | x] = x + s^2 grad log p(x), with p written down independently of the denoiser; eq. 3 of Karras et al. 2022.
    oracle, sigma = mixture(), 0.6
    x = images(dtype=torch.float64).requires_grad_()
    chosen = torch.arange(4) if label == NULL_LABEL else (oracle.labels == label).nonzero().flatten()
    variance = oracle.stds[chosen] ** 2 + sigma**2
    distance = (x[:, None] - oracle.means[chosen][None]).square().flatten(2).sum(-1)
    log_p = (oracle.log_weights[chosen] - distance / (2 * variance) - 9 * variance.log()).logsumexp(1)  # dim / 2 = 9
    score = torch.autograd.grad(log_p.sum(), x)[0]
    ours = oracle(x.detach(), sigma, Condition.of_labels([label] * 4))
    torch.testing.assert_close(ours, (x + sigma**2 * score).detach(), rtol=1e-10, atol=1e-10)


def test_posterior_is_restricted_to_the_class_and_whole_for_the_null_label() -> None:
    oracle, x, sigma = mixture(), images(dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64)
    posterior = oracle.posterior(x, sigma, Condition.of_labels([0, 1, 0, NULL_LABEL]))
    torch.testing.assert_close(posterior.sum(1), torch.ones(4, dtype=torch.float64))
    assert (posterior[0, 2:] == 0).all()
    assert (posterior[1, :2] == 0).all()
    assert (posterior[3] > 0).all()
    torch.testing.assert_close(posterior[3], oracle.posterior(x, sigma, UNCONDITIONAL)[3])
    whole = oracle.posterior(x, sigma, UNCONDITIONAL)
    torch.testing.assert_close(posterior[0, :2], whole[0, :2] / whole[0, :2].sum())  # Bayes: condition, then normalise


def test_posterior_at_great_noise_is_the_prior() -> None:
    posterior = mixture().posterior(
        images(dtype=torch.float64), torch.full((4,), 1e5, dtype=torch.float64), UNCONDITIONAL
    )
    torch.testing.assert_close(posterior[0], torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), rtol=1e-3, atol=0)


def test_draws_of_the_mixture_have_its_moments() -> None:
    oracle = mixture()
    x, labels = oracle.draw(20_000, torch.Generator().manual_seed(0))
    expected = torch.einsum("k,kchw->chw", oracle.log_weights.exp(), oracle.means)
    assert (x.mean(0) - expected).abs().max() < 5 * float(x.std(0).max()) / 20_000**0.5
    assert labels.float().mean().item() == pytest.approx(0.7, abs=0.02)  # weights 3 and 4 of 10 carry label 1
