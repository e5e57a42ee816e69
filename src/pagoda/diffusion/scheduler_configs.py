"""The schedule and the prediction that a scheduler of diffusers is configured for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pagoda.diffusion.schedules import DiscreteVPSchedule, EDMSchedule, FlowMatchingSchedule, Schedule
from pagoda.errors import ConfigError, did_you_mean

DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
"""diffusers' names for what a network predicts. Its `v_prediction` is Salimans-Ho's v; `flow_prediction` is the velocity."""

PLAIN_SETTINGS = {"invert_sigmas": False, "timestep_type": "discrete", "snr_shift_scale": 1.0}
"""Settings of some of diffusers' schedulers that change what the network's time means, each with the value that changes nothing."""
READ_SETTINGS = (
    "_class_name",
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    *PLAIN_SETTINGS,
)
"""What `schedule_from_scheduler` looks at; the other settings of a scheduler say how to sample."""


def schedule_from_scheduler(config: dict[str, Any]) -> tuple[Schedule, str]:
    """Read the schedule and the prediction type out of a diffusers scheduler's configuration.

    Args:
        config: `dict(scheduler.config)`; must name its class in `_class_name`.

    Returns:
        The schedule and one of "eps", "x0", "v", "velocity"; ("EDMSchedule", "edm") for EDM-preconditioned schedulers.

    Raises:
        ConfigError: the class or its prediction type is unknown, or it asks for zero terminal SNR.
    """
    name = str(config.get("_class_name", "")).removeprefix("Flax")
    for key, plain in PLAIN_SETTINGS.items():
        if config.get(key, plain) not in (plain, None):
            raise ConfigError(f"{name} with {key}={config[key]!r} is not supported; {plain!r} is.")
    if config.get("use_flow_sigmas") and config.get("prediction_type") != "flow_prediction":
        raise ConfigError(
            f"{name} with use_flow_sigmas=True and prediction_type={config.get('prediction_type')!r} is not supported; "
            "'flow_prediction' is."
        )
    # The multistep solvers of diffusers read `flow_prediction` as alpha = 1 - sigma, whatever their betas say.
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        return FlowMatchingSchedule(time_scale=float(config.get("num_train_timesteps", 1000))), "velocity"
    if name.startswith("EDM"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise ConfigError(
                f"{name} with prediction_type={config['prediction_type']!r} is not supported; use 'epsilon'."
            )
        return EDMSchedule(t_min=float(config["sigma_min"]), t_max=float(config["sigma_max"])), "edm"
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in DIFFUSERS_PREDICTIONS:
        raise ConfigError(
            f"unknown prediction_type {prediction!r}. {did_you_mean(str(prediction), DIFFUSERS_PREDICTIONS)}"
        )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ConfigError(f"the scheduler {name or '(without _class_name)'} has no beta_schedule; it cannot be read.")
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "rescale_betas_zero_snr=True: the last step holds no signal and has no canonical form. Write the scheduler again without that "
            "step: in diffusers `type(s)(trained_betas=s.betas[:-1].tolist(), prediction_type=s.config.prediction_type, "
            "num_train_timesteps=len(s.betas) - 1)`, s being the one that is here."
        )
    return DiscreteVPSchedule(torch.cumprod(1 - _betas(config), 0)), DIFFUSERS_PREDICTIONS[prediction]


def _betas(config: dict[str, Any]) -> Tensor:
    """The table of betas that a diffusers configuration describes, (T,) float64."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config["beta_schedule"]
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    if kind == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, eq. 17, with the betas capped at 0.999.
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    if kind == "laplace":
        from diffusers import DDPMScheduler  # whose own formula it is; not needed elsewhere in this room

        scheduler: Any = DDPMScheduler(num_train_timesteps=steps, beta_schedule="laplace")
        betas: Tensor = scheduler.betas
        return betas.double()
    known = ["laplace", "linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"]
    raise ConfigError(f"unknown beta_schedule {kind!r}. {did_you_mean(str(kind), known)}")
