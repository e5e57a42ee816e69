"""How many encoded images L_rec needs: 5, 25 and 100 % of them, while the discriminator always sees all images.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, the ablation of the number of data-latent pairs; `data_proportion` in the official code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.theory.shapes_runs import (
    begun,
    context_of,
    continued,
    distance,
    num_scored,
    samples,
    shapes_config,
)
from pagoda.files import hash_json
from pagoda.stages.context import build_trainer, load_teacher
from pagoda.stages.distill import STAGE, build_objective, export_generator
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.objective import GeneratorBatch, GeneratorObjective
from pagoda.stages.recorded_settings import stage_settings
from pagoda.training import Losses, Objective, Runtime, StepRandom, Trainable, seeded_generator

SHARES = (0.05, 0.25, 1.0)
BASE = 8


class FewPairs(Objective[GeneratorBatch]):
    """An objective of the generator whose reconstructions come from some of the images only.

    Args:
        whole: The objective; everything but what is rebuilt is its own.
        chosen: int64 (n,), the images that have latents.
    """

    def __init__(self, whole: GeneratorObjective, chosen: Tensor) -> None:
        self.whole, self.chosen = whole, chosen

    def trainables(self) -> Mapping[str, Trainable]:
        return self.whole.trainables()

    def batch(self, indices: Tensor, random: StepRandom) -> GeneratorBatch:
        every = self.whole.batch(indices, random)
        some = self.whole.batch(self.chosen[indices % len(self.chosen)], random)
        return dataclasses.replace(
            every, inputs=some.inputs, targets=some.targets, target_condition=some.target_condition
        )

    def losses(self, name: str, batch: GeneratorBatch, random: StepRandom, runtime: Runtime) -> Losses | None:
        return self.whole.losses(name, batch, random, runtime)

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        return self.whole.preview(averaged)


def _distilled(share: float, budget: float, seed: int) -> dict[str, float]:
    config = shapes_config(
        seed,
        base=BASE,
        size=BASE,
        budget=budget,
        distill__mode="rec",
        distill__loss__adversarial=0.1,
        distill__matching__weight=0.0,  # the losses of the paper alone
    )
    with continued(begun(config, "encode")) as path:
        context = context_of(path, config)
        denoiser, _ = load_teacher(context.run.teacher)
        whole = build_objective(context, denoiser, LatentInputs(open_latents(context)), None)
        count = max(1, round(share * len(context.data)))
        chosen = torch.randperm(len(context.data), generator=seeded_generator("pairs", seed))[:count]
        settings = {**stage_settings(config, STAGE), "share": share}
        context.run.begin(STAGE, settings, {"data": context.data.fingerprint})
        loop = config.distill.loop
        trainer = build_trainer(context, STAGE, FewPairs(whole, chosen), loop, hash_json(settings))
        export_generator(context, STAGE, trainer.run()["generator"], BASE, trainer)
        made = samples(context.run, BASE, num_scored(budget))
    return {**distance(made, seed), "pairs": float(count)}


def over_all(share: float) -> object:
    """Median distance at this share over that with all pairs."""
    return lambda r: r.median(f"{share:.0%}", "distance") / r.median("100%", "distance")


@benchmark(
    "theory.pair_fraction",
    question=(
        "How many of the images need a latent? L_rec sees 5, 25 or 100 % of them, the discriminator all; drawn shapes at 8 px."
    ),
    passes=[
        PassLine("a quarter of the pairs: at most 1.25 x the distance of all", over_all(0.25), at_most=1.25),  # type: ignore[arg-type]
        PassLine("a twentieth: at most 2 x", over_all(0.05), at_most=2.0),  # type: ignore[arg-type]
    ],
)
def pair_fraction(budget: float) -> dict[str, Arm]:
    """One arm a share."""
    return {f"{share:.0%}": partial(_distilled, share, budget) for share in SHARES}
