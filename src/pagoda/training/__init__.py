"""Training: one loop for every objective, with averages of the weights, checkpoints, health guards and tracking."""

from pagoda.training.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from pagoda.training.health import HealthGuard, HealthWarning, win_rate
from pagoda.training.loop import LoopConfig, Trainer, micro_batches
from pagoda.training.memory import PeakMemory, peak_memory_mib, resident_bytes
from pagoda.training.noise import NoiseLaw
from pagoda.training.objective import Losses, Objective, Trainable
from pagoda.training.optim import EMA, OptimizerConfig
from pagoda.training.probing import StepCost, measure_step
from pagoda.training.randomness import StepRandom, derive_seed, noise_of_seeds, seeded_generator
from pagoda.training.runtime import Runtime, resolve_precision, single_process
from pagoda.training.schedule import ScheduledEvaluation
from pagoda.training.technique import NoisyInputs, Penalty, Setup, Technique, Techniques, TechniqueStep
from pagoda.training.tracking import MetricLog, StatusLine, clock

__all__ = [
    "EMA",
    "HealthGuard",
    "HealthWarning",
    "LoopConfig",
    "Losses",
    "MetricLog",
    "NoiseLaw",
    "NoisyInputs",
    "Objective",
    "OptimizerConfig",
    "PeakMemory",
    "Penalty",
    "Runtime",
    "ScheduledEvaluation",
    "Setup",
    "StatusLine",
    "StepCost",
    "StepRandom",
    "Technique",
    "TechniqueStep",
    "Techniques",
    "TrainState",
    "Trainable",
    "Trainer",
    "clock",
    "derive_seed",
    "list_checkpoints",
    "load_checkpoint",
    "measure_step",
    "micro_batches",
    "noise_of_seeds",
    "peak_memory_mib",
    "resident_bytes",
    "resolve_precision",
    "save_checkpoint",
    "seeded_generator",
    "single_process",
    "win_rate",
]
