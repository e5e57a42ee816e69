"""`pagoda accelerate tune`: settings of a plan for a stated deviation, written beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pagoda.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AccelerateTune:
    """Choose how a model can be sampled cheaper within a stated deviation, and write it beside the model.

    Examples:
      pagoda accelerate tune ~/models/my-pipeline --within 0.05 --prompt "a pagoda at dawn" --steps 50
      pagoda accelerate tune runs/photos --within 0.05
    """

    model: tyro.conf.Positional[str]
    """Folder of a diffusers pipeline, or a run folder, whose diffusion model it is then."""
    within: float
    """Largest deviation that is allowed: relative L2 of the final latents, for every seed."""
    steps: int = 0
    """Steps of a run; 50 for pipelines and 18 for run folders when not given."""
    seeds: int = 4
    """How many seeds are compared; the first is --seed."""
    seed: int = 1000
    """The first seed. Judge the result on others."""
    prompt: tuple[str, ...] = ()
    """Prompts of a text pipeline, used in turn."""
    label: tuple[int, ...] = ()
    """Classes of a class-conditional model, used in turn."""
    solver: Literal["euler", "heun", "dpm2m"] = "euler"
    """Of run folders."""
    saving: Literal["multiply_adds", "seconds"] = "multiply_adds"
    """What counts as cheaper; seconds are those of this machine."""
    out: Path | None = None
    """File to write; `acceleration.json` in the model's folder when not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""

    def run(self) -> None:
        """Tune, report, write."""
        from pagoda.acceleration import save_plans, tune

        if self.seeds < 1 or self.steps < 0:
            raise ConfigError(f"--seeds must be >= 1 and --steps >= 0, got {self.seeds} and {self.steps}.")
        folder = Path(self.model)
        if (folder / "model_index.json").is_file():
            target, sampler, steps = self._pipeline(folder)
        elif (folder / "config.yaml").is_file():
            target, sampler, steps = self._run(folder)
        else:
            raise ArtifactError(
                f"{folder} is neither a diffusers pipeline (no model_index.json) nor a run folder (no config.yaml)."
            )
        tuned = tune(
            target,
            sampler,
            within=self.within,
            seeds=range(self.seed, self.seed + self.seeds),
            saving=self.saving,
            report=lambda candidate: print(f"tried {candidate.plan}", flush=True),
        )
        print(tuned)
        written = save_plans(
            self.out or folder,
            [tuned.best.plan],
            within=self.within,
            steps=steps,
            seeds=[self.seed, self.seed + self.seeds - 1],
            chosen=tuned.best.to_json(),
            tried=[candidate.to_json() for candidate in tuned.tried],
        )
        print(written)

    def _pipeline(self, folder: Path) -> tuple[Any, Callable[[int], Tensor], int]:
        from diffusers import DiffusionPipeline

        from pagoda.acceleration import pipeline_sampler
        from pagoda.training import Runtime

        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        pipeline.to(Runtime(self.device).device)
        pipeline.set_progress_bar_config(disable=True)
        steps = self.steps or 50
        return pipeline, pipeline_sampler(pipeline, steps=steps, prompts=self.prompt, labels=self.label), steps

    def _run(self, folder: Path) -> tuple[Any, Callable[[int], Tensor], int]:
        import torch

        from pagoda.diffusion import Condition, build_solver, sample, suitable_sigmas
        from pagoda.stages.context import load_teacher
        from pagoda.stages.run_folder import RunFolder
        from pagoda.training import Runtime, noise_of_seeds

        if self.prompt:
            raise ConfigError("--prompt is for text pipelines; a run folder takes --label.")
        run, device = RunFolder.open(folder), Runtime(self.device).device
        if run.config().condition == "text":
            raise ConfigError(f"{folder} reads texts; plans are tuned on runs with labels and on text pipelines only.")
        denoiser, facts = load_teacher(run.teacher)
        torch.nn.Module.to(denoiser, device)
        size, channels, classes = run.config().base, int(str(facts["channels"])), int(str(facts["num_classes"]))
        wrong = [label for label in self.label if not 0 <= label < classes]
        if wrong:
            raise ConfigError(f"--label {wrong[0]}: the model knows {classes} classes, counted from 0.")
        steps = self.steps or 18
        sigmas = suitable_sigmas(denoiser, max(2, steps))
        solver = build_solver(self.solver)

        def sampler(seed: int) -> Tensor:
            labels = None
            if classes:
                labels = [self.label[seed % len(self.label)] if self.label else seed % classes]
            z = noise_of_seeds([seed], (channels, size, size)).to(device)
            condition = Condition.of_labels(labels).to(device)
            return sample(denoiser, z, sigmas=sigmas, condition=condition, solver=solver).cpu()

        return denoiser, sampler, steps
