"""The whole way, `train`: teach, encode, distill, then grow octave by octave; each stage continues where it stopped."""

from __future__ import annotations

import contextlib
import os
import time

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import check_disk
from pagoda.images import make_grid, save_image
from pagoda.stages.config import RunConfig
from pagoda.stages.context import StageContext, open_context, preview_condition
from pagoda.stages.distill import distill
from pagoda.stages.encode import encode
from pagoda.stages.grow import grow, stage_name
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teach import teach
from pagoda.training import clock

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
    if config.base % network.stride:
        raise ConfigError(
            f"base {config.base} is not divisible by the network's stride {network.stride} ({len(network.channels)} levels). "
            f"Use a multiple of {network.stride}, or fewer backbone.channels."
        )
    run = RunFolder.create(out, config)
    alone = int(os.environ.get("RANK", "0")) == 0  # of several processes, the first holds the lock for all
    with run.lock() if alone else contextlib.nullcontext():
        context = open_context(run, config, quiet=quiet)
        if context.runtime.is_main:
            check_disk(run.path, _disk_needed(context), "the latents and caches of this run")
        started = time.monotonic()
        teach(context)
        if STAGES.index(until) >= 1:
            encode(context)
        if STAGES.index(until) >= 2:
            distill(context)
        if STAGES.index(until) >= 3:
            for size in config.sizes[1:]:
                grow(context, size)
        if context.runtime.is_main and STAGES.index(until) >= 2:
            draw_octaves(context)
        context.say(f"done in {clock(time.monotonic() - started)}: {run.path}")
    return run


def draw_octaves(context: StageContext) -> None:
    """Write the grid of final samples, and the same seeds at every size side by side."""
    run = context.run
    generator = load_generator(run)
    count = 8 * max(1, min(context.data.num_classes, 10) or 4)
    condition = preview_condition(count, context.data.num_classes)
    labels = None if condition.label is None else condition.label.tolist()
    images = sample_images(generator, list(range(count)), labels=labels)
    columns = context.data.num_classes if 2 <= context.data.num_classes <= 16 else 8
    facts = {"seeds": list(range(count)), "labels": labels}
    save_image(make_grid(images, columns=columns), run.path / "samples" / f"final-{generator.size}.png", metadata=facts)


def stages_of(config: RunConfig) -> list[str]:
    """Names of all stages of a run, in order."""
    return ["teach", "encode", "distill", *(stage_name(size) for size in config.sizes[1:])]


def _disk_needed(context: StageContext) -> int:
    """Bytes of the latents that are still to be written."""
    config, data = context.config, context.data
    if context.run.is_done("encode"):
        return 0
    rows = len(data) * (2 if config.mirror else 1)
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
