"""A distillation that is run by hand: the objective and the trainer of the stage, stopped where a test wants it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pagoda.stages.context import StageContext, load_teacher
from pagoda.stages.critics import keep_critics
from pagoda.stages.distill import build_objective
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.objective import GeneratorObjective
from pagoda.training import Trainer


class StoppedError(Exception):
    """As if the machine had gone down."""


def objective_of(context: StageContext) -> GeneratorObjective:
    denoiser, _ = load_teacher(context.run.teacher)
    objective = build_objective(context, denoiser, LatentInputs(open_latents(context)), None)
    keep_critics(context, "distill", objective.critics)
    return objective


def trainer_of(
    context: StageContext, folder: Path, *, stop: int | None = None, objective: GeneratorObjective | None = None
) -> Trainer:
    """Args: stop: the step whose batch is never made. objective: what is trained; that of the context when None."""
    order = context.order("distill")

    def until(step: int, size: int) -> Tensor:
        if step == stop:
            raise StoppedError
        return order(step, size)

    return Trainer(
        objective or objective_of(context),
        context.config.distill.loop,
        runtime=context.runtime,
        folder=folder,
        stage="distill",
        seed=0,
        order=until,
    )
