"""What each stage takes, found by building it as the stage does and running a few of its steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pagoda.data import ImageSource
from pagoda.diffusion import (
    Condition,
    EDMDenoiser,
    PreconditionedDenoiser,
)
from pagoda.files import write_bytes_atomic
from pagoda.networks import ForeignTeacher, ImageCodec, MultiplyAdds, OneStepGenerator, SavedMemory, num_parameters
from pagoda.process import release_memory
from pagoda.stages.amortise import AmortisedEncoder, AmortisedInputs
from pagoda.stages.amortise import build_objective as build_amortise
from pagoda.stages.assignment import guided_inputs
from pagoda.stages.config import RunConfig
from pagoda.stages.context import PREVIEWS, StageContext
from pagoda.stages.distill import build_objective as build_distill
from pagoda.stages.encode import encode_batch
from pagoda.stages.grow import add_octave, cache_inputs, cached_bytes
from pagoda.stages.grow import build_objective as build_grow
from pagoda.stages.image_text import open_image_text
from pagoda.stages.latent_inputs import LatentInputs
from pagoda.stages.objective import GeneratorObjective
from pagoda.stages.plan_calls import encode_calls, pair_calls, preview_calls
from pagoda.stages.plan_standin import drawn_latents, drawn_pairs, stand_in
from pagoda.stages.teach import build_objective as build_teach
from pagoda.stages.teacher_pairs import pair_condition, teacher_images
from pagoda.training import LoopConfig, Objective, Runtime, StepCost, Trainer, measure_step, resident_bytes
from pagoda.training.objective import BatchT

_ENCODED = 8
"""Images that a codec is timed with."""
_TURNS = 2
"""Times that a batch of a solver is run: the first prepares kernels, and a machine that is busy otherwise stalls now and then."""
_WRITTEN = 16 << 20
"""Bytes of the file whose writing is timed."""


@dataclass(frozen=True)
class Footprint:
    """What is in memory and on disk of a stage that trains.

    Attributes:
        parameters: Of every network in it, frozen ones among them.
        trained: Of these, the ones that are trained.
        state_bytes: Weights, gradients, moments and averages.
        checkpoint_bytes: One checkpoint.
        artifact_bytes: What the stage leaves: the averaged network.
    """

    parameters: int
    trained: int
    state_bytes: int
    checkpoint_bytes: int
    artifact_bytes: int


@dataclass(frozen=True)
class StageProbe:
    """One stage that trains.

    Attributes:
        footprint: See there.
        phases: (steps, cost of one of them): steps with discriminators, or with distribution matching, cost more than others.
        preview_seconds: One preview, of raw and averaged weights.
        checkpoint_seconds: One checkpoint.
        pass_seconds: One image through the network in use, without gradient.
        pass_multiply_adds: The same in multiply-adds.
        taken_bytes: Memory that the process took in the largest step, beyond what it had held before; None where it was not measured.
    """

    footprint: Footprint
    phases: tuple[tuple[int, StepCost], ...]
    preview_seconds: float
    checkpoint_seconds: float
    pass_seconds: float
    pass_multiply_adds: int
    taken_bytes: int | None


@dataclass(frozen=True)
class LatentsProbe:
    """What a codec takes.

    Attributes:
        parameters: Of encoder and decoder.
        multiply_adds: Of encoding one image at all sizes of the run.
        seconds: The same, measured.
    """

    parameters: int
    multiply_adds: int
    seconds: float


class Prober:
    """Builds the stages of a run of stand-ins, one after the other, and measures each.

    Args:
        config: The run.
        source: Its images; only their number, classes and channels matter.
        folder: An empty folder for scratch files.
        runtime: The device.
        budget: Seconds of timing a stage, about; 0 counts only.
        codec: Whose latents the run works on; None for pixels.
        room: Bytes; batches that keep more than that for the backward pass are counted and not run.
    """

    def __init__(
        self,
        config: RunConfig,
        source: ImageSource,
        folder: Path,
        runtime: Runtime,
        budget: float,
        codec: ImageCodec | None = None,
        room: float = math.inf,
    ) -> None:
        self.source, self.folder, self.runtime, self.budget, self.codec = source, folder, runtime, budget, codec
        self.room = room
        self.encoder: AmortisedEncoder | None = None
        release_memory()
        self.held_before = resident_bytes(runtime.device)
        self.context = stand_in(config, source, folder / "run", runtime, sizes=config.sizes, codec=codec)
        self.write_rate = self._measure_disk() if budget > 0 else float("inf")

    def teach(self, config: RunConfig | None = None) -> tuple[EDMDenoiser, StageProbe]:
        """The diffusion model; of another configuration where one is given, as for one of the target size."""
        context = self.context
        if config is not None:
            context = stand_in(
                config, self.source, self.folder / "direct", self.runtime, sizes=[config.base], codec=self.codec
            )
            context = dataclasses.replace(context, table=self.context.table)
        denoiser, objective = build_teach(context)
        loop = context.config.teach.loop
        shape = (context.data.channels, context.config.base, context.config.base)
        probe = self.stage(
            context,
            objective,
            loop,
            [denoiser],
            ((loop.steps, loop.steps // 2),),
            lambda z, label: denoiser(z, 1.0, label),
            shape,
            preview_calls(),
        )
        denoiser.eval().requires_grad_(False)
        return denoiser, probe

    def brought(self, teacher: ForeignTeacher) -> tuple[PreconditionedDenoiser, StageProbe]:
        """A teacher from elsewhere: nothing of it is trained, and what encoding keeps is measured as if it were."""
        denoiser, context = teacher.denoiser, self.context
        nn.Module.to(denoiser, self.runtime.device)
        shape = (teacher.channels, teacher.size, teacher.size)
        saved = []
        for count in (1, 2):
            z = torch.randn(count, *shape, device=self.runtime.device)
            told = context.condition(torch.arange(count) % len(context.data)).to(self.runtime.device)
            with torch.enable_grad(), SavedMemory() as memory:
                denoiser(z.requires_grad_(True), 1.0, told)
            saved.append(memory.peak_bytes)
        multiply_adds, seconds = self._forward(context, lambda z, told: denoiser(z, 1.0, told), shape)
        weights = 4 * num_parameters([teacher.network])
        footprint = Footprint(num_parameters([teacher.network]), 0, weights, 0, weights)
        cost = StepCost(0.0, 0, max(0, saved[1] - saved[0]), 0)
        return denoiser, StageProbe(footprint, ((0, cost),), 0.0, 0.0, seconds, multiply_adds, None)

    def amortise(self, denoiser: PreconditionedDenoiser) -> StageProbe:
        """The encoder in one call, which the distillation then reads."""
        self.store = drawn_latents(self.context)
        objective = build_amortise(self.context, denoiser, self.store)
        loop = self.context.config.amortise.loop
        probe = self.stage(self.context, objective, loop, [objective.network], ((loop.steps, loop.steps // 2),))
        network = objective.network.eval().requires_grad_(False)
        self.encoder = AmortisedEncoder(network, add_noise=self.context.config.encode.add_noise)
        return probe

    @torch.no_grad()
    def latents(self, codec: ImageCodec) -> LatentsProbe:
        """What it takes to encode one image at every size."""
        codec.to(self.runtime.device)
        total, seconds = 0, 0.0
        for size in self.context.config.sizes:
            side = size * codec.factor
            with MultiplyAdds() as counter:
                codec.encode(torch.zeros(1, codec.image_channels, side, side, device=self.runtime.device))
            total += counter.total
            if self.budget > 0:
                images = torch.zeros(_ENCODED, codec.image_channels, side, side, device=self.runtime.device)
                codec.encode(images[:1])
                started = time.perf_counter()
                codec.encode(images)
                if self.runtime.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds += (time.perf_counter() - started) / _ENCODED
        return LatentsProbe(num_parameters([codec]), total, seconds)

    def encode_seconds(self, denoiser: PreconditionedDenoiser) -> float:
        """Seconds of one latent."""
        return self._solving(self.context.config.encode.batch_size, encode_calls, self._encode(denoiser))

    def pair_seconds(self, denoiser: PreconditionedDenoiser) -> float:
        """Seconds of one teacher's pair."""
        return self._solving(self.context.config.distill.teacher_pairs.batch_size, pair_calls, self._pair(denoiser))

    def distill(self, denoiser: PreconditionedDenoiser) -> tuple[OneStepGenerator, StageProbe]:
        """The generator of base size."""
        context = self.context
        self.store = drawn_latents(context)
        pairs = drawn_pairs(context) if context.config.makes_pairs else None
        latents = LatentInputs(self.store)
        if self.encoder is not None:
            latents = AmortisedInputs(context, self.store, self.encoder)
        inputs = guided_inputs(context.config, latents, self.store, pairs)
        term = open_image_text(context, context.config.distill.loss)
        objective = build_distill(context, denoiser, inputs, pairs, term)
        return objective.generator, self._generator(objective, context.config.distill.loop)

    def grow(
        self, lower: OneStepGenerator, denoiser: PreconditionedDenoiser, size: int, rows: int
    ) -> tuple[OneStepGenerator, StageProbe, int]:
        """One octave; also the memory of the frozen levels' outputs, 0 where they are computed anew.

        Args:
            rows: Latents and samples of the prior in the real run.
        """
        config = self.context.config
        generator = add_octave(self.context, lower, size)
        cached = rows * cached_bytes(self.context, generator)
        cached = cached if cached <= config.grow.cache_gib * 2**30 else 0
        settings = dataclasses.replace(config.grow, cache_gib=1e9 if cached else 0.0)
        context = dataclasses.replace(self.context, config=dataclasses.replace(config, grow=settings))
        inputs = cache_inputs(context, generator, self.store, f"grow-{size}")
        octave = config.sizes.index(size) - 1
        term = open_image_text(context, config.grow.loss_of(octave))
        objective = build_grow(context, generator, inputs, size, denoiser, term)
        return generator, self._generator(objective, config.grow.loop_of(octave)), cached

    def _generator(self, objective: GeneratorObjective, loop: LoopConfig) -> StageProbe:
        generator = objective.generator
        shape = (generator.channels, generator.base_size, generator.base_size)
        frozen = [*objective.critics.modules, *([objective.matching.teacher] if objective.matching else [])]
        kinds_of_steps: dict[tuple[bool, bool, bool], list[int]] = {}
        for step in range(loop.steps):
            kinds_of_steps.setdefault(objective.kind_of(step), []).append(step)
        # A step in the middle of its kind stands for all of it.
        kinds = tuple((len(steps), steps[len(steps) // 2]) for _, steps in sorted(kinds_of_steps.items()))
        return self.stage(self.context, objective, loop, [generator, *frozen], kinds, generator.forward, shape, 1)

    def stage(
        self,
        context: StageContext,
        objective: Objective[BatchT],
        loop: LoopConfig,
        networks: list[nn.Module],
        kinds: tuple[tuple[int, int], ...],
        forward: Callable[[Tensor, Condition], Tensor] | None = None,
        shape: tuple[int, int, int] = (0, 0, 0),
        calls: int = 0,
    ) -> StageProbe:
        """A stage that trains.

        Args:
            networks: Every network in it.
            kinds: (steps of a kind, one of these) for every kind of step.
            forward: What grids are drawn with, from inputs of `shape`, in so many `calls`; None for a stage without grids.
        """
        trainer = Trainer(
            objective,
            loop,
            runtime=self.runtime,
            folder=self.folder / "probe",
            stage="probe",
            seed=0,
            order=context.order("probe"),
        )
        footprint = self._footprint(objective, networks)
        budget = self.budget / len(kinds)
        phases = [(count, measure_step(trainer, step, budget, room=self.room)) for count, step in kinds]
        multiply_adds, seconds = (0, 0.0) if forward is None else self._forward(context, forward, shape)
        preview = 2 * PREVIEWS * calls * seconds if loop.preview_every else 0.0
        checkpoint = footprint.checkpoint_bytes / self.write_rate
        return StageProbe(footprint, tuple(phases), preview, checkpoint, seconds, multiply_adds, self._taken(phases))

    def _taken(self, phases: list[tuple[int, StepCost]]) -> int | None:
        peaks = [cost.peak_bytes for _, cost in phases if cost.peak_bytes is not None]
        return max(0, max(peaks) - self.held_before) if peaks and self.held_before is not None else None

    def _footprint(self, objective: Objective[BatchT], networks: list[nn.Module]) -> Footprint:
        state = checkpoint = artifact = 0
        trainables = objective.trainables()
        for trainable in trainables.values():
            weights = sum(t.numel() * t.element_size() for t in trainable.module.state_dict().values())
            trained = 4 * num_parameters([trainable.module], trained=True)
            kept = 0 if trainable.ema is None else weights
            state += weights + 3 * trained + kept
            checkpoint += weights + 2 * trained + kept
            artifact += kept  # the judges have no average, and are not kept
        modules = [*networks, *(t.module for t in trainables.values())]
        frozen = 4 * (num_parameters(modules) - num_parameters([t.module for t in trainables.values()]))
        trained = num_parameters([t.module for t in trainables.values()], trained=True)
        return Footprint(num_parameters(modules), trained, state + frozen, checkpoint, artifact)

    @torch.no_grad()
    def _forward(
        self, context: StageContext, forward: Callable[[Tensor, Condition], Tensor], shape: tuple[int, int, int]
    ) -> tuple[int, float]:
        """Multiply-adds and seconds of one image; timed in a batch of a preview where the budget allows."""
        device, seconds, count = self.runtime.device, 0.0, 1
        while True:
            z = torch.randn(count, *shape, device=device)
            told = context.condition(torch.arange(count) % len(context.data)).to(device)
            if count == 1:
                with MultiplyAdds() as counter:
                    forward(z, told)
            if self.budget <= 0:
                return counter.total, 0.0
            started = time.perf_counter()
            forward(z, told)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / count
            if count == PREVIEWS or PREVIEWS * seconds > self.budget:
                return counter.total, seconds
            count = PREVIEWS

    def _encode(self, denoiser: PreconditionedDenoiser) -> Callable[[RunConfig, int], None]:
        def run(config: RunConfig, count: int) -> None:
            context = dataclasses.replace(self.context, config=config)
            rows = torch.arange(count) % len(context.data)
            encode_batch(context, denoiser, rows, torch.zeros_like(rows)).cpu()

        return run

    def _pair(self, denoiser: PreconditionedDenoiser) -> Callable[[RunConfig, int], None]:
        def run(config: RunConfig, count: int) -> None:
            context = dataclasses.replace(self.context, config=config)
            noise = torch.randn(count, context.data.channels, config.base, config.base)
            rows = torch.arange(count) % len(context.data)
            told = pair_condition(0, torch.arange(count), context.condition(rows), config.guidance.scale_max)
            teacher_images(context, denoiser, noise, told).cpu()

        return run

    @torch.no_grad()
    def _solving(self, batch: int, calls: Callable[[RunConfig], int], run: Callable[[RunConfig, int], None]) -> float:
        """Seconds an image, from batches that grow up to the real one while the budget allows."""
        if self.budget <= 0:
            return 0.0
        config = self.context.config
        encode = dataclasses.replace(config.encode, num_nodes=3)
        pairs = dataclasses.replace(config.distill.teacher_pairs, num_nodes=3)
        short = dataclasses.replace(
            config, encode=encode, distill=dataclasses.replace(config.distill, teacher_pairs=pairs)
        )
        ratio = calls(config) / calls(short)
        spent, size = 0.0, 1
        while True:
            times = []
            for _ in range(_TURNS):
                started = time.perf_counter()
                run(short, size)
                times.append(time.perf_counter() - started)
            seconds, spent = min(times), spent + sum(times)
            if size == batch or spent + 4 * _TURNS * seconds > self.budget:
                break
            size = min(batch, 4 * size)
        if seconds * ratio < self.budget:
            started = time.perf_counter()
            run(config, size)
            return min(time.perf_counter() - started, seconds * ratio) / size
        return seconds * ratio / size

    def _measure_disk(self) -> float:
        """Bytes a second of a file that is written and flushed."""
        started = time.perf_counter()
        write_bytes_atomic(self.folder / "written", bytes(_WRITTEN))
        return _WRITTEN / (time.perf_counter() - started)
