"""The model server: loads runs, keeps requests in order, and answers several with one call of the network.

Each call of a network has the same number of rows: what is missing is filled up with copies. With it every image has the same bits
whoever else asks at the same moment, which is tried out when a model is loaded; where it does not hold, each image gets a call of its own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.app.catalog import RunCatalog
from pagoda.app.jobs import ImageRequest, Job, JobCancelledError, JobQueue, TaskRequest
from pagoda.errors import ArtifactError, ConfigError, PagodaError, ShapeError
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.networks.loading import WEIGHTS
from pagoda.stages.context import teacher_facts
from pagoda.stages.exploring import LatentPoint, render_points, rows_are_independent
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import check_labels, load_generator


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits of the model server."""

    batch_size: int = 8
    """Rows of every call of a network. More serves crowds faster, fewer a single visitor."""
    max_images: int = 64
    """Images of a request."""
    max_waiting: int = 128
    """Requests that wait at most, of all clients."""
    max_waiting_per_client: int = 64
    """Requests that wait at most, of one client."""
    time_limit: float = 120.0
    """Seconds from the arrival of a request to the moment where it is given up."""
    max_models: int = 2
    """Models that are kept in memory; the one that was not used for longest goes first."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_images", "max_waiting", "max_waiting_per_client", "max_models"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if not self.time_limit > 0:
            raise ConfigError(f"time_limit must be > 0 seconds, got {self.time_limit}.")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request for images gets.

    Attributes:
        images: Side -> images (N, C, side, side) in [-1, 1], on the CPU.
        model: Hash of the generator that made them.
        batch_size: Rows of each call that made them.
    """

    images: dict[int, Tensor]
    model: str
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A generator in memory.

    Attributes:
        run: The name of its run.
        generator: In evaluation mode.
        hash: Of its weights.
        class_names: One per class, or None.
        batch_size: Rows of its calls: the server's, or 1 where rows of a batch do not come out alike.
        stamp: File, size and time of its weights: another one means that the run has gone on.
    """

    run: str
    generator: OneStepGenerator
    hash: str
    class_names: list[str] | None
    batch_size: int
    stamp: tuple[str, int, int]


class ModelServer:
    """Answers requests one after another in a thread of its own. Close it when done, or use it as a context.

    Args:
        catalog: Which runs there are.
        config: Limits.
    """

    def __init__(self, catalog: RunCatalog, config: ServerConfig | None = None) -> None:
        self.catalog = catalog
        self.config = ServerConfig() if config is None else config
        self._queue = JobQueue(
            most=self.config.max_waiting,
            most_per_client=self.config.max_waiting_per_client,
            seconds=self.config.time_limit,
        )
        self._changed = threading.Condition()
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="pagoda-models", daemon=True)
        self._thread.start()

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, request: ImageRequest | TaskRequest, *, client: str = "") -> Job:
        """Take a request in; `Job.result` waits for the outcome: an `Answer`, or what the work returns.

        Raises:
            ConfigError: more images than a request may have, none, or labels of another number.
            ArtifactError: no such run.
            ResourceError: the queue is full.
        """
        if isinstance(request, ImageRequest):
            if not 1 <= len(request.points) <= self.config.max_images:
                raise ConfigError(f"a request takes 1 to {self.config.max_images} images, got {len(request.points)}.")
            if request.labels is not None and len(request.labels) != len(request.points):
                raise ConfigError(f"{len(request.labels)} labels for {len(request.points)} images; give one per image.")
        self.catalog.open(request.run)
        with self._changed:
            if self._closing:
                raise JobCancelledError("the server is closing.")
            job = self._queue.add(request, client)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Give a job up: at once while it waits, where it next looks while it runs."""
        with self._changed:
            job.ask_to_stop()
            if job.state == "waiting":
                self._end(job, "cancelled", error=JobCancelledError("cancelled"))

    def cancel_client(self, client: str) -> int:
        """Give up all jobs of a client, who has left or has asked for it; returns how many."""
        with self._changed:
            jobs = self._queue.of_client(client)
        for job in jobs:
            self.cancel(job)
        return len(jobs)

    def place(self, job: Job) -> int:
        """How many are served before it."""
        with self._changed:
            return self._queue.place(job)

    @property
    def waiting(self) -> int:
        """Jobs that are not over."""
        with self._changed:
            return len(self._queue)

    def close(self) -> None:
        """Cancel everything and wait for the thread to end."""
        with self._changed:
            self._closing = True
            for job in self._queue.all():
                job.ask_to_stop()
                if job.state == "waiting":
                    self._end(job, "cancelled", error=JobCancelledError("the server is closing."))
            self._changed.notify_all()
        self._thread.join()

    def model(self, name: str) -> LoadedModel:
        """The newest generator of a run, loaded when it is not or when the run has gone on. Any thread may ask.

        Raises:
            PagodaError: no such run, none of this version, or weights that are damaged.
        """
        run = self.catalog.open(name)
        with self._loading:
            stamp = _stamp(run)
            model = self._models.get(name)
            if model is None or model.stamp != stamp:
                self._models.pop(name, None)
                while len(self._models) >= self.config.max_models:
                    self._models.popitem(last=False)
                model = self._load(name, run, stamp)
                self._models[name] = model
            self._models.move_to_end(name)
            return model

    def _load(self, name: str, run: RunFolder, stamp: tuple[str, int, int]) -> LoadedModel:
        try:
            generator = load_generator(run, device=self.config.device)
        except OSError as error:  # removed between two looks
            raise ConfigError(f"the generator of {name} cannot be read ({error.strerror or error}).") from error
        batch_size = self.config.batch_size
        if batch_size > 1 and not rows_are_independent(generator, batch_size):
            warnings.warn(
                f"{name}: images of one batch depend on each other's place in their last bits here; every image gets a call of its own.",
                stacklevel=2,
            )
            batch_size = 1
        names = teacher_facts(run.teacher).get("class_names")
        return LoadedModel(
            run=name,
            generator=generator,
            hash=model_hash(generator),
            class_names=list(names) if isinstance(names, list) else None,
            batch_size=batch_size,
            stamp=stamp,
        )

    def _serve(self) -> None:
        while True:
            with self._changed:
                for job in self._queue.expired():
                    self._end(job, "failed", error=job.too_late())
                head = self._queue.head()
                if head is None:
                    if self._closing:
                        return
                    self._changed.wait(1.0)
                    continue
                head.state = "running"
            if isinstance(head.request, TaskRequest):
                self._serve_task(head, head.request)
            else:
                self._serve_images(head)

    def _serve_task(self, job: Job, request: TaskRequest) -> None:
        try:
            job.advance(0)
            result = request.work(job)
        except JobCancelledError as error:
            self._finish(job, "cancelled", error=error)
        except BaseException as error:
            self._finish(job, "failed", error=error)
        else:
            self._finish(job, "done", result)

    def _serve_images(self, head: Job) -> None:
        """One call of the network: rows of the first job, and of those that fit beside it."""
        assert isinstance(head.request, ImageRequest)
        try:
            model = self.model(head.request.run)
        except BaseException as error:
            self._finish(head, "failed", error=error)
            return
        with self._changed:
            rows = self._choose_rows(head, model)
        if not rows:
            return
        try:
            images = _render(model, rows, head.request)
        except BaseException as error:
            for job in dict.fromkeys(job for job, _ in rows):
                self._finish(job, "failed", error=error)
            return
        with self._changed:
            for job in dict.fromkeys(job for job, _ in rows):
                mine = [i for i, (other, _) in enumerate(rows) if other is job]
                job.pieces.append({size: made[mine] for size, made in images.items()})
                try:
                    job.advance(job.finished + len(mine))
                except JobCancelledError as error:
                    self._end(job, "cancelled", error=error)
                except PagodaError as error:
                    self._end(job, "failed", error=error)
                if job.finished == job.total and not job.is_over:
                    whole = {size: torch.cat([piece[size] for piece in job.pieces]) for size in job.pieces[0]}
                    self._end(job, "done", Answer(images=whole, model=model.hash, batch_size=model.batch_size))

    def _choose_rows(self, head: Job, model: LoadedModel) -> list[tuple[Job, int]]:
        """(job, image) of each row; jobs that this model cannot answer end here, one by one. The lock is held."""
        rows: list[tuple[Job, int]] = []
        for job in self._queue.compatible(head):
            free = model.batch_size - len(rows)
            if not free:
                break
            try:
                _check(model, job)
            except PagodaError as error:
                self._end(job, "failed", error=error)
                continue
            job.state, job.model = "running", model.hash
            rows += [(job, i) for i in range(job.finished, min(job.total, job.finished + free))]
        return rows

    def _finish(self, job: Job, state: Any, result: Any = None, error: BaseException | None = None) -> None:
        with self._changed:
            self._end(job, state, result, error)

    def _end(self, job: Job, state: Any, result: Any = None, error: BaseException | None = None) -> None:
        """Take a job out and give its outcome; the lock is held."""
        self._queue.remove(job)
        job.end(state, result, error)


