"""A plan as facts: what each stage of a run takes, the price, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pagoda.errors import ResourceError
from pagoda.stages.plan_hardware import Gpu, Limits


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage.

    Attributes:
        name: As in the run folder; "teacher-pairs" is a part of `distill`.
        images: Images that pass, over all steps.
        parameters: Of every network in it.
        trained: Of these, the trained ones.
        multiply_adds: Of one image: forward and backward where it trains, all calls of the solver where it does not.
        memory_bytes: Most that it takes here, apart from PyTorch itself: what a step of it took, where that was measured, or the tensors
            of the networks; beside images, latents and cached outputs where they lie in the same memory.
        tensor_bytes: Weights, gradients, moments, averages and what is kept for the backward pass, counted: what a GPU holds.
        disk_bytes: What it leaves in the run folder.
        scratch_bytes: Checkpoints while it runs.
        seconds: On this machine, previews and checkpoints among them; None where nothing was timed.
        before_seconds: Before the first step, which `seconds` leaves out: the frozen levels' outputs. What else a stage does by then,
            such as reading weights and building networks, is not planned.
        memory_measured: Whether `memory_bytes` was measured.
        in_float32: Whether it is calculated in float32 whatever the run's precision: what neither trains nor asks the teacher.
    """

    name: str
    images: int
    parameters: int
    trained: int
    multiply_adds: int
    memory_bytes: int
    disk_bytes: int
    tensor_bytes: int
    scratch_bytes: int = 0
    seconds: float | None = None
    before_seconds: float = 0.0
    memory_measured: bool = False
    in_float32: bool = False

    @property
    def total_multiply_adds(self) -> int:
        """Of the whole stage."""
        return self.images * self.multiply_adds


@dataclass(frozen=True, kw_only=True)
class Price:
    """What training a diffusion model at the target size would take, over what is planned.

    Attributes:
        direct: That training, of as many images as the stage `teach`.
        pixels: (size / base)^2.
        multiply_adds: Of one training image of the direct model, over one of the teacher.
        seconds: The same, measured; None where nothing was timed.
        total_multiply_adds: Of the direct training, over all stages of the run.
        total_seconds: The same, measured.
    """

    direct: StagePlan
    pixels: float
    multiply_adds: float
    seconds: float | None
    total_multiply_adds: float
    total_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that is known before step 1."""

    base: int
    size: int
    images: int
    device: str
    gpu: Gpu
    gpu_precision: str
    """"float32" or "bf16": what the run's setting becomes on a GPU, which may differ from what it is here."""
    utilisation: float
    limits: Limits
    data_bytes: int
    stages: tuple[StagePlan, ...]
    price: Price | None
    """None where the teacher is brought: then no diffusion model is trained."""
    factor: int = 1
    """How many times larger images are than `base` and `size`: the factor of the codec of a run on latents."""

    @property
    def disk_bytes(self) -> int:
        """Most that the run folder takes at any moment: what stages leave, and the largest checkpoints."""
        return self.kept_bytes + max(stage.scratch_bytes for stage in self.stages)

    @property
    def kept_bytes(self) -> int:
        """What stays when the run is done, apart from pictures, logs and the report."""
        return self.data_bytes + sum(stage.disk_bytes for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def multiply_adds(self) -> int:
        """Of all stages."""
        return sum(stage.total_multiply_adds for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """On this machine, over all stages; None where nothing was timed."""
        if any(stage.seconds is None for stage in self.stages):
            return None
        return sum((stage.seconds or 0.0) + stage.before_seconds for stage in self.stages)

    def gpu_hours(self, stage: StagePlan) -> float:
        """Hours of a stage on the named GPU, at the assumed share of its rate in the precision of the stage."""
        return self.gpu.hours(stage.total_multiply_adds, self.utilisation, self.precision_on_gpu(stage))

    def precision_on_gpu(self, stage: StagePlan) -> str:
        """ "float32" or "bf16": what a stage is calculated in there."""
        return "float32" if stage.in_float32 else self.gpu_precision

    def gpu_bytes(self, stage: StagePlan) -> int:
        """Memory that the tensors of a stage take on a GPU; images and latents lie outside of it."""
        return stage.tensor_bytes

    @property
    def too_large(self) -> tuple[StagePlan, ...]:
        """Stages that do not fit in the memory of the named GPU."""
        return tuple(stage for stage in self.stages if self.gpu_bytes(stage) > self.gpu.memory_gib * 2**30)

    def require_fit(self, *, on_gpu: bool = False) -> None:
        """Refuse what this machine has no room for.

        Args:
            on_gpu: Whether the run shall also fit in the memory of the named GPU.

        Raises:
            ResourceError: too little disk or memory; the largest stage is named, and what makes it smaller.
        """
        if self.disk_bytes > self.limits.disk_bytes:
            raise ResourceError(
                f"the run needs {gib(self.disk_bytes)} of disk ({gib(self.data_bytes)} of them small copies of the images), "
                f"and {gib(self.limits.disk_bytes)} are free. Free {gib(self.disk_bytes - self.limits.disk_bytes)}, name "
                "another folder, or lower --size or loop.keep_checkpoints."
            )
        largest = max(self.stages, key=lambda stage: stage.memory_bytes)
        if largest.memory_bytes > self.limits.memory_bytes:
            raise ResourceError(
                f"stage `{largest.name}` needs {gib(largest.memory_bytes)} of memory, and {gib(self.limits.memory_bytes)} "
                f"are free. {_smaller(largest)}"
            )
        if on_gpu and self.too_large:
            largest = max(self.too_large, key=self.gpu_bytes)
            raise ResourceError(
                f"stage `{largest.name}` needs {gib(self.gpu_bytes(largest))} of memory, and a GPU {self.gpu.name} has "
                f"{self.gpu.memory_gib:g} GiB. {_smaller(largest)} Or name a larger GPU."
            )

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, totals and hours among them."""
        facts = dataclasses.asdict(self)
        facts["stages"] = [
            {
                **dataclasses.asdict(s),
                "total_multiply_adds": s.total_multiply_adds,
                "gpu_hours": self.gpu_hours(s),
                "gpu_precision": self.precision_on_gpu(s),
            }
            for s in self.stages
        ]
        totals = {name: getattr(self, name) for name in ("multiply_adds", "memory_bytes", "disk_bytes", "kept_bytes")}
        facts["total"] = {**totals, "seconds": self.seconds, "gpu_hours": sum(map(self.gpu_hours, self.stages))}
        return facts


def _smaller(stage: StagePlan) -> str:
    """What makes a stage fit."""
    name = "grow" if stage.name.startswith("grow") else stage.name.replace("teacher-pairs", "distill")
    return f"Raise {name}.loop.micro_batches, lower the batch size, or choose a smaller backbone."


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
