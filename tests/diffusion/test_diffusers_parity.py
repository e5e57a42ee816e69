"""Our schedules, denoisers and solvers against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from pagoda.diffusion import (
    Condition,
    DiscreteVPSchedule,
    DPMSolver2M,
    EDMDenoiser,
    EDMSchedule,
    FlowMatchingSchedule,
    ScheduledDenoiser,
    schedule_from_scheduler,
    solve,
)
from pagoda.errors import ConfigError

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
GENERATOR_SEED = 0


def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """A fixed smooth function of the state and the time, standing in for a network."""
    t = t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000
    return torch.tanh(1.3 * x.flip(-1) + 0.5 * x.roll(1, dims=1) + t) + 0.2 * t


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(GENERATOR_SEED), dtype=dtype)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_table_and_prediction_are_read_from_the_scheduler(scheduler_class: Any, betas: str, prediction: str) -> None:
    scheduler = scheduler_class(beta_schedule=betas, prediction_type=prediction)
    schedule, ours = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": scheduler_class.__name__})
    assert isinstance(schedule, DiscreteVPSchedule)
    assert ours == PREDICTIONS[prediction]
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6
    )  # diffusers' product runs in float32


def test_the_sigmoid_table_is_read_from_the_one_scheduler_that_has_it() -> None:
    scheduler = DDPMScheduler(beta_schedule="sigmoid")
    schedule, _ = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": "DDPMScheduler"})
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)


def test_trained_betas_are_read_from_the_scheduler() -> None:
    scheduler = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3])
    schedule, _ = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": "DDPMScheduler"})
    torch.testing.assert_close(schedule.alpha(torch.arange(3.0)) ** 2, scheduler.alphas_cumprod.double())


def test_flow_matching_scheduler_is_read_as_rectified_flow() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    schedule, prediction = schedule_from_scheduler(
        dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    )
    assert isinstance(schedule, FlowMatchingSchedule)
    assert prediction == "velocity"
    # The network sees diffusers' timestep of each of diffusers' own sigmas, shifted or not.
    scheduler.set_timesteps(7)
    sigma = scheduler.sigmas[:-1].double()
    torch.testing.assert_close(schedule.network_time(sigma).float(), scheduler.timesteps)


def test_one_flow_matching_step_to_zero_gives_the_estimate_of_the_denoiser() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule, prediction = schedule_from_scheduler(
        dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    )
    scheduler.set_timesteps(sigmas=[0.7])
    x_t, t = noise(2, 3, 4, 4), scheduler.timesteps[0]
    output = network(x_t, t, Condition())
    expected = scheduler.step(output, t, x_t).prev_sample  # a step to sigma = 0 lands on x0
    ours = ScheduledDenoiser(network, schedule, prediction)(x_t / 0.3, 0.7 / 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_multistep_solver_with_flow_prediction_is_read_as_rectified_flow() -> None:
    # Such a configuration also lists betas; its steps do not use them.
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    schedule, prediction = schedule_from_scheduler(
        dict(scheduler.config) | {"_class_name": "DPMSolverMultistepScheduler"}
    )
    assert isinstance(schedule, FlowMatchingSchedule)
    assert prediction == "velocity"


def test_edm_scheduler_is_read_with_its_range_and_preconditioning() -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.5)
    schedule, prediction = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": "EDMEulerScheduler"})
    assert (schedule, prediction) == (EDMSchedule(t_min=0.01, t_max=50.0), "edm")
    # And the preconditioning is the one that EDMDenoiser applies, with c_noise = ln(sigma) / 4.
    scheduler.set_timesteps(5)
    x, sigma = noise(2, 3, 4, 4) * 50, scheduler.sigmas[0]
    c_noise = scheduler.precondition_noise(sigma)
    output = network(scheduler.precondition_inputs(x, sigma), c_noise, Condition())
    expected = scheduler.precondition_outputs(x, output, sigma)
    ours = EDMDenoiser(network, sigma_data=0.5, noise_scale=0.25)(x, float(sigma))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "epsilom"}, "Did you mean `epsilon`"),
        ({"beta_schedule": "scaled_liner"}, "Did you mean `scaled_linear`"),
        ({"rescale_betas_zero_snr": True}, "no signal"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_configurations_that_cannot_be_read_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "sigma_min": 0.1, "sigma_max": 1.0}
    with pytest.raises(ConfigError, match=message):
        schedule_from_scheduler(config | change)


def test_a_scheduler_without_betas_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="KarrasVeScheduler"):
        schedule_from_scheduler({"_class_name": "KarrasVeScheduler"})


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", [1, 250, 700])
def test_estimate_equals_the_scheduler_s_predicted_original_sample(betas: str, prediction: str, step: int) -> None:
    scheduler = DDIMScheduler(beta_schedule=betas, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    schedule, ours = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": "DDIMScheduler"})
    x_t = noise(2, 3, 4, 4)
    output = network(x_t, torch.tensor(float(step)), Condition())
    expected = scheduler.step(output, step, x_t).pred_original_sample
    t = torch.tensor(float(step), dtype=torch.float64)
    canonical = (x_t.double() / schedule.alpha(t)).float()
    estimate = ScheduledDenoiser(network, schedule, ours)(canonical, float(schedule.nu(t)))
    # Float32 on both sides, relative to the size of the values: dividing by a small alpha enlarges x0.
    assert (estimate - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_dpm_solver_runs_like_the_scheduler_of_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(20)
    schedule, prediction = schedule_from_scheduler(
        dict(scheduler.config) | {"_class_name": "DPMSolverMultistepScheduler"}
    )
    sigmas = scheduler.sigmas.double()
    denoiser = ScheduledDenoiser(network, schedule, prediction)
    alpha = schedule.alpha(schedule.t_of_nu(sigmas[0]))
    start = noise(2, 3, 4, 4, dtype=torch.float64)
    ours = solve(denoiser, start / alpha, sigmas, solver=DPMSolver2M())
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, Condition()), t, x).prev_sample
    torch.testing.assert_close(ours, x.double(), rtol=1e-4, atol=1e-4)  # float32 tables, 20 steps