def _check(model: LoadedModel, job: Job) -> None:
    """Refuse what this model cannot make.

    Raises:
        ConfigError: labels that it does not have.
        ShapeError: sizes that it does not have.
        ArtifactError: the run has gone on since the first images of this request.
    """
    request, generator = job.request, model.generator
    assert isinstance(request, ImageRequest)
    if request.guidance != 1 and not generator.num_classes:
        raise ConfigError(f"{model.run} has no classes to guide towards; leave guidance at 1, got {request.guidance}.")
    check_labels(request.labels, [point.seeds[0] for point in request.points], generator.num_classes)
    missing = [size for size in request.sizes if size not in generator.sizes]
    if missing:
        raise ShapeError(f"{model.run} makes images of {generator.sizes} px, none of {missing[0]}.")
    if job.model not in ("", model.hash):
        raise ArtifactError(f"{model.run} got a new generator while your images were being made. Ask again.")


def _render(model: LoadedModel, rows: list[tuple[Job, int]], request: ImageRequest) -> dict[int, Tensor]:
    """Images of the rows, in a batch of the model's fixed size."""
    points: list[LatentPoint] = []
    labels: list[int] = []
    for job, i in rows:
        assert isinstance(job.request, ImageRequest)
        points.append(job.request.points[i])
        if job.request.labels is not None:
            labels.append(job.request.labels[i])
    missing = model.batch_size - len(points)
    points += points[-1:] * missing
    labels += labels[-1:] * missing
    made = render_points(
        model.generator, points, labels or None, sizes=request.sizes or None, guidance=request.guidance
    )
    return {size: images[: len(rows)] for size, images in made.items()}


def _stamp(run: RunFolder) -> tuple[str, int, int]:
    """Which weights lie there now.

    Raises:
        ConfigError: none, or the run has just been removed.
    """
    sizes = run.generator_sizes()
    if not sizes:
        raise ConfigError(f"{run.path.name} has no generator yet: its training has not come so far.")
    path = run.generator(sizes[-1]) / WEIGHTS
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{run.path.name} has lost its generator ({error.strerror}).") from error
    return (str(path), found.st_size, found.st_mtime_ns)
