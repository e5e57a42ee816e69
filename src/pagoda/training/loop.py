"""The one training loop: any objective, any number of networks, resumable to the last bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError
from pagoda.files import check_disk
from pagoda.training.checkpoint import TrainState, clean_up, list_checkpoints, load_checkpoint, save_checkpoint
from pagoda.training.health import HealthGuard
from pagoda.training.memory import peak_memory_mib
from pagoda.training.objective import BatchT, Objective, Trainable
from pagoda.training.optim import EMA
from pagoda.training.randomness import StepRandom, derive_seed
from pagoda.training.runtime import Runtime
from pagoda.training.schedule import ScheduledEvaluation
from pagoda.training.tracking import MetricLog, StatusLine, clock


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how a network is trained, whatever the objective."""

    steps: int = 1000
    """Updates of every network."""
    batch_size: int = 128
    """Samples a step, over all processes and micro-batches."""
    micro_batches: int = 1
    """Parts that a process works its share of the batch in (gradient accumulation)."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl and of the status line."""
    preview_every: int = 200
    """Steps between grids of samples from raw and averaged weights; 0 draws none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.preview_every < 0:
            raise ConfigError(f"preview_every must be >= 0, got {self.preview_every}.")
        if self.batch_size % self.micro_batches:
            raise ConfigError(f"batch_size {self.batch_size} is not divisible by micro_batches {self.micro_batches}.")


def micro_batches(runtime: Runtime, config: LoopConfig) -> list[slice]:
    """This process's rows of a batch, in the parts that it works them in.

    Raises:
        ConfigError: the batch cannot be divided among the processes, or a process's share into micro-batches.
    """
    rows = runtime.rows(config.batch_size)
    share = rows.stop - rows.start
    if share % config.micro_batches:
        raise ConfigError(
            f"{share} samples a process are not divisible by micro_batches {config.micro_batches}; "
            f"change batch_size {config.batch_size} or micro_batches."
        )
    size = share // config.micro_batches
    return [slice(rows.start + i * size, rows.start + (i + 1) * size) for i in range(config.micro_batches)]


class Trainer(Generic[BatchT]):
    """Trains an objective in a folder; running it again continues where it stopped.

    Args:
        objective: What to train.
        config: How long and how.
        runtime: Device, precision, processes.
        folder: Checkpoints and previews go here.
        stage: Name of the stage in logs.
        seed: Seed of every draw.
        order: `order(step, batch_size) -> indices (batch_size,)`: data order as a pure function.
        log: Where metrics go; None logs nothing.
        fingerprint: Identifies what is being trained; a checkpoint of another fingerprint is refused.
        status: The line for people.
        preview: Called with (step, "raw" | "ema", images) to write a grid.
        evaluation: What is measured of the averaged networks now and then, beside training; on the main process alone.
    """

    def __init__(
        self,
        objective: Objective[BatchT],
        config: LoopConfig,
        *,
        runtime: Runtime,
        folder: Path,
        stage: str,
        seed: int,
        order: Callable[[int, int], Tensor],
        log: MetricLog | None = None,
        fingerprint: str = "",
        status: StatusLine | None = None,
        preview: Callable[[int, str, Tensor], None] | None = None,
        evaluation: ScheduledEvaluation | None = None,
    ) -> None:
        self.objective = objective
        self.config = config
        self.runtime = runtime
        self.folder = folder
        self.stage = stage
        self.seed = seed
        self.order = order
        self.log = log
        self.fingerprint = fingerprint
        self.status = status or StatusLine(quiet=True)
        self.preview = preview
        self.evaluation = evaluation if runtime.is_main else None
        self.health = HealthGuard()
        self.step = 0
        self.seconds = 0.0
        self._configs: dict[str, Trainable] = dict(objective.trainables())
        self._updates = list(objective.updates())
        # The average follows a network once a step, behind its last update.
        self._last_update = {network: index for index, (_, network) in enumerate(self._updates)}
        self.states = {
            name: TrainState(
                trainable.module,
                trainable.optimizer.build(trainable.module.parameters()),
                None if trainable.ema is None else EMA(trainable.module, trainable.ema),
            )
            for name, trainable in self._configs.items()
        }
        objective.receive_averages({name: s.ema.module for name, s in self.states.items() if s.ema is not None})
        self._rows = micro_batches(runtime, config)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; returns the steps done so far.

        Raises:
            ArtifactError: the checkpoint is truncated, foreign or of another run.
        """
        found = list_checkpoints(self.checkpoints)
        if found:
            facts = load_checkpoint(found[-1], self.states, expect={"fingerprint": self.fingerprint})
            self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
        if self.runtime.is_main:
            clean_up(self.checkpoints)
            if self.log is not None:
                self.log.rewind(self.step)
        self.runtime.barrier()
        return self.step

    def run(self) -> dict[str, nn.Module]:
        """Train to the last step.

        Returns:
            The networks to use, by name: averaged where an average is kept, else raw.

        Raises:
            TrainingError: the run is no longer healthy.
            ResourceError: the disk has no room for the checkpoints.
        """
        self.resume()
        if self.step < self.config.steps:
            if self.runtime.is_main:
                size = sum(_num_bytes(state) for state in self.states.values())
                more = max(1, self.config.keep_checkpoints + 1 - len(list_checkpoints(self.checkpoints)))
                check_disk(self.folder, more * size, f"{more} more checkpoints of stage {self.stage}")
            self._train()
        return self.averaged()

    def averaged(self) -> dict[str, nn.Module]:
        """The networks to use: averaged where an average is kept, else raw."""
        return {name: state.module if state.ema is None else state.ema.module for name, state in self.states.items()}

    def _train(self) -> None:
        config, started = self.config, time.monotonic()
        spent, first = self.seconds, self.step
        logged_at, logged_step = started, self.step
        batches = self._batches()
        self._show_preview()
        while self.step < config.steps:
            figures = self.train_step(next(batches))
            self.step += 1
            now = time.monotonic()
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                figures = {name: float(value) for name, value in figures.items()}
                rate = (self.step - logged_step) * config.batch_size / max(now - logged_at, 1e-9)
                figures |= {"images_per_second": rate, "memory_mib": peak_memory_mib(self.runtime.device)}
                figures["seconds"] = spent + now - started
                self._report(figures, (now - started) / (self.step - first) * (config.steps - self.step))
                logged_at, logged_step = now, self.step
            if config.preview_every and (self.step % config.preview_every == 0 or last):
                self._show_preview()
            if self.evaluation is not None and self.evaluation.is_due(self.step, last):
                self._log_evaluations(wait=True)  # one at a time, so that measuring cannot pile up
                self.evaluation.start(self.step, self.averaged())
            checkpoint = self.step % config.checkpoint_every == 0 or last
            self._log_evaluations(wait=checkpoint)  # a checkpoint vouches for everything that was measured before it
            if checkpoint:
                self.seconds = spent + time.monotonic() - started
                self.save()
        if self.evaluation is not None:
            self.evaluation.close()
        self.status.done()
        if self.log is not None:
            self.log.close()

    def _log_evaluations(self, *, wait: bool) -> None:
        """Log what has been measured since; the figures carry the step that they belong to."""
        if self.evaluation is None:
            return
        for step, figures in self.evaluation.collect(wait=wait):
            if self.log is not None:
                self.log.write(step, figures)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        if self.runtime.is_main:
            info = {"fingerprint": self.fingerprint, "seconds": self.seconds, "seed": self.seed, "stage": self.stage}
            save_checkpoint(self.checkpoints, self.step, self.states, info=info, keep_last=self.config.keep_checkpoints)
        self.runtime.barrier()

    def _batches(self) -> Any:
        """Batches from the present step on; on a GPU they are made one step ahead in another thread."""

        def make(step: int) -> list[tuple[BatchT, StepRandom]]:
            indices = self.order(step, self.config.batch_size)
            parts = []
            for rows in self._rows:
                random = StepRandom(self.seed, step, self.config.batch_size, rows, self.stage)
                parts.append((self.objective.batch(indices[rows], random), random))
            return parts

        if self.runtime.device.type == "cpu":
            for step in range(self.step, self.config.steps):
                yield make(step)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: Future[list[tuple[BatchT, StepRandom]]] = pool.submit(make, self.step)
            for step in range(self.step, self.config.steps):
                ready = ahead.result()
                if step + 1 < self.config.steps:
                    ahead = pool.submit(make, step + 1)
                yield ready

    def train_step(self, parts: list[tuple[BatchT, StepRandom]]) -> dict[str, Any]:
        """Update every network once on the micro-batches of this step; returns the figures to log."""
        figures: dict[str, Any] = {}
        # Objectives draw from `StepRandom`; this covers layers that draw from the global generator, such as dropout.
        torch.manual_seed(derive_seed(self.seed, self.stage, self.step, self.runtime.rank))
        stepped: set[str] = set()
        for index, (name, network) in enumerate(self._updates):
            state, settings = self.states[network], self._configs[network].optimizer
            state.optimizer.zero_grad(set_to_none=True)
            total, updated = torch.zeros((), device=self.runtime.device), False
            sums: dict[str, Tensor | float] = {}
            for batch, random in parts:
                with self.runtime.autocast():
                    losses = self.objective.losses(name, batch, random, self.runtime)
                if losses is None:
                    continue
                updated = True
                (losses.total / len(parts)).backward()
                total += losses.total.detach() / len(parts)
                for key, value in losses.named.items():
                    sums[key] = sums.get(key, 0.0) + value.detach().float().mean() / len(parts)
            if not updated:
                self._follow(index, network, stepped)
                continue
            trained = [p for group in state.optimizer.param_groups for p in group["params"]]
            self.runtime.mean_gradients(trained)
            total = self.runtime.mean(total)
            limit = settings.clip or float("inf")
            norm = nn.utils.clip_grad_norm_(trained, limit, foreach=True)
            if self.health.allow_update(name, self.step, float(total), float(norm)):
                for group in state.optimizer.param_groups:
                    group["lr"] = settings.lr_at(self.step, self.config.steps)
                state.optimizer.step()
                stepped.add(network)
            self._follow(index, network, stepped)
            figures |= {f"{name}/{key}": value for key, value in sums.items()}
            figures |= {f"{name}/loss": total, f"{name}/gradient_norm": norm}
            if "win_rate" in sums:
                self.health.watch_win_rate(self.step, float(sums["win_rate"]))
        return figures

    def _follow(self, index: int, network: str, stepped: set[str]) -> None:
        """Move a network's average behind its last update of the step."""
        ema = self.states[network].ema
        if ema is not None and network in stepped and self._last_update[network] == index:
            ema.update(self.step)

    def _report(self, figures: dict[str, float], seconds_left: float) -> None:
        if not self.runtime.is_main:
            return
        if self.log is not None:
            self.log.write(self.step, figures)
        losses = "  ".join(f"{n.removesuffix('/loss')} {v:.4f}" for n, v in figures.items() if n.endswith("/loss"))
        self.status.show(
            f"{self.stage}  step {self.step}/{self.config.steps}  {losses}  {figures['images_per_second']:.0f} img/s  "
            f"{figures['memory_mib']:.0f} MiB  {clock(seconds_left)} left"
        )

    @torch.no_grad()
    def _show_preview(self) -> None:
        if not self.config.preview_every or not self.runtime.is_main:
            return
        kinds: dict[str, Mapping[str, nn.Module]] = {"raw": {n: s.module for n, s in self.states.items()}}
        if any(state.ema is not None for state in self.states.values()):
            kinds["ema"] = self.averaged()
        for kind, modules in kinds.items():
            images = self.objective.preview(modules)
            if images is None:
                return
            if kind == "raw" and self.step:
                self.health.watch_preview(self.step, images)
            if self.preview is not None:
                self.preview(self.step, kind, images)


def _num_bytes(state: TrainState) -> int:
    """Bytes of a network in a checkpoint: its weights, two moments, and its average."""
    weights = sum(p.numel() * p.element_size() for p in state.module.parameters())
    trained = sum(p.numel() * p.element_size() for p in state.module.parameters() if p.requires_grad)
    return weights * (1 if state.ema is None else 2) + 2 * trained
