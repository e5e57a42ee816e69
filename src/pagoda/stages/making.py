"""What makes the images that a run is scored by: its generator, its teacher, or its generator from real images' own latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pagoda.diffusion import (
    Condition,
    Denoiser,
    GuidedDenoiser,
    PreconditionedDenoiser,
    build_solver,
    sample,
    suitable_sigmas,
)
from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks import PixelCodec, model_hash
from pagoda.networks.guidance import check_guidance_range
from pagoda.stages.captions import caption_condition
from pagoda.stages.config import RunConfig
from pagoda.stages.context import load_teacher
from pagoda.stages.encode import encode_images, start_noise
from pagoda.stages.judging import RealImages
from pagoda.stages.run_codec import open_run_codec
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.training import Runtime, noise_of_seeds

FIRST_SEED = 1_000_000
"""Seeds of scored samples start here, far from those of previews and grids."""
MODELS = ("generator", "teacher", "reconstructions")
"""What can be scored."""

MakeImages = Callable[[Tensor], Tensor]
"""Places (B,) among the stand-ins of the real images -> images (B, C, S, S) in [-1, 1], on the CPU."""


@dataclass(frozen=True)
class Maker:
    """What makes images, before it is known which real ones they are compared with."""

    what: str
    """One of `MODELS`."""
    name: str
    """It with the guidance weight, where one was asked for."""
    size: int
    """Which size of the run."""
    picture_size: int
    """Side of the images in pixels: the size, unless the run works on latents."""
    num_classes: int
    """Classes that it knows; 0 where it takes no labels."""
    texts: bool
    """Whether it reads texts: it is then told the captions of the stand-ins."""
    facts: dict[str, Any]
    """For the record: hashes, seeds, sampler."""
    bind: Callable[[RealImages], MakeImages]
    """For these real images: labels come from the stand-ins, and what is reconstructed are they themselves."""


def open_maker(run: RunFolder, model: str, size: int | None, runtime: Runtime, guidance: float | None = None) -> Maker:
    """What makes the images of a run that are scored.

    Args:
        model: One of `MODELS`.
        size: Side in pixels; the largest when None.
        guidance: Guidance weight of the images, and of the inversion of reconstructions; none when None.

    Raises:
        ConfigError: an unknown model, a size that it does not make, or a guidance weight that it does not take.
        ArtifactError: the run has no such model yet.
    """
    if model not in MODELS:
        raise ConfigError(f"model must be one of {', '.join(MODELS)}, got {model!r}. {did_you_mean(model, MODELS)}")
    if model == "teacher":
        return _teacher(run, size, runtime, guidance)
    generator = load_generator(run, device=runtime.device)
    if size is not None and size not in generator.sizes:
        raise ConfigError(f"this generator makes images of {list(generator.sizes)} pixels, not {size}.")
    side, digest, num_classes = size or generator.size, model_hash(generator), generator.num_classes
    texts = generator.token_dim > 0
    weight = 1.0 if guidance is None else guidance
    check_guidance_range(weight, weight, generator.guidance_max)
    name, told = _with_weight(model, guidance)
    if model == "generator":

        def from_seeds(real: RealImages) -> MakeImages:
            labels, captions = stand_in_labels(real, num_classes), stand_in_texts(run, real, texts)
            return lambda places: sample_images(
                generator,
                _seeds(places),
                labels=None if labels is None else labels[places].tolist(),
                condition=None if captions is None else captions[places],
                resolution=side,
                guidance=guidance,
            )

        facts = {"model": digest, "what": model, "first_seed": FIRST_SEED, "sampler": "one step" + told}
        return Maker(model, name, side, generator.picture_shape(side)[-1], num_classes, texts, facts, from_seeds)
    denoiser, facts_of_teacher = load_teacher(run.teacher)
    denoiser.to(runtime.device)
    config = run.config()

    def from_latents(real: RealImages) -> MakeImages:
        labels, captions = stand_in_labels(real, num_classes), stand_in_texts(run, real, texts)

        @torch.no_grad()
        def make(places: Tensor) -> Tensor:
            condition = Condition.of_labels(None if labels is None else labels[places])
            condition = condition if captions is None else captions[places]
            if guidance is not None:
                condition = replace(condition, guidance=torch.full((len(places),), guidance))
            latents = _encode(config, denoiser, real, real.stand_in[places], condition, runtime)
            images = generator(latents.to(next(generator.parameters())), condition.to(runtime.device), resolution=side)
            return generator.pictures(images).cpu()

        return make

    encoder = {k: v for k, v in asdict(config.encode).items() if k not in ("batch_size", "shard_size", "dtype")}
    facts = {
        "model": digest,
        "what": model,
        "teacher": facts_of_teacher["hash"],
        "encoder": encoder,
        "noise_seed": config.seed,
    }
    return Maker(
        model,
        name,
        side,
        generator.picture_shape(side)[-1],
        num_classes,
        texts,
        {**facts, "sampler": "one step from the image's own latent" + told},
        from_latents,
    )


def stand_in_labels(real: RealImages, num_classes: int) -> Tensor | None:
    """Labels of the stand-ins, or None for a model that takes none.

    Raises:
        ConfigError: the images have another number of classes than the model.
    """
    if not num_classes:
        return None
    if real.data.num_classes != num_classes:
        raise ConfigError(
            f"the model knows {num_classes} classes, the images have {real.data.num_classes}; use images with the same classes."
        )
    return real.data.labels(real.stand_in)


def stand_in_texts(run: RunFolder, real: RealImages, texts: bool) -> Condition | None:
    """The embedded captions of the stand-ins, or None for a model that reads no texts.

    Raises:
        DataError: images without captions.
        ArtifactError: the text encoder is gone, or is not the one of the run.
    """
    return caption_condition(run, real.data, real.stand_in) if texts else None


def _encode(
    config: RunConfig,
    denoiser: PreconditionedDenoiser,
    real: RealImages,
    rows: Tensor,
    condition: Condition,
    runtime: Runtime,
) -> Tensor:
    """Unit-scale latents of real images, made as the run's own stage `encode` makes them."""
    images = real.data.images(rows, config.base)
    flips = torch.zeros_like(rows)
    noise = start_noise(config.seed, rows, flips, tuple(images.shape[1:])) if config.encode.add_noise else None
    return encode_images(config, runtime, denoiser, images, condition, noise)


