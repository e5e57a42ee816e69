"""Stage 3, `grow`: one octave more, on frozen levels, with the same latents and the images at twice the size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.errors import ConfigError
from pagoda.files import hash_json
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, build_trainer
from pagoda.stages.distill import LatentInputs, build_critics, export_generator, open_latents
from pagoda.stages.image_text import ImageTextTerm, open_image_text
from pagoda.stages.objective import GeneratorInputs, GeneratorObjective
from pagoda.stages.run_folder import stage_settings
from pagoda.stages.sampling import load_generator
from pagoda.stages.watching import build_evaluation
from pagoda.training import StepRandom, derive_seed, seeded_generator


class CachedInputs(GeneratorInputs):
    """What the frozen levels put out, computed once: for every encoded image, and for a pool of prior samples.

    Args:
        pairs: Features, image and embedding of each (image, mirror), rows as in the latent store.
        fakes: The same for a pool of prior samples.
        fake_images: Images of the data (F,) int64 whose conditions the pool was made with.
        condition: Images of the data -> their conditions.
        flips: Whether mirrors have rows of their own.
    """

    def __init__(
        self,
        pairs: Sequence[Tensor],
        fakes: Sequence[Tensor],
        fake_images: Tensor,
        condition: Callable[[Tensor], Condition],
        *,
        flips: bool,
    ) -> None:
        self.pairs = tuple(pairs)
        self.fakes = tuple(fakes)
        self.fake_images = fake_images
        self.condition = condition
        self.flips = flips

    def encoded(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, ...]:
        rows = indices * 2 + flips.long() if self.flips else indices
        return tuple(part[rows] for part in self.pairs)

    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        rows = random.integers("prior", len(self.fakes[0]))
        return tuple(part[rows] for part in self.fakes), self.condition(self.fake_images[rows])

    def prior_images(self, random: StepRandom, indices: Tensor) -> Tensor:
        return self.fake_images[random.integers("prior", len(self.fakes[0]))]

    def generate(self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition) -> Tensor:
        return generator.forward_top(inputs[0], inputs[1], inputs[2])


def stage_name(size: int) -> str:
    """Name of the stage that grows to `size`."""
    return f"grow-{size}"


def octave_settings(config: RunConfig, size: int) -> dict[str, Any]:
    """What decides the octave of `size`: of tuples only its own entry, so that a run can grow on and keep the octaves it has."""
    settings = stage_settings(config, "grow")
    settings["grow"] = {**settings["grow"], **config.grow.octave(config.sizes.index(size) - 1)}
    settings["grow"]["loop"] = {k: v for k, v in settings["grow"]["loop"].items() if k not in ("steps", "batch_size")}
    return settings


def grow(context: StageContext, size: int) -> None:
    """Grow the generator from `size / 2` to `size` and write it to `generator-<size>/`; continues where it stopped.

    Raises:
        ArtifactError: the level below is missing, or the stage was started with another configuration.
        ConfigError: `size` is not an octave of this run.
        TrainingError: the training is no longer healthy.
    """
    run, config, runtime = context.run, context.config, context.runtime
    if size not in config.sizes[1:]:
        raise ConfigError(f"cannot grow to {size}: the octaves of this run are {config.sizes[1:]}.")
    stage, octave = stage_name(size), config.sizes.index(size) - 1
    below = "distill" if octave == 0 else stage_name(size // 2)
    lower_hash = run.require(below, f"pagoda train ... --out {run.path}")["results"]["hash"]
    store = open_latents(context)
    values = config.grow.octave(octave)
    inputs = {"data": context.data.fingerprint, "generator": str(lower_hash), "latents": hash_json(store.provenance)}
    image_text = open_image_text(context, config.grow.loss)
    if image_text is not None:
        inputs["image_text"] = image_text.encoder.fingerprint
    fingerprint = run.begin(stage, octave_settings(config, size), inputs, write=runtime.is_main)
    if run.is_done(stage):
        context.say(f"{stage}: done already")
        return
    lower = load_generator(run, size // 2, device=runtime.device)
    generator = add_octave(context, lower, size)
    loop = dataclasses.replace(config.grow.loop, steps=values["steps"], batch_size=values["batch_size"])
    cached = cache_inputs(context, generator, store, stage)
    objective = build_objective(context, generator, cached, size, image_text=image_text)
    evaluation = build_evaluation(context, size)
    trainer = build_trainer(context, stage, objective, loop, fingerprint, evaluation)
    averaged = trainer.run()["generator"]
    assert isinstance(averaged, OneStepGenerator)
    assert model_hash(averaged.base) == model_hash(lower.base), "a frozen level moved"
    export_generator(context, stage, averaged, size, trainer)


def add_octave(context: StageContext, lower: OneStepGenerator, size: int) -> OneStepGenerator:
    """The generator with a fresh level for `size` on top, everything below it frozen."""
    config = context.config
    values = config.grow.octave(config.sizes.index(size) - 1)
    torch.manual_seed(derive_seed(config.seed, stage_name(size), "init"))
    generator = lower.grow(
        channels=values["channels"],
        num_blocks=config.grow.num_blocks,
        head_init=config.grow.head_init,  # type: ignore[arg-type]
    )
    generator.freeze_below(size)
    generator.train()
    return generator


def build_objective(
    context: StageContext,
    generator: OneStepGenerator,
    inputs: GeneratorInputs,
    size: int,
    denoiser: EDMDenoiser | None = None,
    image_text: ImageTextTerm | None = None,
) -> GeneratorObjective:
    """What the octave of `size` trains: the grown generator, and what judges it (`denoiser`: the teacher; None loads the run's)."""
    config = context.config
    discriminator, features = build_critics(context, config.grow.loss, size, stage_name(size), denoiser)
    return GeneratorObjective(
        generator,
        discriminator,
        features,
        inputs,
        load=context.loader(size),
        config=config.grow.loss,
        steps=config.grow.octave(config.sizes.index(size) - 1)["steps"],
        mirror=config.mirror,
        optimizers=(config.grow.optimizer, config.grow.discriminator),
        ema=config.grow.ema,
        preview=context.preview_inputs(),
        image_text=image_text,
    )


def cache_inputs(context: StageContext, generator: OneStepGenerator, store: LatentStore, stage: str) -> GeneratorInputs:
    """The frozen levels' outputs in memory when they fit in `grow.cache_gib`; else the latents, run through each step."""
    config, data = context.config, context.data
    rows = len(data) * (2 if config.mirror else 1)
    judged = config.grow.loss.adversarial > 0 or config.grow.loss.image_text > 0
    pool = config.grow.fakes if judged else 0
    needed = (rows + pool) * cached_bytes(context, generator)
    if needed > config.grow.cache_gib * 2**30:
        context.say(
            f"{stage}: the frozen levels' outputs need {needed / 2**30:.1f} GiB, more than grow.cache_gib "
            f"{config.grow.cache_gib}; they are computed anew each step"
        )
        return LatentInputs(store)
    context.say(f"{stage}: caching the frozen levels' outputs, {needed / 2**20:.0f} MiB")
    every = torch.arange(rows)
    indices, flips = (every // 2, every % 2) if config.mirror else (every, torch.zeros_like(every))
    pairs = _cache(
        context, generator, lambda part: store.get(indices[part], flips[part]), lambda part: indices[part], rows
    )
    draws = seeded_generator(config.seed, stage, "prior")
    noise = torch.randn(pool, *store.shape, generator=draws)
    chosen = torch.randint(len(data), (pool,), generator=draws)  # conditions as often as in the data
    fakes = _cache(context, generator, lambda part: noise[part], lambda part: chosen[part], pool) if pool else pairs
    return CachedInputs(pairs, fakes, chosen, context.condition, flips=config.mirror)


def cached_bytes(context: StageContext, generator: OneStepGenerator) -> int:
    """Memory of one latent's outputs of the frozen levels, in half precision."""
    z = torch.zeros(1, generator.channels, generator.base_size, generator.base_size)
    with torch.no_grad():
        outputs = _outputs(context, generator, z, context.condition(torch.zeros(1).long()))
    return sum(part[0].numel() * 2 for part in outputs)


def _outputs(context: StageContext, generator: OneStepGenerator, z: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    """Features, image and embedding that the top level receives."""
    device = context.runtime.device
    with context.runtime.autocast():
        return generator.lower_outputs(z.to(device), condition.to(device))


def _cache(
    context: StageContext,
    generator: OneStepGenerator,
    latents: Callable[[Tensor], Tensor],
    images: Callable[[Tensor], Tensor],
    count: int,
) -> tuple[Tensor, ...]:
    """Outputs of `count` latents in half precision; `images` says whose conditions rows have."""
    kept: list[Tensor] = []
    with torch.no_grad():
        for part in torch.arange(count).split(256):
            outputs = _outputs(context, generator, latents(part), context.condition(images(part)))
            if not kept:
                kept = [torch.empty(count, *output.shape[1:], dtype=torch.float16) for output in outputs]
            for store, output in zip(kept, outputs, strict=True):
                store[part] = output.half().cpu()
    return tuple(kept)
