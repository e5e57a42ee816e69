"""The denoising objective by its laws."""

from __future__ import annotations

import pytest
import torch
from tests.pretraining.tiny import LAW, load, make_network
from torch import Tensor

from pagoda.diffusion import EDMDenoiser
from pagoda.errors import ConfigError
from pagoda.training import NoiseLaw, OptimizerConfig, Runtime, StepRandom, Trainable
from pagoda.training.denoising import DenoisingObjective


def objective(weighting: str) -> DenoisingObjective:
    network = make_network(random=True)
    denoiser = EDMDenoiser(network, noise_scale=25.0)
    return DenoisingObjective(
        denoiser,
        Trainable(network, OptimizerConfig()),
        load,
        noise=LAW,
        condition_dropout=0.0,
        mirror=False,
        weighting=weighting,
    )


def test_the_flow_weighting_is_the_loss_of_flow_matching() -> None:
    """|v_hat - v|^2 on x_t = (1 - t) x + t n with v = n - x, worked out from the velocity itself."""
    found = objective("flow")
    random, runtime = StepRandom(0, 3, 8, slice(0, 8)), Runtime("cpu")
    batch = found.batch(torch.arange(8), random)
    losses = found.losses("teacher", batch, random, runtime)
    assert losses is not None
    sigma, noise = LAW.draw(random.normal("sigma")), random.normal("noise", 3, 8, 8)

    def wide(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    t = sigma / (1 + sigma)
    x_t = (1 - wide(t)) * batch.images + wide(t) * noise
    estimate = found.denoiser(x_t / (1 - wide(t)), sigma, batch.condition)
    velocity = (x_t - estimate) / wide(t)
    expected = (velocity - (noise - batch.images)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.named["denoising"], expected, rtol=1e-4, atol=1e-5)


def test_unknown_weightings_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        objective("min-snr")


def test_quantiles_of_the_noise_law_are_uniform_and_invert() -> None:
    law = NoiseLaw(mean=0.3, std=0.7)
    sigma = law.draw(torch.randn(50_000))
    quantile = law.quantile(sigma)
    assert quantile.mean().item() == pytest.approx(0.5, abs=0.01)
    assert quantile.std().item() == pytest.approx((1 / 12) ** 0.5, abs=0.01)
    torch.testing.assert_close(law.sigma_at(quantile[:100]), sigma[:100].double(), rtol=1e-5, atol=0)
