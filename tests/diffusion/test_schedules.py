"""Laws of the schedules and of the conversions between predictions."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagoda.diffusion import (
    CosineVPSchedule,
    DiscreteVPSchedule,
    EDMSchedule,
    FlowMatchingSchedule,
    LinearVPSchedule,
    Schedule,
    VESchedule,
    convert,
    loss_weight,
)
from pagoda.diffusion.predictions import PREDICTIONS
from pagoda.errors import ConfigError, ShapeError

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES = {
    "edm": EDMSchedule(),
    "ve": VESchedule(),
    "linear": LinearVPSchedule(),
    "cosine": CosineVPSchedule(),
    "flow": FlowMatchingSchedule(time_scale=1000.0),
    "table": DiscreteVPSchedule(ALPHAS_CUMPROD),
}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times(schedule: Schedule, count: int = 101) -> torch.Tensor:
    return torch.linspace(schedule.t_min, schedule.t_max, count, dtype=torch.float64)


@EVERY
def test_both_scales_are_positive_and_noise_grows_with_time(schedule: Schedule) -> None:
    t = times(schedule)
    assert (schedule.alpha(t) > 0).all()
    assert (schedule.sigma(t) > 0).all()
    assert (schedule.nu(t).diff() > 0).all()
    assert (schedule.lam(t).diff() < 0).all()


@EVERY
def test_noise_ratio_is_exp_of_minus_half_log_snr(schedule: Schedule) -> None:
    t = times(schedule)
    torch.testing.assert_close(schedule.nu(t), (-schedule.lam(t)).exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["edm", "ve", "linear", "cosine", "flow"])
def test_derivatives_of_the_closed_forms_equal_autograd(name: str) -> None:
    schedule = SCHEDULES[name]
    t = times(schedule).requires_grad_()
    for scale, derivative in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        value = scale(t)
        expected = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-9, atol=1e-12)


def test_derivatives_of_the_table_equal_central_differences() -> None:
    schedule = SCHEDULES["table"]
    t, h = torch.tensor([0.5, 1.3, 200.25, 700.5, 998.75], dtype=torch.float64), 1e-3  # off the knots
    for scale, derivative in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        expected = (scale(t + h) - scale(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-6, atol=1e-12)  # sigma is near 1: 1e-16 / h


@pytest.mark.parametrize("name", ["linear", "cosine", "table"])
def test_variance_preserving_schedules_preserve_variance(name: str) -> None:
    t = times(SCHEDULES[name])
    total = SCHEDULES[name].alpha(t) ** 2 + SCHEDULES[name].sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-12, atol=0)


def test_table_is_met_exactly_at_whole_steps() -> None:
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULES["table"].alpha(t) ** 2, ALPHAS_CUMPROD, rtol=1e-12, atol=0)


@EVERY
def test_time_of_a_noise_ratio_round_trips(schedule: Schedule) -> None:
    t = times(schedule)
    span = schedule.t_max - schedule.t_min
    torch.testing.assert_close(schedule.t_of_nu(schedule.nu(t)), t, rtol=1e-9, atol=1e-9 * span)


@EVERY
@pytest.mark.parametrize("factor", ["below", "above"])
def test_noise_ratio_out_of_range_is_refused(schedule: Schedule, factor: str) -> None:
    low, high = schedule.nu(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    with pytest.raises(ConfigError, match="leave the range"):
        schedule.t_of_nu(low * 0.99 if factor == "below" else high * 1.01)


def test_network_time_is_the_time_unless_the_schedule_scales_it() -> None:
    t = torch.tensor([0.25], dtype=torch.float64)
    assert SCHEDULES["flow"].network_time(t).item() == 250
    assert SCHEDULES["cosine"].network_time(t).item() == 0.25


def test_rescaling_keeps_the_noise_ratio_and_the_state() -> None:
    # The canonical states x / alpha of both must be one and the same.
    source, target = SCHEDULES["linear"], SCHEDULES["flow"]
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    scale, clock = source.rescale_to(target, t)
    torch.testing.assert_close(target.nu(clock), source.nu(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(scale * source.alpha(t), target.alpha(clock), rtol=1e-12, atol=0)
    torch.testing.assert_close(scale * source.sigma(t), target.sigma(clock), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9]),
        torch.tensor([0.9, 0.9]),
        torch.tensor([0.5, 0.9]),
        torch.tensor([0.9, 0.0]),
        torch.ones(2, 2),
    ],
)
def test_tables_that_are_not_falling_inside_the_unit_interval_are_refused(table: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="alphas_cumprod"):
        DiscreteVPSchedule(table)


def _middle_times(schedule: Schedule) -> torch.Tensor:
    # The middle of each schedule in log-SNR: at the ends 1e-12 is lost to sigma or alpha near 0 in any arithmetic.
    nu = torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0], dtype=torch.float64)
    return schedule.t_of_nu(nu).reshape(-1, 1, 1, 1)


@EVERY
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_conversion_there_and_back_is_the_identity(schedule: Schedule, source: str, target: str) -> None:
    t = _middle_times(schedule)
    generator = torch.Generator().manual_seed(0)
    x, value = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    there = convert(value, x, t, source, target, schedule)
    back = convert(there, x, t, target, source, schedule)
    # Relative to the largest magnitude on the way: an eps of size 100 cannot give back an x0 to 1e-16.
    magnitude = float(torch.stack([value.abs().max(), there.abs().max(), x.abs().max()]).max())
    assert (back - value).abs().max() <= 1e-12 * magnitude


@EVERY
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_prediction_of_a_known_pair_is_its_definition(schedule: Schedule, name: str) -> None:
    t = _middle_times(schedule)
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * x0 + sigma * eps
    definition = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": schedule.dalpha(t) * x0 + schedule.dsigma(t) * eps,
        "score": -eps / sigma,
    }[name]
    torch.testing.assert_close(convert(x0, x, t, "x0", name, schedule), definition, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(convert(definition, x, t, name, "eps", schedule), eps, rtol=1e-10, atol=1e-10)


@EVERY
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
def test_loss_weight_carries_a_squared_error_to_another_prediction(
    schedule: Schedule, source: str, target: str
) -> None:
    t = _middle_times(schedule)
    generator = torch.Generator().manual_seed(2)
    x, truth, error = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    moved = convert(truth + error, x, t, source, target, schedule) - convert(truth, x, t, source, target, schedule)
    weighted = error.square() * loss_weight(source, target, t, schedule)
    torch.testing.assert_close(weighted, moved.square(), rtol=1e-8, atol=1e-10)


def test_unknown_predictions_are_refused_with_the_nearest_name() -> None:
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor(0.5)
    with pytest.raises(ConfigError, match="Did you mean `velocity`"):
        convert(x, x, t, "velocty", "x0", SCHEDULES["cosine"])
    with pytest.raises(ConfigError, match="Did you mean `eps`"):
        loss_weight("x0", "epss", t, SCHEDULES["cosine"])


def test_a_prediction_shaped_unlike_the_state_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 6, 2, 2\)"):
        convert(torch.zeros(1, 6, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor(0.5), "eps", "x0", SCHEDULES["cosine"])
