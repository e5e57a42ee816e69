"""What is measured of a run while it trains: scores of samples, and the teacher's loss at fixed noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition, EDMDenoiser, per_sample
from pagoda.evaluation import Features, ScoreOptions, collect_features, score_features
from pagoda.networks import OneStepGenerator
from pagoda.networks.batches import images_at_once
from pagoda.stages.captions import caption_condition
from pagoda.stages.context import StageContext
from pagoda.stages.judging import RealImages, open_judge, open_real
from pagoda.stages.making import FIRST_SEED, teacher_images
from pagoda.stages.sampling import sample_images
from pagoda.training import ScheduledEvaluation, noise_of_seeds
from pagoda.training.technique import network_of

_Make = Callable[[list[int], "list[int] | Condition | None"], Tensor]
"""Seeds, and labels or embedded texts -> images in [-1, 1], on the CPU."""
_TEACHER_LEVELS = 12
"""Noise levels of the teacher's samples while training (DPM-Solver++, one call each)."""


def build_evaluation(
    context: StageContext, size: int, denoiser: EDMDenoiser | None = None
) -> ScheduledEvaluation | None:
    """The evaluation of a stage, or None when the run is not evaluated while training.

    Everything that draws random numbers (a judge that is trained) is done here, before training starts.

    Args:
        size: Side of the images that the stage makes, in pixels.
        denoiser: Of the stage `teach`, for its scales; None where a generator is trained.
    """
    config, runtime = context.config.evaluation, context.runtime
    if not config.every:
        return None
    data = open_real(context.run, context.config, config.data or None, size, runtime)
    real = RealImages.split(data, size, count=config.count, seed=0)
    texts = None if context.captions is None else caption_condition(context.run, data, real.stand_in)
    score = _scorer(context, real, texts) if config.metrics else None
    if not runtime.is_main:
        return None

    def measure(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        figures: dict[str, float] = {}
        if denoiser is not None:
            copied = EDMDenoiser(
                network_of(networks["teacher"]), sigma_data=denoiser.sigma_data, noise_scale=denoiser.noise_scale
            )
            figures |= validation_losses(copied, real, config.levels, conditional=context.num_classes > 0, texts=texts)
            shape = (data.channels, size, size)

            def make(seeds: list[int], told: list[int] | Condition | None) -> Tensor:
                made = teacher_images(copied, seeds, told, shape, solver="dpm2m", levels=_TEACHER_LEVELS)
                return context.codec.pictures(made)
        else:
            generator = networks["generator"]
            assert isinstance(generator, OneStepGenerator)

            def make(seeds: list[int], told: list[int] | Condition | None) -> Tensor:
                if isinstance(told, Condition):
                    return sample_images(generator, seeds, condition=told, resolution=size)
                return sample_images(generator, seeds, labels=told, resolution=size)

        return figures if score is None else figures | score(make)

    return ScheduledEvaluation(config.every, measure)


def _scorer(context: StageContext, real: RealImages, texts: Condition | None) -> Callable[[_Make], dict[str, float]]:
    """Scores of what a function makes; the features of the real images are computed once."""
    config = context.config.evaluation
    extractor = open_judge(config.features, context.run, real.data, real.size, context.runtime)
    reference, stand_in = (
        collect_features(extractor, lambda part, rows=rows: real.images(rows[part]), len(rows))  # type: ignore[misc]
        for rows in (real.reference, real.stand_in)
    )
    labels = real.data.labels(real.stand_in) if context.num_classes else None
    own, training = real.data.fingerprint == context.data.fingerprint, None
    if "memorised" in config.metrics:
        training = collect_features(extractor, lambda part: context.data.pictures(part, real.size), len(context.data))

    def score(make: _Make) -> dict[str, float]:
        def load(rows: Tensor) -> Tensor:
            told = texts[rows] if texts is not None else None if labels is None else labels[rows].tolist()
            return make([FIRST_SEED + i for i in rows.tolist()], told)

        made: Features = collect_features(extractor, load, len(real.stand_in))
        scores = score_features(
            config.metrics,
            extractor,
            reference,
            made,
            stand_in,
            image_size=real.picture_size,
            options=ScoreOptions(resamples=0),
            training=training,
            held_out=not own,
        )
        figures = {f"evaluation/{s.metric}": s.value for s in scores}
        return figures | {f"evaluation/{s.metric} real": s.floor for s in scores if s.floor is not None}

    return score


@torch.no_grad()
def validation_losses(
    denoiser: EDMDenoiser,
    real: RealImages,
    levels: tuple[float, ...],
    *,
    conditional: bool,
    texts: Condition | None = None,
) -> dict[str, float]:
    """The denoising loss at each noise level, with the weight that it has in training, always with the same noise.

    E of w(sigma) |D(x + sigma n; sigma) - x|^2 per pixel with w = (sigma^2 + sd^2) / (sigma sd)^2: 1 is what a network of zeros has.

    Args:
        real: The stand-ins are the images.
        levels: Noise levels, in the units of the images.
        conditional: Whether the network takes labels.
        texts: What it takes instead, a row a stand-in.
    """
    rows, device = real.stand_in, next(denoiser.parameters()).device
    clean = real.data.images(rows, real.size)
    labels = real.data.labels(rows) if conditional else None
    noise = noise_of_seeds(list(range(len(rows))), tuple(clean.shape[1:]))
    losses, data_std = {}, denoiser.sigma_data
    for level in levels:
        weight = (level**2 + data_std**2) / (level * data_std) ** 2
        errors = []
        for part in torch.arange(len(rows)).split(images_at_once(real.size)):
            told = Condition.of_labels(None if labels is None else labels[part]) if texts is None else texts[part]
            condition = told.to(device)
            sigma = torch.full((len(part),), float(level), device=device)
            x_0, n = clean[part].to(device), noise[part].to(device)
            denoised = denoiser(x_0 + per_sample(sigma, x_0) * n, sigma, condition)
            errors.append((denoised - x_0).double().square().flatten(1).mean(1).cpu())
        losses[f"validation/sigma {level:g}"] = weight * float(torch.cat(errors).mean())
    return losses
