"""Stage 2, `distill`: the teacher's copy becomes a one-step generator of base size."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.files import hash_json
from pagoda.networks import (
    DiffusersNetwork,
    Discriminator,
    OneStepGenerator,
    TeacherFeatures,
    model_hash,
)
from pagoda.stages.config import LossConfig
from pagoda.stages.context import StageContext, build_trainer, load_teacher
from pagoda.stages.image_text import ImageTextTerm, open_image_text
from pagoda.stages.objective import GeneratorBatch, GeneratorInputs, GeneratorObjective
from pagoda.stages.run_folder import stage_settings
from pagoda.stages.teacher_pairs import STAGE, TeacherPairs, make_teacher_pairs
from pagoda.stages.watching import build_evaluation
from pagoda.training import StepRandom, Trainer, derive_seed

__all__ = ["STAGE", "LatentInputs", "build_critics", "build_objective", "distill", "export_generator", "open_latents"]


class LatentInputs(GeneratorInputs):
    """The generator runs from its latent: encoded ones from the store, fresh noise for the prior."""

    def __init__(self, store: LatentStore) -> None:
        self.store = store

    def encoded(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, ...]:
        return (self.store.get(indices, flips.long()),)

    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        return (random.normal("prior", *self.store.shape),), condition

    def generate(self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition) -> Tensor:
        return generator(inputs[0], condition)


def build_critics(
    context: StageContext, loss: LossConfig, size: int, seed_name: str, denoiser: EDMDenoiser | None = None
) -> tuple[Discriminator | None, TeacherFeatures | None]:
    """A fresh discriminator for images of `size` and the feature stack of the distance, as far as the weights ask for them.

    Both read the teacher's own encoder: no outside weights, any domain. `denoiser` is the teacher; None loads the run's.
    """
    if loss.adversarial == 0 and loss.feature == 0:
        return None, None
    if denoiser is None:
        denoiser, _ = load_teacher(context.run.teacher)
    assert isinstance(denoiser.network, DiffusersNetwork)
    features = TeacherFeatures(
        denoiser.network.model, sigma_data=denoiser.sigma_data, noise_scale=denoiser.noise_scale
    ).to(context.runtime.device)
    discriminator = None
    if loss.adversarial > 0:
        torch.manual_seed(derive_seed(context.config.seed, seed_name, "discriminator"))
        discriminator = Discriminator.for_stack(
            features,
            image_size=loss.crop or size,
            num_classes=context.num_classes,
            raw_pixels=loss.raw_pixels,
            pooled_dim=0 if context.captions is None else context.captions.pooled_dim,
            tokens=loss.heads == "tokens",
        ).to(context.runtime.device)
    return discriminator, features if loss.feature > 0 else None


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


def build_objective(
    context: StageContext,
    denoiser: EDMDenoiser,
    inputs: GeneratorInputs,
    pairs: TeacherPairs | None,
    image_text: ImageTextTerm | None = None,
) -> GeneratorObjective:
    """What the stage trains: a copy of the teacher, and what judges it.

    Args:
        denoiser: The teacher.
        inputs: Where the generator's inputs come from.
        pairs: What the teacher made of fresh noise; None where the mode is `rec`.
        image_text: The distance of samples to their captions; None leaves it out.
    """
    config, runtime = context.config, context.runtime
    assert isinstance(denoiser.network, DiffusersNetwork)
    generator = OneStepGenerator.from_teacher(
        denoiser.network,
        output=config.distill.output,  # type: ignore[arg-type]
        sigma_max=config.sigma_max,
        sigma_data=denoiser.sigma_data,
        noise_scale=denoiser.noise_scale,
    ).to(runtime.device)
    generator.requires_grad_(True).train()
    discriminator, features = build_critics(context, config.distill.loss, config.base, STAGE, denoiser)
    return GeneratorObjective(
        generator,
        discriminator,
        features,
        inputs,
        load=context.loader(config.base),
        config=config.distill.loss,
        steps=config.distill.loop.steps,
        mirror=config.mirror,
        optimizers=(config.distill.optimizer, config.distill.discriminator),
        ema=config.distill.ema,
        preview=context.preview_inputs(),
        teacher_pairs=pairs,
        pair_share=1.0 if config.distill.mode == "dstl" else config.distill.teacher_pairs.share,
        image_text=image_text,
    )


def distill(context: StageContext) -> None:
    """Train the generator of base size and write it to `generator-<base>/`; continues where it stopped.

    Raises:
        ArtifactError: the folder's generator was started with another configuration, or latents do not fit.
        TrainingError: the training is no longer healthy.
    """
    run, config, runtime = context.run, context.config, context.runtime
    store = open_latents(context)
    denoiser, facts = load_teacher(run.teacher)
    inputs = {
        "data": context.data.fingerprint,
        "teacher": str(facts["hash"]),
        "latents": hash_json(store.provenance),
    }
    image_text = open_image_text(context, config.distill.loss)
    if image_text is not None:
        inputs["image_text"] = image_text.encoder.fingerprint
    fingerprint = run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("distill: done already")
        return
    pairs = None if config.distill.mode == "rec" else make_teacher_pairs(context)
    objective = build_objective(context, denoiser, LatentInputs(store), pairs, image_text)
    evaluation = build_evaluation(context, config.base)
    trainer = build_trainer(context, STAGE, objective, config.distill.loop, fingerprint, evaluation)
    averaged = trainer.run()["generator"]
    export_generator(context, STAGE, averaged, config.base, trainer)


def export_generator(
    context: StageContext, stage: str, generator: torch.nn.Module, size: int, trainer: Trainer[GeneratorBatch]
) -> None:
    """Write the averaged generator and mark its stage done."""
    assert isinstance(generator, OneStepGenerator)
    if context.runtime.is_main:
        with context.run.artifact(context.run.generator(size)) as folder:
            generator.save_pretrained(folder)
        results = {"hash": model_hash(generator), "seconds": trainer.seconds, "steps": trainer.step}
        context.run.finish(stage, results)
    context.runtime.barrier()
