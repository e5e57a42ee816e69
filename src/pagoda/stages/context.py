"""What every stage works with: the run folder, its configuration, the images, the device and the logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pagoda.data import (
    Downsampler,
    ImageDataset,
    check_source,
    open_source,
    prepare_images,
    prepare_latents,
    without_views,
)
from pagoda.data.order import batch_indices
from pagoda.diffusion import Condition, PreconditionedDenoiser, precondition
from pagoda.errors import ArtifactError
from pagoda.files import load_tensors, save_tensors, write_text_atomic
from pagoda.images import make_grid, save_image
from pagoda.networks import DiffusersNetwork, ImageCodec, PixelCodec, model_hash
from pagoda.networks.loading import load_model
from pagoda.networks.null_condition import NullCondition
from pagoda.networks.teachers import NULL_CONDITION, preconditioning_of
from pagoda.stages.captions import caption_prompts, open_captions
from pagoda.stages.config import RunConfig
from pagoda.stages.data_report import write_data_report
from pagoda.stages.run_codec import keep_codec, open_run_codec
from pagoda.stages.run_folder import RunFolder
from pagoda.text import CaptionTable
from pagoda.training import (
    LoopConfig,
    MetricLog,
    Objective,
    Runtime,
    ScheduledEvaluation,
    StatusLine,
    Trainer,
    derive_seed,
    noise_of_seeds,
)
from pagoda.training.objective import BatchT

PREVIEWS = 32
"""Images in a grid drawn while training."""


@dataclass(frozen=True)
class StageContext:
    """A run at work.

    Attributes:
        run: The folder.
        config: Its configuration.
        runtime: Device, precision, processes.
        data: The images, at every size of the run.
        codec: What makes pictures of what the networks make.
        quiet: Whether anything is printed.
    """

    run: RunFolder
    config: RunConfig
    runtime: Runtime
    data: ImageDataset
    codec: ImageCodec
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line for people, printed once over all processes."""
        if not self.quiet and self.runtime.is_main:
            print(text, file=sys.stderr, flush=True)

    def log(self, stage: str) -> MetricLog | None:
        """Where a stage's figures go; only the main process writes."""
        if not self.runtime.is_main:
            return None
        boards = self.run.path / "tensorboard" if self.config.tensorboard else None
        return MetricLog(self.run.metrics, stage, tensorboard=boards)

    def status(self) -> StatusLine:
        """The status line of a stage."""
        return StatusLine(quiet=self.quiet or not self.runtime.is_main)

    def order(self, stage: str) -> Callable[[int, int], Tensor]:
        """Data order of a stage: (step, batch size) -> indices."""
        seed = derive_seed(self.config.seed, "order", stage)
        return lambda step, batch_size: batch_indices(seed, step, batch_size, len(self.data))

    def load(self, size: int, indices: Tensor, flips: Tensor) -> tuple[Tensor, Condition]:
        """What networks see, images (B, C, size, size) in [-1, 1] or latents, and the conditions."""
        return self.data.images(indices, size, flips), self.condition(indices)

    @cached_property
    def captions(self) -> CaptionTable | None:
        """The captions and their embeddings; None for a run without texts. Raises ArtifactError before the stage `text`."""
        return open_captions(self.run, self.config)

    @property
    def num_classes(self) -> int:
        """Classes that the networks of this run know; 0 where they read texts, whatever labels the images have."""
        return 0 if self.captions is not None else self.data.num_classes

    def condition(self, indices: Tensor) -> Condition:
        """What images are conditioned on: their captions, or their labels."""
        if self.captions is not None:
            return self.captions.condition(indices)
        return Condition.of_labels(self.data.labels(indices))

    def loader(self, size: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Condition]]:
        """`load` at one size."""
        return partial(self.load, size)

    def preview_inputs(self) -> tuple[Tensor, Condition]:
        """Noise and conditions of the grids: the same for every stage, so that one sees each image grow."""
        noise = noise_of_seeds(list(range(PREVIEWS)), (self.data.channels, self.config.base, self.config.base))
        if self.captions is not None:
            return noise, caption_prompts(self.captions, range(PREVIEWS))[1]
        return noise, preview_condition(PREVIEWS, self.data.num_classes)

    def preview_writer(self, stage: str) -> Callable[[int, str, Tensor], None]:
        """Writes the grids of a stage."""

        def write(step: int, kind: str, made: Tensor) -> None:
            images = self.codec.pictures(made)
            scale = max(1, 64 // images.shape[-1])
            path = self.run.samples(stage) / f"{kind}-{step:06d}.png"
            metadata = {
                "kind": "preview",
                "stage": stage,
                "step": step,
                "weights": kind,
                "seeds": list(range(len(images))),
            }
            save_image(make_grid(images, columns=8, scale=scale), path, metadata=metadata)

        return write


def build_trainer(
    context: StageContext,
    stage: str,
    objective: Objective[BatchT],
    loop: LoopConfig,
    fingerprint: str,
    evaluation: ScheduledEvaluation | None = None,
) -> Trainer[BatchT]:
    """The loop of a stage in this run: its folder, order, logs, status line and grids."""
    return Trainer(
        objective,
        loop,
        runtime=context.runtime,
        folder=context.run.work(stage),
        stage=stage,
        seed=context.config.seed,
        order=context.order(stage),
        log=context.log(stage),
        fingerprint=fingerprint,
        status=context.status(),
        preview=context.preview_writer(stage),
        evaluation=evaluation,
    )


def preview_condition(count: int, num_classes: int) -> Condition:
    """Labels 0, 1, 2, ... in turn, or nothing for a set without labels."""
    return Condition.of_labels(torch.arange(count) % num_classes if num_classes else None)


def open_context(run: RunFolder, config: RunConfig, runtime: Runtime, *, quiet: bool = False) -> StageContext:
    """Check the data and make the small copies.

    Raises:
        DataError: images that cannot be read or are smaller than the target; all of them are named.
        ResourceError: no room for the copies.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if runtime.is_main:
        keep_codec(run, config)
        _prepare(run, config, runtime, quiet=quiet)
    runtime.barrier()
    data, codec = _prepare(run, config, runtime, quiet=True)
    if not config.teacher.labels:
        data.drop_labels()
    return StageContext(run, config, runtime, data, codec, quiet)


def _prepare(run: RunFolder, config: RunConfig, runtime: Runtime, *, quiet: bool) -> tuple[ImageDataset, ImageCodec]:
    source = open_source(config.data, options=config.source)
    codec = open_run_codec(run)
    factor = 1 if codec is None else codec.factor
    marker = run.images / "checked.json"
    try:
        checked = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    except ValueError:
        checked = None  # damaged: the images are checked again, and it is written anew
    wanted = {"source": source.fingerprint, "size": config.size * factor}
    texts = config.condition == "text"
    if texts:
        wanted["captions"] = True
    if checked != wanted:
        # Views are as good as their images.
        report = check_source(without_views(source), size=config.size * factor, need_captions=texts, progress=not quiet)
        report.raise_if_bad()
        if report.notice and not quiet:
            print(report.notice, file=sys.stderr, flush=True)
    data = prepare_images(
        source,
        sizes=[size * factor for size in config.sizes],
        downsampler=Downsampler(config.downsampler),
        cache_dir=run.images,
        progress=not quiet,
    )
    if checked != wanted:
        write_data_report(run, report)
        write_text_atomic(marker, json.dumps(wanted))
    if codec is None:
        return data, PixelCodec(data.channels)
    torch.nn.Module.to(codec, runtime.device)
    latents = prepare_latents(
        data, codec, sizes=config.sizes, mirror=config.mirror, cache_dir=run.images, progress=not quiet
    )
    return latents, codec


def save_teacher(
    path: Path, denoiser: PreconditionedDenoiser, network: DiffusersNetwork, facts: dict[str, object]
) -> str:
    """Write a teacher as a diffusers folder with its preconditioning beside it; returns its hash."""
    cast(Any, network.model).save_pretrained(path)
    digest = model_hash(network.model)
    if network.null is not None:
        save_tensors(path / NULL_CONDITION, network.null.rows())
    scalings = denoiser.preconditioning
    preconditioning = {
        "preconditioning": "scheduler" if "scheduler" in scalings else "edm",
        **scalings,
        "hash": digest,
        **facts,
    }
    (path / "denoiser.json").write_text(json.dumps(preconditioning, indent=1), encoding="utf-8")
    return digest


def teacher_facts(path: Path) -> dict[str, Any]:
    """What `save_teacher` wrote beside the weights.

    Raises:
        ArtifactError: not such a folder.
    """
    try:
        return dict(json.loads((path / "denoiser.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} holds no teacher of pagoda ({error}). Run `pagoda teach` first.") from error


def load_teacher(path: Path) -> tuple[PreconditionedDenoiser, dict[str, object]]:
    """A teacher that `save_teacher` wrote, in evaluation mode, with the facts written beside it.

    Raises:
        ArtifactError: not such a folder, or its weights are not those that were written.
    """
    facts = teacher_facts(path)
    model = load_model(path)
    digest = model_hash(model)
    if digest != facts["hash"]:
        raise ArtifactError(
            f"the weights in {path} have the hash {digest}, written were {facts['hash']}: they were exchanged or damaged."
        )
    null = None
    if (path / NULL_CONDITION).is_file():
        null = NullCondition.of(load_tensors(path / NULL_CONDITION)[0])
    network: nn.Module = DiffusersNetwork(model, null).eval().requires_grad_(False)
    return precondition(network, **preconditioning_of(facts, str(path))).eval(), facts
