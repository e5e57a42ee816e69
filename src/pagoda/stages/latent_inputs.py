"""The generator's inputs where they come from the store of latents, and from unit noise for the prior."""

from __future__ import annotations

from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.networks import OneStepGenerator
from pagoda.stages.context import StageContext, load_teacher
from pagoda.stages.objective import GeneratorInputs
from pagoda.training import StepRandom


class LatentInputs(GeneratorInputs):
    """The generator runs from its latent: encoded ones from the store, fresh noise for the prior."""

    def __init__(self, store: LatentStore) -> None:
        self.store = store

    def encoded(self, indices: Tensor, flips: Tensor, random: StepRandom) -> tuple[Tensor, ...]:
        return (self.store.get(indices, flips.long()),)

    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        return (random.normal("prior", *self.store.shape),), condition

    def generate_levels(
        self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition
    ) -> dict[int, Tensor]:
        return generator(inputs[0], condition, return_all=True)


def open_latents(context: StageContext) -> LatentStore:
    """The run's latents, checked against its teacher.

    Raises:
        ArtifactError: not finished, of another teacher, or with moments that are off.
    """
    run = context.run
    run.require("encode", f"pagoda encode {run.path}")
    _, facts = load_teacher(run.teacher)
    store = LatentStore.open(run.latents, expect={"teacher": facts["hash"], "sigma_max": context.config.sigma_max})
    store.check_moments()
    return store