def _teacher(run: RunFolder, size: int | None, runtime: Runtime, guidance: float | None) -> Maker:
    denoiser, told = load_teacher(run.teacher)
    denoiser.to(runtime.device)
    side, channels = int(str(told["image_size"])), int(str(told["channels"]))
    codec = open_run_codec(run) or PixelCodec(channels)
    if size not in (None, side):
        raise ConfigError(f"this run's teacher makes images of {side} pixels, not {size}.")
    num_classes = int(str(told["num_classes"]))
    texts = "text_encoder" in told
    if guidance is not None and not num_classes and not texts:
        raise ConfigError(f"guidance {guidance:g} was asked for, and this teacher has no classes to be guided by.")
    chosen = denoiser if guidance is None else GuidedDenoiser(denoiser, guidance)
    name, with_weight = _with_weight("teacher", guidance)

    def from_seeds(real: RealImages) -> MakeImages:
        labels, captions = stand_in_labels(real, num_classes), stand_in_texts(run, real, texts)

        def make(places: Tensor) -> Tensor:
            shown = None if labels is None else labels[places].tolist()
            asked = shown if captions is None else captions[places]
            return codec.pictures(teacher_images(chosen, _seeds(places), asked, (channels, side, side)))

        return make

    facts = {
        "model": told["hash"],
        "what": "teacher",
        "first_seed": FIRST_SEED,
        "sampler": "heun, 18 levels" + with_weight,
    }
    return Maker("teacher", name, side, side * codec.factor, num_classes, texts, facts, from_seeds)


def _with_weight(model: str, guidance: float | None) -> tuple[str, str]:
    """The name of a model under a guidance weight, and what is told of its sampler."""
    return (model, "") if guidance is None else (f"{model}-w{guidance:g}", f", guidance {guidance:g}")


def _seeds(places: Tensor) -> list[int]:
    return [FIRST_SEED + place for place in places.tolist()]


@torch.no_grad()
def teacher_images(
    denoiser: Denoiser,
    seeds: list[int],
    told: list[int] | Condition | None,
    shape: tuple[int, ...],
    *,
    solver: str = "heun",
    levels: int = 18,
) -> Tensor:
    """Samples of a diffusion model, (N, C, b, b), not clamped, on the CPU; a seed belongs to an image as in `sample_images`.

    `told` are labels, or embedded texts, one a seed.
    """
    device = next(denoiser.parameters()).device
    z = noise_of_seeds(seeds, shape).to(device)
    condition = (told if isinstance(told, Condition) else Condition.of_labels(told)).to(device)
    sigmas = suitable_sigmas(denoiser, levels)
    if denoiser.sigma_range[0] <= float(sigmas[-2]) <= 0.002:
        sigmas = sigmas[:-1]  # clean enough, and a call less
    images = sample(denoiser, z, sigmas=sigmas, condition=condition, solver=build_solver(solver))
    return images.float().cpu()
