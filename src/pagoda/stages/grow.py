"""Stage 3, `grow`: one octave more (or several in one go), on frozen levels, with the same latents and larger images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import Condition, PreconditionedDenoiser
from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import hash_json
from pagoda.networks import OneStepGenerator, anatomy, build_backbone
from pagoda.networks.batches import images_at_once
from pagoda.stages.agreement import agreement_encoder, agreement_weights
from pagoda.stages.assignment import Assignment, ImageGuidance, check_match, guided_inputs
from pagoda.stages.config import RunConfig, to_dict
from pagoda.stages.consistency import LowerImages
from pagoda.stages.context import StageContext, build_trainer
from pagoda.stages.critics import build_critics, keep_critics
from pagoda.stages.detail import match_detail
from pagoda.stages.distill import export_generator
from pagoda.stages.guidance import drawn_weights, stored_condition
from pagoda.stages.image_shares import rebuilt_images
from pagoda.stages.image_text import ImageTextTerm, open_image_text
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.objective import GeneratorInputs, GeneratorObjective
from pagoda.stages.preparation import Preparation
from pagoda.stages.recorded_settings import stage_settings, without_neutral
from pagoda.stages.retained_heads import RetainedHeads
from pagoda.stages.sampling import load_generator
from pagoda.stages.watching import build_evaluation
from pagoda.text import ImageTextEncoder
from pagoda.training import StepRandom, derive_seed, seeded_generator


class CachedInputs(GeneratorInputs):
    """What the frozen levels put out, computed once: for every encoded image, and for a pool of prior samples.

    Args:
        pairs: Features, image and embedding of each (image, mirror), rows as in the latent store.
        fakes: The same for a pool of prior samples.
        fake_images: Images of the data (F,) int64 whose conditions the pool was made with.
        condition: Images of the data -> their conditions.
        rows: Images (B,) and mirrors (B,) -> rows of `pairs`.
        size: Side of the lowest level that is not frozen, where the generator goes on; None = the top one.
        fake_guidance: Guidance weights (F,) that the pool was made with; None for none.
    """

    def __init__(
        self,
        pairs: Sequence[Tensor],
        fakes: Sequence[Tensor],
        fake_images: Tensor,
        condition: Callable[[Tensor], Condition],
        *,
        rows: Callable[[Tensor, Tensor], Tensor],
        size: int | None = None,
        fake_guidance: Tensor | None = None,
    ) -> None:
        self.pairs = tuple(pairs)
        self.fakes = tuple(fakes)
        self.fake_images = fake_images
        self.fake_guidance = fake_guidance
        self.condition = condition
        self.rows = rows
        self.size = size

    def encoded(self, indices: Tensor, flips: Tensor, random: StepRandom) -> tuple[Tensor, ...]:
        rows = self.rows(indices, flips)
        return tuple(part[rows] for part in self.pairs)

    def prior(self, random: StepRandom, condition: Condition) -> tuple[tuple[Tensor, ...], Condition]:
        rows = random.integers("prior", len(self.fakes[0]))
        told = self.condition(self.fake_images[rows])
        if self.fake_guidance is not None:
            told = dataclasses.replace(told, guidance=self.fake_guidance[rows])
        return tuple(part[rows] for part in self.fakes), told

    def prior_images(self, random: StepRandom, indices: Tensor) -> Tensor:
        return self.fake_images[random.integers("prior", len(self.fakes[0]))]

    def generate_levels(
        self, generator: OneStepGenerator, inputs: tuple[Tensor, ...], condition: Condition
    ) -> dict[int, Tensor]:
        return generator.forward_levels(inputs[0], inputs[1], inputs[2], size=self.size)


def stage_name(size: int) -> str:
    """Name of the stage that grows to `size`."""
    return f"grow-{size}"


def octave_settings(config: RunConfig, size: int) -> dict[str, Any]:
    """What decides the stage that ends with `size`: of tuples only its own entries, so that a run can grow on and keep what it has."""
    grow, octaves = config.grow, octaves_of(config, size)
    top, settings = octaves[-1], stage_settings(config, "grow")
    per_octave = ("blocks", "heads", "octave_losses", "attention", "at_once")
    own = {name: value for name, value in settings["grow"].items() if name not in per_octave}
    own |= {**grow.octave(top), "num_blocks": grow.num_blocks_of(top), "head_init": grow.head_of(top)}
    own["loss"] = without_neutral(to_dict(grow.loss_of(top)))
    own["loop"] = {k: v for k, v in own["loop"].items() if k not in ("steps", "batch_size")}
    if grow.attention >= config.sizes[octaves[0] + 1]:
        own["attention"] = min(grow.attention, size)
    if len(octaves) > 1:
        own["channels"] = [grow.octave(k)["channels"] for k in octaves]
        own["blocks"], own["heads"] = [grow.num_blocks_of(k) for k in octaves], [grow.head_of(k) for k in octaves]
    return {**settings, "grow": own}


def octaves_of(config: RunConfig, size: int) -> list[int]:
    """Numbers, from 0, of the octaves that the stage which ends with `size` adds."""
    return list(range(config.sizes.index(config.below(size)), config.sizes.index(size)))


def boundary_of(config: RunConfig, size: int) -> int | str:
    """What the stage that ends with `size` trains: the side of its lowest level, or a part of the base and all after it."""
    lowest, boundary = 2 * config.below(size), config.grow.train_from
    if boundary == "top":
        return lowest
    return min(int(boundary), lowest) if boundary.isdecimal() else boundary


def check_boundary(context: StageContext) -> None:
    """Refuse a boundary that names no part of the run's network, before anything is trained.

    Raises:
        ConfigError: naming the nearest part.
    """
    config = context.config
    boundary = config.grow.train_from
    if config.growth and boundary != "top" and not boundary.isdecimal():
        with torch.device("meta"):
            model = build_backbone(config.backbone, image_size=config.base, in_channels=context.data.channels)
        anatomy(model).check(boundary)


def grow(
    context: StageContext,
    size: int,
    *,
    match: ImageGuidance | None = None,
    image_text: ImageTextEncoder | None = None,
) -> None:
    """Grow the generator from the size below to `size` and write it to `generator-<size>/`; continues where it stopped.

    Args:
        match: For the assignment `matched` of guidance: the weight that an image looks like; in a run of texts its agreement with its
            caption tells it when None.
        image_text: For the loss's term of that name: an encoder of your own; None opens the one that the configuration names.

    Raises:
        ArtifactError: the level below is missing, the stage was started with another configuration, or a frozen level has changed.
        ConfigError: no stage of this run ends with `size`; `match` is missing, or given for nothing, as may be
            `image_text`.
        TrainingError: the training is no longer healthy.
    """
    preparation = Preparation()
    run, config, runtime = context.run, context.config, context.runtime
    if size not in config.growth:
        raise ConfigError(f"cannot grow to {size}: the stages of this run end with {config.growth}.")
    check_match(config, match)
    stage, octave, lower_size = stage_name(size), config.sizes.index(size) - 1, config.below(size)
    below = "distill" if lower_size == config.base else stage_name(lower_size)
    lower_hash = run.require(below, f"pagoda train ... --out {run.path}")["results"]["hash"]
    store = open_latents(context)
    inputs: dict[str, str | None] = {"data": context.data.fingerprint, "generator": str(lower_hash)}
    inputs["latents"] = hash_json(store.provenance)
    inputs |= {} if match is None else {"match": match.fingerprint}
    term = open_image_text(context, config.grow.loss_of(octave), image_text)
    if term is not None:
        inputs["image_text"] = term.encoder.fingerprint
    encoder = agreement_encoder(context, match)
    if encoder is not None:
        inputs["match"] = encoder.fingerprint
    if run.is_done(stage):
        run.check(stage, octave_settings(config, size), inputs)
        context.say(f"{stage}: done already")
        return
    lower = load_generator(run, lower_size, device=runtime.device)
    generator = add_octave(context, lower, size)
    # Fresh noise in every step in place of a pool of it: not to be continued as one with the cache, nor the other way round.
    inputs["lower_outputs"] = None if is_cached(context, generator, store) else "anew in every step"
    # Neither is a stage that has not told the heads of the sizes between.
    inputs["retained_heads"] = "trained" if len(octaves_of(config, size)) > 1 else None
    fingerprint = run.begin(stage, octave_settings(config, size), inputs, write=runtime.is_main)
    loop = config.grow.loop_of(octave)
    matched = match if encoder is None else agreement_weights(context, encoder)
    cached = cache_inputs(context, generator, store, stage, matched)
    objective = build_objective(context, generator, cached, size, image_text=term)
    keep_critics(context, stage, objective.critics)
    evaluation = build_evaluation(context, size)
    trainer = build_trainer(context, stage, objective, loop, fingerprint, evaluation)
    preparation.end(context, stage)
    averaged = trainer.run()["generator"]
    assert isinstance(averaged, OneStepGenerator)
    check_frozen(stage, generator, lower, averaged)
    told: dict[str, Any] = {}
    if config.grow.match_detail:
        gains = match_detail(context, averaged, store, octaves_of(config, size))
        told["detail_gain"] = {str(side): gain for side, gain in gains.items()}
        context.say(
            f"{stage}: detail scaled by {', '.join(f'{gain:.2f} at {side} px' for side, gain in gains.items())}"
        )
    export_generator(context, stage, averaged, size, trainer, told)


def check_frozen(stage: str, trained: OneStepGenerator, before: OneStepGenerator, after: OneStepGenerator) -> None:
    """Refuse to write a generator of which a frozen level is not the one below, bit by bit: smaller images would no longer be its own.

    Args:
        trained: Tells what was frozen.
        before: The generator below.
        after: What would be written.

    Raises:
        ArtifactError: naming what moved.
    """
    old, new = before.state_dict(), after.state_dict()
    frozen = [name for name, parameter in trained.named_parameters() if not parameter.requires_grad]
    moved = [name for name in frozen if not torch.equal(old[name], new[name])]
    if moved:
        raise ArtifactError(
            f"stage `{stage}` has changed {len(moved)} of {len(frozen)} frozen tensors, such as {moved[0]}; nothing was written, and the "
            f"generator of {before.size} px is as it was. Remove `checkpoints/{stage}` and `stages/{stage}.json` to train the stage "
            "again; if it happens again, something in this process writes into frozen weights."
        )


def add_octave(context: StageContext, lower: OneStepGenerator, size: int) -> OneStepGenerator:
    """The generator with fresh levels up to `size` on top, everything below the boundary frozen."""
    config, generator = context.config, lower
    torch.manual_seed(derive_seed(config.seed, stage_name(size), "init"))
    for octave in octaves_of(config, size):
        generator = generator.grow(
            channels=config.grow.octave(octave)["channels"],
            num_blocks=config.grow.num_blocks_of(octave),
            head_init=config.grow.head_of(octave),  # type: ignore[arg-type]
            use_rgb=config.grow.use_rgb,
            attention=config.sizes[octave + 1] <= config.grow.attention,
        )
    generator.freeze_below(boundary_of(config, size))
    generator.train()
    return generator


def build_objective(
    context: StageContext,
    generator: OneStepGenerator,
    inputs: GeneratorInputs,
    size: int,
    denoiser: PreconditionedDenoiser | None = None,
    image_text: ImageTextTerm | None = None,
) -> GeneratorObjective:
    """What the octave of `size` trains: the grown generator, and what judges it (`denoiser`: the teacher; None loads the run's)."""
    config, octave = context.config, context.config.sizes.index(size) - 1
    loss = config.grow.loss_of(octave)
    critics = build_critics(context, loss, size, stage_name(size), denoiser)
    lower, boundary = None, frozen_below(context, generator)
    if config.grow.targets == "consistent":
        assert boundary is not None, "checked by the configuration"
        reduced = context.loader(boundary // 2)
        lower = LowerImages(generator, boundary, lambda rows, flips: reduced(rows, flips)[0], context.codec.bounded)
    return GeneratorObjective(
        generator,
        critics.discriminator,
        critics.features,
        inputs,
        load=context.loader(size),
        config=loss,
        steps=config.grow.octave(octave)["steps"],
        mirror=config.mirror,
        optimizers=(config.grow.optimizer, config.grow.discriminator),
        ema=config.grow.ema,
        preview=context.preview_inputs(),
        lpips=critics.lpips,
        second=critics.reconstruction,
        kept=rebuilt_images(context, loss.pairs),
        image_text=image_text,
        lower=lower,
        retained=retained_heads(context, size),
    )


def retained_heads(context: StageContext, size: int) -> RetainedHeads | None:
    """What the heads of the sizes between are told; None for a stage that adds one octave."""

    def images(side: int) -> Callable[[Tensor, Tensor], Tensor]:
        load = context.loader(side)
        return lambda rows, flips: load(rows, flips)[0]

    between = [context.config.sizes[octave + 1] for octave in octaves_of(context.config, size)[:-1]]
    return RetainedHeads({side: images(side) for side in between}) if between else None


def frozen_below(context: StageContext, generator: OneStepGenerator) -> int | None:
    """Side of the lowest level that is trained; None where a part of the base is trained too, and nothing can be cached."""
    boundary = boundary_of(context.config, generator.size)
    return boundary if isinstance(boundary, int) and boundary > generator.base_size else None


def cache_inputs(
    context: StageContext,
    generator: OneStepGenerator,
    store: LatentStore,
    stage: str,
    match: ImageGuidance | Assignment | None = None,
) -> GeneratorInputs:
    """The frozen levels' outputs in memory when they fit in `grow.cache_gib`; else the latents, run through each step."""
    config, data = context.config, context.data
    size = frozen_below(context, generator)
    if size is None:
        context.say(
            f"{stage}: grow.train_from={config.grow.train_from} trains a part of the base, so nothing is cached"
        )
        return guided_inputs(config, LatentInputs(store), store, match=match)
    rows, pool = len(store) * (2 if store.flips else 1), prior_pool(config, generator.size)
    needed = cache_size(context, generator, store)
    if not is_cached(context, generator, store):
        context.say(
            f"{stage}: the frozen levels' outputs need {needed / 2**30:.1f} GiB, more than grow.cache_gib "
            f"{config.grow.cache_gib}; they are computed anew each step"
        )
        return guided_inputs(config, LatentInputs(store), store, match=match)
    context.say(f"{stage}: caching the frozen levels' outputs, {needed / 2**20:.0f} MiB")
    every = [store.shard_rows(shard) for shard in range(store.num_shards)]
    indices, flips = (torch.cat(parts).long() for parts in zip(*every, strict=True))

    def of_pairs(part: Tensor) -> Condition:
        return stored_condition(store, context.condition, indices[part], flips[part])

    pairs = _cache(context, generator, lambda part: store.get(indices[part], flips[part]), of_pairs, rows)
    draws = seeded_generator(config.seed, stage, "prior")
    noise = torch.randn(pool, *store.shape, generator=draws)
    chosen = torch.randint(len(data), (pool,), generator=draws)  # conditions as often as in the data
    weights = None
    if config.guidance.active:
        weights = drawn_weights(config.guidance.scale_max, torch.rand(pool, generator=draws))

    def of_fakes(part: Tensor) -> Condition:
        told = context.condition(chosen[part])
        return told if weights is None else dataclasses.replace(told, guidance=weights[part])

    fakes = _cache(context, generator, lambda part: noise[part], of_fakes, pool) if pool else pairs
    cached = CachedInputs(pairs, fakes, chosen, context.condition, rows=store.rows, size=size, fake_guidance=weights)
    return guided_inputs(config, cached, store, match=match)


def is_cached(context: StageContext, generator: OneStepGenerator, store: LatentStore) -> bool:
    """Whether the outputs of the frozen levels are kept in memory: there are some, and they fit in `grow.cache_gib`."""
    if frozen_below(context, generator) is None:
        return False
    return cache_size(context, generator, store) <= context.config.grow.cache_gib * 2**30


def cache_size(context: StageContext, generator: OneStepGenerator, store: LatentStore) -> int:
    """Bytes of the outputs of the frozen levels, of all latents and of the samples of the prior."""
    rows = len(store) * (2 if store.flips else 1) + prior_pool(context.config, generator.size)
    return rows * cached_bytes(context, generator)


def prior_pool(config: RunConfig, size: int) -> int:
    """Prior samples that the stage which ends with `size` caches."""
    loss = config.grow.loss_of(config.sizes.index(size) - 1)
    return config.grow.fakes if loss.adversarial > 0 or loss.image_text > 0 else 0


def cached_bytes(context: StageContext, generator: OneStepGenerator) -> int:
    """Memory of one latent's outputs of the frozen levels, in half precision; 0 where nothing is cached."""
    if frozen_below(context, generator) is None:
        return 0
    z = torch.zeros(1, generator.channels, generator.base_size, generator.base_size)
    with torch.no_grad():
        outputs = _outputs(context, generator, z, context.condition(torch.zeros(1).long()))
    return sum(part[0].numel() * 2 for part in outputs)


def _outputs(context: StageContext, generator: OneStepGenerator, z: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    """Features, image and embedding that the lowest trained level receives."""
    device = context.runtime.device
    with context.runtime.autocast():
        return generator.lower_outputs(z.to(device), condition.to(device), frozen_below(context, generator))


def _cache(
    context: StageContext,
    generator: OneStepGenerator,
    latents: Callable[[Tensor], Tensor],
    condition: Callable[[Tensor], Condition],
    count: int,
) -> tuple[Tensor, ...]:
    """Outputs of `count` latents in half precision; `condition` says what rows are conditioned on."""
    kept: list[Tensor] = []
    lowest = frozen_below(context, generator)
    assert lowest is not None, "without frozen levels nothing is cached"
    with torch.no_grad():
        for part in torch.arange(count).split(images_at_once(lowest // 2)):
            outputs = _outputs(context, generator, latents(part), condition(part))
            if not kept:
                kept = [torch.empty(count, *output.shape[1:], dtype=torch.float16) for output in outputs]
            for store, output in zip(kept, outputs, strict=True):
                store[part] = output.half().cpu()
    return tuple(kept)
