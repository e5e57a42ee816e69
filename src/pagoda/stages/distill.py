"""Stage 2, `distill`: the teacher's copy becomes a one-step generator of base size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pagoda.diffusion import EDMDenoiser, PreconditionedDenoiser
from pagoda.files import hash_json
from pagoda.networks import DiffusersNetwork, OneStepGenerator, model_hash
from pagoda.networks.extended import merge_switch_masks
from pagoda.stages.agreement import agreement_encoder, agreement_weights
from pagoda.stages.amortise import STAGE as AMORTISE
from pagoda.stages.amortise import AmortisedInputs, load_encoder
from pagoda.stages.assignment import ImageGuidance, check_match, guided_inputs
from pagoda.stages.context import StageContext, build_trainer, load_teacher
from pagoda.stages.critics import build_critics, keep_critics
from pagoda.stages.image_shares import rebuilt_images
from pagoda.stages.image_text import ImageTextTerm, open_image_text
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.matching import DistributionMatching
from pagoda.stages.objective import GeneratorBatch, GeneratorInputs, GeneratorObjective
from pagoda.stages.preparation import Preparation
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.teach import measure_std
from pagoda.stages.teacher_pairs import STAGE, TeacherPairs, make_teacher_pairs
from pagoda.stages.watching import build_evaluation
from pagoda.text import ImageTextEncoder
from pagoda.training import Trainer, derive_seed

__all__ = ["STAGE", "build_objective", "distill", "export_generator"]


def build_objective(
    context: StageContext,
    denoiser: PreconditionedDenoiser,
    inputs: GeneratorInputs,
    pairs: TeacherPairs | None,
    image_text: ImageTextTerm | None = None,
) -> GeneratorObjective:
    """What the stage trains: a copy of the teacher, and what judges it.

    Args:
        denoiser: The teacher.
        inputs: Where the generator's inputs come from.
        pairs: What the teacher made of fresh noise; None where neither the mode nor the assignment of guidance asks for it.
        image_text: The distance of samples to their captions; None leaves it out.
    """
    config, runtime = context.config, context.runtime
    largest = config.guidance.scale_max if config.guidance.active else None
    if largest is not None:
        torch.manual_seed(derive_seed(config.seed, STAGE, "guidance"))
    generator = OneStepGenerator.from_teacher(
        student_network(denoiser, config.sigma_max),
        output=config.distill.output,  # type: ignore[arg-type]
        sigma_max=config.sigma_max,
        **denoiser.preconditioning,
        guidance_max=largest,
        reads_texts=context.captions is not None,
    ).to(runtime.device)
    generator.use_codec(context.codec)
    generator.requires_grad_(True).train()
    critics = build_critics(context, config.distill.loss, config.base, STAGE, denoiser)
    matching = None
    if config.distill.matching.weight > 0:
        std = denoiser.sigma_data if isinstance(denoiser, EDMDenoiser) else measure_std(context)
        denoiser.to(runtime.device)
        torch.manual_seed(derive_seed(config.seed, STAGE, "matching"))
        matching = DistributionMatching(denoiser, config.distill.matching, config.distill.loop.steps, std, largest)
    return GeneratorObjective(
        generator,
        critics.discriminator,
        critics.features,
        inputs,
        load=context.loader(config.base),
        config=config.distill.loss,
        steps=config.distill.loop.steps,
        mirror=config.mirror,
        optimizers=(config.distill.optimizer, config.distill.discriminator),
        ema=config.distill.ema,
        preview=context.preview_inputs(),
        teacher_pairs=None if config.distill.mode == "rec" else pairs,
        pair_share=1.0 if config.distill.mode == "dstl" else config.distill.teacher_pairs.share,
        lpips=critics.lpips,
        second=critics.reconstruction,
        kept=rebuilt_images(context, config.distill.loss.pairs),
        image_text=image_text,
        matching=matching,
    )


def student_network(denoiser: PreconditionedDenoiser, sigma_max: float) -> DiffusersNetwork:
    """What the generator starts as: the teacher's network; where noise levels choose its experts, those of the only level that a
    generator sees are merged into one layer, which is the same function there (Switch-DiT, arXiv:2403.09176)."""
    network = denoiser.network
    assert isinstance(network, DiffusersNetwork)
    if "switch_masks" not in getattr(network.model, "added", {}):
        return network
    time = float(denoiser.noise_input(torch.tensor([sigma_max])))
    return DiffusersNetwork(merge_switch_masks(network.model, time), null=network.null)


def distill(
    context: StageContext, *, match: ImageGuidance | None = None, image_text: ImageTextEncoder | None = None
) -> None:
    """Train the generator of base size and write it to `generator-<base>/`; continues where it stopped.

    Args:
        match: For the assignment `matched` of guidance: the weight that an image looks like; in a run of texts its agreement with its
            caption tells it when None.
        image_text: For the loss's term of that name: an encoder of your own; None opens the one that the configuration names.

    Raises:
        ConfigError: `match` is missing, or given for nothing, as may be `image_text`.
        ArtifactError: the folder's generator was started with another configuration, or latents do not fit.
        TrainingError: the training is no longer healthy.
    """
    preparation = Preparation()
    run, config, runtime = context.run, context.config, context.runtime
    check_match(config, match)
    store = open_latents(context)
    denoiser, facts = load_teacher(run.teacher)
    inputs = {
        "data": context.data.fingerprint,
        "teacher": str(facts["hash"]),
        "latents": hash_json(store.provenance),
        **({} if match is None else {"match": match.fingerprint}),
    }
    latents = LatentInputs(store)
    if config.distill.latents == "amortised":
        inputs["encoder"] = str(run.require(AMORTISE, f"pagoda amortise {run.path}")["results"]["hash"])
        latents = AmortisedInputs(context, store, load_encoder(run, device=runtime.device))
    term = open_image_text(context, config.distill.loss, image_text)
    if term is not None:
        inputs["image_text"] = term.encoder.fingerprint
    encoder = agreement_encoder(context, match)
    if encoder is not None:
        inputs["match"] = encoder.fingerprint
    fingerprint = run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("distill: done already")
        return
    with preparation.apart():
        pairs = make_teacher_pairs(context) if config.makes_pairs else None
    agreement = None if encoder is None else agreement_weights(context, encoder)
    if agreement is not None:
        context.say(f"distill: the teacher's images agree with their captions by {agreement.describe()}")
    sources = guided_inputs(config, latents, store, pairs, match or agreement)
    objective = build_objective(context, denoiser, sources, pairs, term)
    keep_critics(context, STAGE, objective.critics)
    evaluation = build_evaluation(context, config.base)
    trainer = build_trainer(context, STAGE, objective, config.distill.loop, fingerprint, evaluation)
    preparation.end(context, STAGE)
    averaged = trainer.run()["generator"]
    export_generator(context, STAGE, averaged, config.base, trainer)


def export_generator(
    context: StageContext,
    stage: str,
    generator: nn.Module,
    size: int,
    trainer: Trainer[GeneratorBatch],
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write the averaged generator and mark its stage done, with what else is `told` of it."""
    assert isinstance(generator, OneStepGenerator)
    if context.runtime.is_main:
        with context.run.artifact(context.run.generator(size)) as folder:
            generator.save_pretrained(folder)
        results = {"hash": model_hash(generator), "seconds": trainer.seconds, "steps": trainer.step, **(told or {})}
        context.run.finish(stage, results)
    context.runtime.barrier()
