"""Diffusion mathematics: schedules, denoisers, conditions, solvers, guidance, oracles. No files, no devices, no loops over data."""

from pagoda.diffusion.conditions import NULL_LABEL, UNCONDITIONAL, Condition
from pagoda.diffusion.denoiser import (
    Denoiser,
    EDMDenoiser,
    Network,
    PreconditionedDenoiser,
    ScheduledDenoiser,
    per_sample,
    precondition,
)
from pagoda.diffusion.fixed_point import FixedPoint
from pagoda.diffusion.guidance import GuidedDenoiser
from pagoda.diffusion.listening import RunListener, RunStart, listeners_of, listening
from pagoda.diffusion.mixing import spherical_mixture
from pagoda.diffusion.oracles import GaussianDenoiser, GaussianMixtureDenoiser
from pagoda.diffusion.predictions import convert, loss_weight
from pagoda.diffusion.scheduler_configs import schedule_from_scheduler
from pagoda.diffusion.schedules import (
    CosineVPSchedule,
    DiscreteVPSchedule,
    EDMSchedule,
    FlowMatchingSchedule,
    LinearVPSchedule,
    Schedule,
    VESchedule,
)
from pagoda.diffusion.solvers import (
    DPMSolver2M,
    Euler,
    Heun,
    Solver,
    Step,
    build_solver,
    invert,
    karras_sigmas,
    log_sigmas,
    sample,
    solve,
    suitable_sigmas,
)

__all__ = [
    "NULL_LABEL",
    "UNCONDITIONAL",
    "Condition",
    "CosineVPSchedule",
    "DPMSolver2M",
    "Denoiser",
    "DiscreteVPSchedule",
    "EDMDenoiser",
    "EDMSchedule",
    "Euler",
    "FixedPoint",
    "FlowMatchingSchedule",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "Heun",
    "LinearVPSchedule",
    "Network",
    "PreconditionedDenoiser",
    "RunListener",
    "RunStart",
    "Schedule",
    "ScheduledDenoiser",
    "Solver",
    "Step",
    "VESchedule",
    "build_solver",
    "convert",
    "invert",
    "karras_sigmas",
    "listeners_of",
    "listening",
    "log_sigmas",
    "loss_weight",
    "per_sample",
    "precondition",
    "sample",
    "schedule_from_scheduler",
    "solve",
    "spherical_mixture",
    "suitable_sigmas",
]
