"""The whole way, `train`: teach, encode, distill, then grow octave by octave; each stage continues where it stopped."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pagoda.data import LatentStore, refuse_pickles
from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation import psnr
from pagoda.files import check_disk
from pagoda.images import make_grid, save_image
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.process import release_memory
from pagoda.stages.adopt import adopt, check_brought
from pagoda.stages.amortise import STAGE as AMORTISE
from pagoda.stages.amortise import amortise
from pagoda.stages.assignment import check_match
from pagoda.stages.captions import STAGE as TEXT_STAGE
from pagoda.stages.captions import caption_prompts
from pagoda.stages.config import RunConfig
from pagoda.stages.config_checks import check_crops
from pagoda.stages.context import StageContext, open_context
from pagoda.stages.critics import check_critics, check_layers
from pagoda.stages.distill import distill
from pagoda.stages.encode import encode, some_encoded
from pagoda.stages.grow import check_boundary, grow, octave_settings, stage_name
from pagoda.stages.guidance import check_guidance, stored_condition
from pagoda.stages.image_shares import encoded_share, settled
from pagoda.stages.prior_gap import measure_gap
from pagoda.stages.provenance import draw_octaves, sample_facts
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teach import teach
from pagoda.stages.text import embed_text, text_settings
from pagoda.text import draw_captions
from pagoda.training import HealthWarning, Runtime, clock, micro_batches, peak_memory_mib

_CAPTIONED = 32
"""Images in the grid with captions."""
STAGES = ("teach", "encode", "distill", "grow")


def train(config: RunConfig, out: str, *, until: str = "grow", quiet: bool = False) -> RunFolder:
    """Run every stage that is not done yet, up to and including `until`.

    Args:
        config: What to make.
        out: The run folder; made when missing, continued when it holds this run.
        until: teach, encode, distill or grow.
        quiet: Print nothing.

    Returns:
        The run folder.

    Raises:
        PagodaError: bad data, settings, artefacts or too little disk, before the long work starts wherever it can be known.
    """
    if until not in STAGES:
        raise ConfigError(f"unknown stage {until!r}; stages are {', '.join(STAGES)}.")
    network = config.backbone  # checked here, so that a stride that does not divide the base is known at once
    if config.base % network.stride and not config.teacher.path:
        raise ConfigError(
            f"base {config.base} is not divisible by the network's stride {network.stride} ({len(network.channels)} levels). "
            f"Use a multiple of {network.stride}, or fewer backbone.channels."
        )
    if not config.teacher.path:
        check_crops(config, network.stride)
    given, config = config, settled(config, out)
    runtime = Runtime(config.device, config.precision)
    empty = peak_memory_mib(runtime.device)  # PyTorch itself, and whatever this process did before
    if runtime.is_main:
        RunFolder.create(out, config)
    runtime.barrier()
    run = RunFolder.open(out)
    with run.lock() if runtime.is_main else contextlib.nullcontext():  # the first process holds the lock for all
        refuse_pickles(run.latents)  # hours before `encode` would meet them
        context = open_context(run, config, runtime, quiet=quiet)
        if config.precision == "auto":
            context.say(f"precision: {runtime.precision} (precision=auto on {runtime.device.type})")
        if given.encode.share is None and encoded_share(config) < 1:
            context.say(
                f"encode.share={encoded_share(config):g}: of {len(context.data):,} images as many get latents as the steps draw; "
                "set it to 1 to encode all"
            )
        wanted = stages_of(config, until)
        check_guidance(config, context.data.num_classes)
        check_stages(context, wanted)
        check_batches(context, wanted)
        check_brought(context)
        missing = [stage for stage in wanted if not run.is_done(stage)]
        if any(stage == "distill" or stage.startswith("grow-") for stage in missing):
            check_match(config, None)  # from here nobody can give the function that it needs
        check_critics(config, missing)
        if not config.teacher.path:
            check_layers(context)
        check_boundary(context)
        if runtime.is_main:
            check_disk(run.path, _disk_needed(context), "the latents and caches of this run")
            run.write_config(config)
        started = time.monotonic()
        if all(run.is_done(stage) for stage in wanted):
            context.say(f"{', '.join(wanted)}: done already")
            wanted = []
        runtime.barrier()  # every process has read what is done before one of them finishes more
        taken = 0.0
        for stage in wanted:
            was_done = run.is_done(stage)
            run_stage(context, stage)
            measure_gaps(context)
            # The system keeps its own peak to a few pages only, and it can fall by these when memory goes back.
            taken = max(taken, peak_memory_mib(runtime.device) - empty)
            if runtime.is_main and not was_done and taken > 0:  # it is 0 in a process that held more before
                run.note(stage, {"memory_mib": taken})
            release_memory()
        measure_gaps(context)  # also of a run that was stopped between a stage and its measurement
        if context.runtime.is_main and STAGES.index(until) >= 2:
            draw_samples(context)
        if context.runtime.is_main:
            write_report(run, config)
        context.say(f"done in {clock(time.monotonic() - started)}: {run.path}")
    return run


def measure_gaps(context: StageContext) -> None:
    """Measure the prior gap of every generator that is done; see `measure_gap`. What goes wrong is warned about and ends nothing."""
    run, config = context.run, context.config
    for size in config.sizes:
        if run.is_done("distill" if size == config.base else stage_name(size)):
            try:
                measure_gap(context, size)
            except Exception as error:  # whatever it is: hours of training do not depend on a figure
                told = f"{type(error).__name__}: {error}"
                warnings.warn(
                    HealthWarning(f"measuring the prior gap at {size} px failed ({told}); the run goes on"),
                    stacklevel=2,
                )
    context.runtime.barrier()


def draw_samples(context: StageContext) -> None:
    """Write a grid of samples, a column a class where there are a few, and the same seeds at every size below each other."""
    run, num_classes = context.run, context.num_classes
    generator = load_generator(run)
    columns = num_classes if 2 <= num_classes <= 16 else 8
    seeds = list(range(8 * columns))
    labels = [seed % num_classes for seed in seeds] if num_classes else None
    prompts, condition = (None, None) if context.captions is None else caption_prompts(context.captions, seeds)
    images = sample_images(generator, seeds, labels=labels, condition=condition)
    digest = model_hash(generator)
    facts = sample_facts(generator, "grid", seeds, labels, prompts=prompts, columns=columns, model=digest)
    size = images.shape[-1]  # in pixels, also where the generator makes latents
    save_image(make_grid(images, columns=columns), run.path / "samples" / f"final-{size}.png", metadata=facts)
    if prompts is not None:
        told, those = prompts[:_CAPTIONED], seeds[:_CAPTIONED]
        facts = sample_facts(generator, "captions", those, None, prompts=told, columns=8, model=digest)
        assert condition is not None
        few_images = sample_images(
            generator, those, condition=condition[:_CAPTIONED]
        )  # in a batch that can be made again
        picture = draw_captions(few_images, told, columns=8)
        save_image(picture, run.path / "samples" / f"captions-{size}.png", metadata=facts)
    few, few_labels = seeds[:columns], None if labels is None else labels[:columns]
    sizes = list(generator.sizes)
    few_prompts = None if prompts is None else prompts[:columns]
    octaves = sample_facts(
        generator, "octaves", few, few_labels, prompts=few_prompts, columns=columns, sizes=sizes, model=digest
    )
    few_texts = None if condition is None else condition[:columns]
    picture = draw_octaves(generator, few, few_labels, columns=columns, condition=few_texts)
    save_image(picture, run.path / "samples" / "octaves.png", metadata=octaves)
    draw_reconstructions(context, generator)


@torch.no_grad()
def draw_reconstructions(context: StageContext, generator: OneStepGenerator, count: int = 10) -> None:
    """Write, at base and at full size, training images above what the generator makes of their own latents.

    A finished run may have lost its latents, which it needs no more; the pictures that it has then stay.
    """
    run, data = context.run, context.data
    if not run.latents.is_dir():
        context.say(f"no reconstructions drawn: {run.latents} is gone")
        return
    store = LatentStore.open(run.latents)
    indices = some_encoded(store, count)
    flips = torch.zeros_like(indices)
    device = next(generator.parameters()).device
    latents = store.get(indices, flips).to(device)
    condition = stored_condition(store, context.condition, indices, flips).to(device)
    for size in dict.fromkeys((generator.base_size, generator.size)):
        originals = data.pictures(indices, size)
        rebuilt = generator.pictures(generator(latents, condition, resolution=size)).cpu()
        facts = {
            "kind": "reconstructions",
            "model": model_hash(generator),
            "rows": indices.tolist(),
            "psnr": psnr(rebuilt, originals),
        }
        grid = make_grid(torch.cat([originals, rebuilt]), columns=len(indices), scale=max(1, 32 // originals.shape[-1]))
        save_image(grid, run.path / "samples" / f"reconstructions-{data.picture_size(size)}.png", metadata=facts)


def stages_of(config: RunConfig, until: str = "grow") -> list[str]:
    """Names of the stages of a run up to and including `until`, in order; `grow` is one stage an octave, or every few of them."""
    octaves = [stage_name(size) for size in config.growth]
    texts = [TEXT_STAGE] if config.condition == "text" else []
    found = [*texts, *STAGES[: min(STAGES.index(until) + 1, 3)], *(octaves if until == "grow" else [])]
    if config.distill.latents == "amortised" and "distill" in found:
        found.insert(found.index("distill"), AMORTISE)
    return found


def run_stage(context: StageContext, stage: str) -> None:
    """Run one stage by its name in `stages_of`."""
    first = adopt if context.config.teacher.path else teach
    alone: dict[str, Callable[[StageContext], None]] = {
        TEXT_STAGE: embed_text,
        "teach": first,
        "encode": encode,
        AMORTISE: amortise,
        "distill": distill,
    }
    if stage in alone:
        alone[stage](context)
    else:
        grow(context, int(stage.removeprefix("grow-")))


def check_stages(context: StageContext, stages: Sequence[str]) -> None:
    """Compare every stage that was started with the configuration, and see that what it made is still there.

    Raises:
        ArtifactError: a stage was started with another configuration, or what it made is missing.
    """
    run, config = context.run, context.config
    for stage in stages:
        made: Path | None
        if stage == TEXT_STAGE:
            settings, made = text_settings(config), run.path / "text"
        elif stage in STAGES:
            settings = stage_settings(config, stage)
            # The latents are not among these: `encode` checks them, and makes them again, shard by shard.
            made = {"teach": run.teacher, "distill": run.generator(config.base)}.get(stage)
        elif stage == AMORTISE:
            settings, made = stage_settings(config, stage), run.encoder
        else:
            size = int(stage.removeprefix("grow-"))
            settings, made = octave_settings(config, size), run.generator(size)
        run.check(stage, settings, {"data": context.data.fingerprint})
        if made is not None and run.is_done(stage) and not made.is_dir():
            raise ArtifactError(
                f"stage `{stage}` is done according to {run.path}/stages/{stage}.json, but {made} is missing. "
                "Put it back, or remove that file to run the stage again."
            )


def check_batches(context: StageContext, stages: Sequence[str]) -> None:
    """See that the batches of every stage can be divided among the processes and their micro-batches.

    Raises:
        ConfigError: naming the stage and its numbers.
    """
    config, runtime = context.config, context.runtime
    own = {AMORTISE: config.amortise.loop, "distill": config.distill.loop}
    own |= {} if config.teacher.path else {"teach": config.teach.loop}
    for stage in stages:
        if context.run.is_done(stage):
            continue
        try:
            loop = own.get(stage)
            if stage.startswith("grow-"):
                loop = config.grow.loop_of(config.sizes.index(int(stage.removeprefix("grow-"))) - 1)
            if loop is not None:
                micro_batches(runtime, loop)
        except ConfigError as error:
            raise ConfigError(f"stage {stage}: {error}") from error


def _disk_needed(context: StageContext) -> int:
    """Bytes of the latents that are still to be written."""
    config, data = context.config, context.data
    if context.run.is_done("encode"):
        return 0
    rows = math.ceil(len(data) * encoded_share(config)) * (2 if config.mirror else 1)
    return rows * data.channels * config.base**2 * (2 if config.encode.dtype == "float16" else 4)


def require_run(path: str) -> tuple[RunFolder, RunConfig]:
    """A run folder and its configuration.

    Raises:
        ArtifactError: not a run folder.
    """
    run = RunFolder.open(path)
    config = run.config()
    if not config.data:
        raise ArtifactError(f"{run.config_path} names no data.")
    return run, config
