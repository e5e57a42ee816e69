"""Stage 1, `teach`: a diffusion model of the down-sampled images."""

from __future__ import annotations

import torch

from pagoda.data import Downsampler
from pagoda.diffusion import EDMDenoiser
from pagoda.errors import DataError
from pagoda.networks import DiffusersNetwork, build_backbone
from pagoda.stages.context import StageContext, build_trainer, save_teacher
from pagoda.stages.run_folder import stage_settings
from pagoda.training import Trainable, derive_seed
from pagoda.training.denoising import DenoisingObjective

STAGE = "teach"


def teach(context: StageContext) -> None:
    """Train the teacher and write it to `teacher/`; continues where it stopped, does nothing when done.

    Raises:
        ArtifactError: the folder's teacher was started with another configuration.
        TrainingError: the training is no longer healthy.
    """
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    inputs = {"data": data.fingerprint}
    fingerprint = run.begin(STAGE, stage_settings(config, STAGE), inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("teach: done already")
        return
    torch.manual_seed(derive_seed(config.seed, STAGE, "init"))
    model = build_backbone(
        config.backbone, image_size=config.base, in_channels=data.channels, num_classes=data.num_classes
    )
    network = DiffusersNetwork(model).to(runtime.device)
    denoiser = EDMDenoiser(
        network, sigma_data=config.sigma_data or measure_std(context), noise_scale=config.noise_scale
    )
    noise, condition = context.preview_inputs()
    objective = DenoisingObjective(
        denoiser,
        Trainable(network, config.teach.optimizer, config.teach.ema),
        context.loader(config.base),
        noise=config.teach.noise,
        condition_dropout=config.teach.condition_dropout,
        mirror=config.mirror,
        preview_noise=noise,
        preview_condition=condition,
    )
    trainer = build_trainer(context, STAGE, objective, config.teach.loop, fingerprint)
    averaged = trainer.run()["teacher"]
    assert isinstance(averaged, DiffusersNetwork)
    if runtime.is_main:
        facts: dict[str, object] = {
            "image_size": config.base,
            "channels": data.channels,
            "num_classes": data.num_classes,
            "class_names": data.class_names,
            "sigma_max": config.sigma_max,
            "downsampler": Downsampler(config.downsampler).fingerprint,
            "data": data.fingerprint,
        }
        with run.artifact(run.teacher) as folder:
            digest = save_teacher(folder, denoiser, averaged, facts)
        run.finish(STAGE, {"hash": digest, "seconds": trainer.seconds, "steps": trainer.step})
    runtime.barrier()


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
