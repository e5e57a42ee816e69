"""What each stage of a run takes, from what a prober finds: steps and images of the configuration, times the cost of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from pagoda.diffusion import PreconditionedDenoiser
from pagoda.networks import BackboneConfig, anatomy
from pagoda.stages.adopt import fitted, open_brought
from pagoda.stages.amortise import STAGE as AMORTISE
from pagoda.stages.config import RunConfig
from pagoda.stages.config_checks import check_crops
from pagoda.stages.critics import check_layers
from pagoda.stages.grow import prior_pool, stage_name
from pagoda.stages.image_shares import encoded_share
from pagoda.stages.plan_calls import encode_calls, pair_calls
from pagoda.stages.plan_model import Price, StagePlan
from pagoda.stages.plan_probe import LatentsProbe, Prober, StageProbe
from pagoda.stages.plan_texts import probe_texts
from pagoda.training import LoopConfig

HEADER = 128
"""Bytes before the numbers of a .npy file."""
_ROW_BYTES = 13
"""Beside each stored latent: its row, whether it is mirrored, its share of the header."""


def direct_backbone(config: RunConfig) -> BackboneConfig:
    """The same family at the target size: a U-Net gets one level more an octave, as wide as its finest, so that its deepest
    level and its attention stay at their sides in pixels; a DiT keeps its patches and sees more of them."""
    network, octaves = config.backbone, len(config.sizes) - 1
    if network.kind == "dit":
        return network
    return dataclasses.replace(
        network,
        channels=(network.channels[0],) * octaves + network.channels,
        attention_levels=tuple(level + octaves for level in network.attention_levels),
    )


class StagePlanner:
    """Turns what a prober finds into the plan of a run of `count` images."""

    def __init__(self, config: RunConfig, count: int, channels: int, prober: Prober, *, timed: bool) -> None:
        self.config, self.count, self.prober, self.timed = config, count, prober, timed
        self.rows = math.ceil(count * encoded_share(config)) * (2 if config.mirror else 1)
        self.pixels = channels * config.base**2  # numbers in one latent
        sizes = {size: count * channels * size**2 for size in config.sizes}
        self.data_bytes = sum(sizes.values()) + HEADER * len(sizes)
        on_cpu = prober.runtime.device.type == "cpu"
        # Small sets are kept in memory, larger ones are read through the page cache; on a GPU neither is in its memory.
        self.shared_bytes = self.data_bytes if on_cpu and self.data_bytes < 2**30 else 0
        self.latent_bytes = self.rows * self.pixels * (2 if config.encode.dtype == "float16" else 4)
        self.pair_bytes = config.distill.teacher_pairs.count * self.pixels * 2 if config.makes_pairs else 0
        self.on_cpu = on_cpu

    def stages(self, say: Callable[[str], None]) -> tuple[StagePlan, ...]:
        """Every stage, in order."""
        config, prober = self.config, self.prober
        say("teach")
        if config.teacher.path:
            denoiser, taught, adopted = self._brought()
            found = [adopted]
        else:
            denoiser, taught = prober.teach()
            found = [self._training("teach", config.teach.loop, taught)]
        self.taught = found[0]
        say("encode")
        found.append(
            self._solving(
                "encode", taught, self.rows, encode_calls(config), self.latent_bytes, config.encode.batch_size,
                prober.encode_seconds(denoiser),
            )
        )  # fmt: skip
        if config.distill.latents == "amortised":
            say(AMORTISE)
            held = self.latent_bytes if self.on_cpu else 0
            found.append(self._training(AMORTISE, config.amortise.loop, prober.amortise(denoiser), held=held))
        if self.pair_bytes:
            say("teacher-pairs")
            pairs = config.distill.teacher_pairs
            found.append(
                self._solving(
                    "teacher-pairs", taught, pairs.count, pair_calls(config), self.pair_bytes, pairs.batch_size,
                    prober.pair_seconds(denoiser),
                )
            )  # fmt: skip
        say("distill")
        generator, probe = prober.distill(denoiser)
        held = self.latent_bytes + self.pair_bytes if self.on_cpu else 0
        found.append(self._training("distill", config.distill.loop, probe, held=held))
        for size in config.growth:
            say(stage_name(size))
            octave = config.sizes.index(size) - 1
            rows = self.rows + prior_pool(config, size)
            below = probe
            generator, probe, cached = prober.grow(generator, denoiser, size, rows)
            loop = config.grow.loop_of(octave)
            held = self.latent_bytes + cached if self.on_cpu else 0
            before = rows * below.pass_seconds if cached and self.timed else 0.0
            found.append(self._training(stage_name(size), loop, probe, held=held, before=before))
        return tuple(found)

    def _brought(self) -> tuple[PreconditionedDenoiser, StageProbe, StagePlan]:
        """A teacher from elsewhere, and the stage that takes it over: it is copied."""
        context = self.prober.context
        teacher = fitted(open_brought(context), context, context.num_classes)
        check_crops(self.config, anatomy(teacher.network).stride)
        check_layers(context, teacher.network)
        denoiser, probe = self.prober.brought(teacher)
        weights = probe.footprint.artifact_bytes
        return (
            denoiser,
            probe,
            StagePlan(
                name="teach",
                images=0,
                parameters=probe.footprint.parameters,
                trained=0,
                multiply_adds=0,
                memory_bytes=2 * weights + self.shared_bytes,  # those in memory, and those that are written
                tensor_bytes=weights,
                disk_bytes=weights,
                seconds=weights / self.prober.write_rate if self.timed else None,
            ),
        )

    def texts(self, texts: list[str]) -> StagePlan:
        """The stage `text`; other stages are then told captions.

        Args:
            texts: The different captions.
        """
        loop, probe = self.config.text.two_tower.loop, probe_texts(self.prober, texts)
        self.prober.context = dataclasses.replace(self.prober.context, table=probe.table)
        held = probe.table_bytes if self.on_cpu else 0
        if probe.training is not None:
            stage = self._training("text", loop, probe.training, held=held)
            stage = dataclasses.replace(
                stage,
                disk_bytes=stage.disk_bytes + probe.disk_bytes,
                seconds=None if stage.seconds is None else stage.seconds + probe.seconds,
            )
        else:
            weights = 4 * probe.parameters
            stage = StagePlan(
                name="text",
                images=probe.count,
                parameters=probe.parameters,
                trained=0,
                multiply_adds=probe.multiply_adds,
                memory_bytes=weights + held + self.shared_bytes,
                tensor_bytes=weights,
                disk_bytes=probe.disk_bytes,
                seconds=probe.seconds if self.timed else None,
                in_float32=True,
            )
        self.shared_bytes += held
        return stage

    def latents(self, probe: LatentsProbe) -> StagePlan:
        """What the codec takes before the first stage: every image and mirror, at every size, in half precision."""
        sizes = self.config.sizes
        kept = sum(2 * self.rows * self.pixels * (size // self.config.base) ** 2 + HEADER for size in sizes)
        held = kept if self.on_cpu and kept < 2**30 else 0
        return StagePlan(
            name="latents",
            images=self.rows * len(sizes),
            parameters=probe.parameters,
            trained=0,
            multiply_adds=probe.multiply_adds // len(sizes),
            memory_bytes=4 * probe.parameters + held,
            tensor_bytes=4 * probe.parameters,
            disk_bytes=kept,
            seconds=self.rows * probe.seconds if self.timed else None,
            in_float32=True,
        )

    def price(self, stages: tuple[StagePlan, ...]) -> Price:
        """Against a diffusion model of the target size."""
        config, taught = self.config, self.taught
        direct = taught
        if config.size > config.base:
            large = dataclasses.replace(config, base=config.size, backbone=direct_backbone(config))
            _, probe = self.prober.teach(large)
            direct = self._training("direct", config.teach.loop, probe)
        total = sum(stage.total_multiply_adds for stage in stages)
        seconds = sum((stage.seconds or 0.0) + stage.before_seconds for stage in stages)
        measured = direct.seconds is not None and taught.seconds is not None
        return Price(
            direct=direct,
            pixels=(config.size / config.base) ** 2,
            multiply_adds=direct.multiply_adds / taught.multiply_adds,
            seconds=(direct.seconds or 0.0) / (taught.seconds or math.inf) if measured else None,
            total_multiply_adds=direct.total_multiply_adds / total,
            total_seconds=(direct.seconds or 0.0) / seconds if measured else None,
        )

    def _training(
        self, name: str, loop: LoopConfig, probe: StageProbe, *, held: int = 0, before: float = 0.0
    ) -> StagePlan:
        print_, phases = probe.footprint, probe.phases
        images = loop.steps * loop.batch_size
        mean = round(sum(steps * cost.multiply_adds for steps, cost in phases) / loop.steps)
        saved = max(cost.saved_bytes for _, cost in phases) * (loop.batch_size // loop.micro_batches)
        tensors, seconds = print_.state_bytes + saved, None
        if self.timed:
            previews = 1 + math.ceil(loop.steps / loop.preview_every) if loop.preview_every else 0
            checkpoints = math.ceil(loop.steps / loop.checkpoint_every)
            seconds = sum(steps * cost.seconds for steps, cost in phases)
            seconds += previews * probe.preview_seconds + checkpoints * probe.checkpoint_seconds
        return StagePlan(
            name=name,
            images=images,
            parameters=print_.parameters,
            trained=print_.trained,
            multiply_adds=mean,
            memory_bytes=max(tensors, probe.taken_bytes or 0) + held + self.shared_bytes,
            tensor_bytes=tensors,
            disk_bytes=print_.artifact_bytes,
            scratch_bytes=(loop.keep_checkpoints + 1) * print_.checkpoint_bytes,
            seconds=seconds,
            before_seconds=before,
            memory_measured=probe.taken_bytes is not None,
        )

    def _solving(
        self, name: str, taught: StageProbe, rows: int, calls: int, kept: int, batch: int, seconds: float
    ) -> StagePlan:
        weights = taught.footprint.artifact_bytes
        # Without a gradient only the layers at work hold anything: at most what training keeps of as many images.
        saved = taught.phases[-1][1].saved_bytes * min(batch, rows) // 4
        held = self.shared_bytes + kept if self.on_cpu else 0
        return StagePlan(
            name=name,
            images=rows,
            parameters=taught.footprint.parameters,
            trained=0,
            multiply_adds=calls * taught.pass_multiply_adds,
            memory_bytes=weights + saved + held,
            tensor_bytes=weights + saved,
            disk_bytes=kept + rows * _ROW_BYTES,
            seconds=rows * seconds if self.timed else None,
        )
