"""Stage 1, `teach`: a diffusion model of the down-sampled images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pagoda.data import CodedDataset, Downsampler
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.errors import ConfigError, DataError
from pagoda.networks import DiffusersNetwork, build_backbone
from pagoda.pretraining import build_techniques, corrupt_labels
from pagoda.stages.config import to_dict
from pagoda.stages.context import StageContext, build_trainer, save_teacher
from pagoda.stages.preparation import Preparation
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.watching import build_evaluation
from pagoda.training import Setup, Trainable, derive_seed
from pagoda.training.denoising import DenoisingObjective
from pagoda.training.technique import network_of

STAGE = "teach"


def teach(context: StageContext) -> None:
    """Train the teacher and write it to `teacher/`; continues where it stopped, does nothing when done.

    Raises:
        ArtifactError: the folder's teacher was started with another configuration.
        TrainingError: the training is no longer healthy.
    """
    preparation = Preparation()
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    inputs = {"data": data.fingerprint}
    if context.captions is not None:
        inputs["captions"] = context.captions.fingerprint
    fingerprint = run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("teach: done already")
        return
    denoiser, objective = build_objective(context)
    evaluation = build_evaluation(context, config.base, denoiser)
    trainer = build_trainer(context, STAGE, objective, config.teach.loop, fingerprint, evaluation)
    preparation.end(context, STAGE)
    averaged = network_of(trainer.run()["teacher"])  # without what techniques trained beside it
    if runtime.is_main:
        facts: dict[str, object] = {
            "image_size": config.base,
            "channels": data.channels,
            "num_classes": context.num_classes,
            "class_names": data.class_names if context.captions is None else None,
            "sigma_max": config.sigma_max,
            "downsampler": Downsampler(config.downsampler).fingerprint,
            "data": data.fingerprint,
            "knows_null": config.teach.condition_dropout > 0,
        }
        if isinstance(data, CodedDataset):
            facts["codec"] = data.codec.fingerprint
        if context.captions is not None:
            facts["text_encoder"] = context.captions.encoder
        if config.techniques:
            facts["techniques"] = to_dict(config)["techniques"]
        with run.artifact(run.teacher) as folder:
            digest = save_teacher(folder, denoiser, averaged, facts)
        run.finish(STAGE, {"hash": digest, "seconds": trainer.seconds, "steps": trainer.step})
    runtime.barrier()


def build_objective(context: StageContext) -> tuple[EDMDenoiser, DenoisingObjective]:
    """What the stage trains: a fresh network, and the objective with the run's techniques, which have prepared."""
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    torch.manual_seed(derive_seed(config.seed, STAGE, "init"))
    table = context.captions
    model = build_backbone(
        config.backbone,
        image_size=config.base,
        in_channels=data.channels,
        num_classes=context.num_classes,
        token_dim=0 if table is None else table.token_dim,
        pooled_dim=0 if table is None else table.pooled_dim,
    )
    network = DiffusersNetwork(model).to(runtime.device)
    load, noise_law = training_loader(context), config.teach.noise
    techniques = build_techniques(config.techniques)
    sigma_data = measure_std(context) if config.sigma_data is None else config.sigma_data
    setup = Setup(
        image_size=config.base,
        channels=data.channels,
        num_classes=context.num_classes,
        steps=config.teach.loop.steps,
        seed=config.seed,
        noise=noise_law,
        noise_scale=config.noise_scale,
        sigma_data=sigma_data,
        count=len(data),
        load=load,
        mirror=config.mirror,
        runtime=runtime,
        folder=run.work(STAGE) / "techniques",
    )
    network = techniques.prepare(network, setup)
    denoiser = EDMDenoiser(network, sigma_data=sigma_data, noise_scale=config.noise_scale)
    noise, condition = context.preview_inputs()
    return denoiser, DenoisingObjective(
        denoiser,
        Trainable(techniques.together(network), config.teach.optimizer, config.teach.ema),
        load,
        noise=noise_law,
        condition_dropout=config.teach.condition_dropout,
        mirror=config.mirror,
        weighting=config.teach.weighting,
        preview_noise=noise,
        preview_condition=condition,
        techniques=techniques,
    )


def training_loader(context: StageContext) -> Callable[[Tensor, Tensor], tuple[Tensor, Condition]]:
    """Images of base size and what they are trained with: their own labels, apart from `teach.wrong_labels` of them.

    Raises:
        ConfigError: wrong labels are asked for and there are no labels.
    """
    config, data = context.config, context.data
    if not config.teach.wrong_labels:
        return context.loader(config.base)
    own = None if context.captions is not None else data.labels(torch.arange(len(data)))
    if own is None:
        raise ConfigError("teach.wrong_labels needs labels, and this run has none; leave it at 0.")
    labels, _ = corrupt_labels(own, config.teach.wrong_labels, seed=config.seed)

    def load(indices: Tensor, flips: Tensor) -> tuple[Tensor, Condition]:
        return data.images(indices, config.base, flips), Condition.of_labels(labels[indices])

    return load


def measure_std(context: StageContext) -> float:
    """Standard deviation of the pixels of up to 4,096 images of base size, to two digits (about 0.5 for photographs).

    Raises:
        DataError: all images are one flat colour.
    """
    data = context.data
    indices = torch.linspace(0, len(data) - 1, min(4096, len(data))).long()
    std = round(float(data.images(indices, context.config.base).std()), 2)
    if std == 0:
        raise DataError(f"all images of {context.config.data} are one flat colour; there is nothing to learn.")
    return std
