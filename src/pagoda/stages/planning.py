"""What a run will take, before its first step: parameters, multiply-adds, memory, disk and hours of every stage, and its price.

The price is that of the same family of diffusion model trained directly at the target size, on as many images. It is given as
three ratios that answer different questions: of pixels (what "64 x cheaper" means), of multiply-adds, and of measured time.

Source of the first ratio: Kim et al. 2024, PaGoDA, arXiv:2405.14822.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pagoda.data import open_source
from pagoda.errors import ConfigError, ResourceError, ShapeError
from pagoda.networks import ImageCodec, build_backbone, count_teacher, num_parameters
from pagoda.stages.config import RunConfig
from pagoda.stages.image_shares import settled
from pagoda.stages.plan_hardware import UTILISATION, Limits, find_gpu
from pagoda.stages.plan_model import RunPlan, gib
from pagoda.stages.plan_probe import Prober
from pagoda.stages.plan_stages import HEADER, StagePlanner
from pagoda.stages.plan_texts import captions_of
from pagoda.stages.run_codec import open_named_codec
from pagoda.training import Runtime, resolve_precision


def plan_run(
    config: RunConfig,
    *,
    folder: Path | str = ".",
    gpu: str = "A100",
    utilisation: float = UTILISATION,
    probe_seconds: float = 3.0,
    limits: Limits | None = None,
    progress: Callable[[str], None] | None = None,
) -> RunPlan:
    """What a run will take on this machine. Its images are counted, not read.

    Args:
        config: The run.
        folder: Where it shall be written, for the space on that disk.
        gpu: A name of `GPUS`.
        utilisation: Share of that GPU's peak rate in the precision that the run trains in on a GPU, in (0, 1].
        probe_seconds: Seconds of timing a stage; 0 times nothing.
        limits: Disk and memory; None asks this machine.
        progress: Called with the name of each stage before it is probed.

    Raises:
        ConfigError: an unknown GPU or precision, a utilisation out of range, a network whose stride does not divide the base, a teacher
            that does not suit the run, or weights that are assigned by an agreement that cannot be told before there is a teacher.
        DataError: no such data, or no captions where a run is told them.
        ArtifactError: no codec, teacher or text encoder where one is named.
        ShapeError: a codec or a teacher for images of other channels or another size.
        ResourceError: not even the weights fit in memory. Use `RunPlan.require_fit` for the rest.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"the utilisation is a share in (0, 1], got {utilisation}.")
    if config.guidance.assignment == "matched":
        raise ConfigError(
            "guidance.assignment=matched asks how well the teacher's images agree with what they show, and before the run there is no "
            "teacher; plan with guidance.assignment=teacher, which takes the same pairs."
        )
    if config.base % config.backbone.stride and not config.teacher.path:
        raise ConfigError(
            f"base {config.base} is not divisible by the network's stride {config.backbone.stride}. "
            f"Use a multiple of {config.backbone.stride}, or fewer backbone.channels."
        )
    card, runtime = find_gpu(gpu), Runtime(config.device, config.precision)
    source = open_source(config.data, options=config.source)
    config = settled(config, folder, images=len(source))
    limits = limits or Limits.of_machine(folder, runtime)
    codec = open_named_codec(config) if config.codec else None
    if codec is not None and codec.image_channels != source.channels:
        raise ShapeError(
            f"the codec is for images of {codec.image_channels} channels, the data have {source.channels}."
        )
    channels = source.channels if codec is None else codec.latent_channels
    _check_weights(config, channels, source.num_classes, limits)
    say = progress or (lambda name: None)
    before = torch.random.get_rng_state()
    with tempfile.TemporaryDirectory(prefix="pagoda-plan-") as scratch:
        prober = Prober(config, source, Path(scratch), runtime, probe_seconds, codec, limits.memory_bytes / 2)
        planner = StagePlanner(config, len(source), channels, prober, timed=probe_seconds > 0)
        texts = None
        if config.condition == "text":
            say("text")
            texts = planner.texts(captions_of(source))
        stages = planner.stages(say)
        if texts is not None:
            stages = (texts, *stages)
        if codec is not None:
            say("latents of the images")
            planner.data_bytes = _picture_bytes(config, codec, len(source))
            stages = (planner.latents(prober.latents(codec)), *stages)
        price = None
        if not config.teacher.path:
            say("a diffusion model of the target size")
            price = planner.price(stages)
    torch.random.set_rng_state(before)
    return RunPlan(
        base=config.base,
        size=config.size,
        images=len(source),
        device=str(runtime.device),
        gpu=card,
        gpu_precision=resolve_precision(config.precision, on_cpu=False),
        utilisation=utilisation,
        limits=limits,
        data_bytes=planner.data_bytes,
        stages=stages,
        price=price,
        factor=1 if codec is None else codec.factor,
    )


def _picture_bytes(config: RunConfig, codec: ImageCodec, count: int) -> int:
    """Small copies of the images themselves, beside which their latents lie."""
    sides = [size * codec.factor for size in config.sizes]
    return sum(count * codec.image_channels * side**2 + HEADER for side in sides)


def _check_weights(config: RunConfig, channels: int, num_classes: int, limits: Limits) -> None:
    """Refuse a network of which not even the weights, gradients, moments and averages fit: probing it would exhaust the machine."""
    if config.teacher.path:
        whose, parameters, choose = "teacher's network", count_teacher(config.teacher.path), "teacher"
    else:
        with torch.device("meta"):
            model = build_backbone(
                config.backbone, image_size=config.base, in_channels=channels, num_classes=num_classes
            )
        whose, parameters, choose = "network", num_parameters([model]), "backbone"
    needed = 5 * 4 * parameters
    if needed > limits.memory_bytes:
        raise ResourceError(
            f"the {whose} has {parameters / 1e6:.0f} M parameters: training it takes {gib(needed)} for its state "
            f"alone, and {gib(limits.memory_bytes)} of memory are free. Choose a smaller {choose}, or a larger machine."
        )
