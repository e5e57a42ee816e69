"""The model server: loads runs, keeps requests in order, and answers several with one call of the network.

Calls of a network have one of a few numbers of rows; what is missing is filled up with copies. Every image then has the same bits
whoever else asks at the same moment. That is tried out: for the smallest call when a model is loaded (where it does not hold, each image
gets a call of its own), for larger ones when a crowd first asks for them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagoda.app.calls import check_request, render_rows
from pagoda.app.catalog import RunCatalog
from pagoda.app.jobs import ImageRequest, Job, JobCancelledError, JobQueue, TaskRequest
from pagoda.app.models import LoadedModel, ModelStore
from pagoda.app.server_config import ServerConfig
from pagoda.errors import ConfigError, PagodaError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request for images gets.

    Attributes:
        images: Side -> images (N, C, side, side) in [-1, 1], on the CPU.
        model: Hash of the generator that made them.
        batch_size: Rows of the smallest call; larger ones give the same bits.
    """

    images: dict[int, Tensor]
    model: str
    batch_size: int


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
        self._models = ModelStore(catalog, self.config)
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
            ConfigError: more images than a request may have, none, or labels or prompts of another number.
            ArtifactError: no such run.
            ResourceError: the queue is full.
        """
        if isinstance(request, ImageRequest):
            if not 1 <= len(request.points) <= self.config.max_images:
                raise ConfigError(f"a request takes 1 to {self.config.max_images} images, got {len(request.points)}.")
            if request.prompts is not None and len(request.prompts) != len(request.points):
                raise ConfigError(
                    f"{len(request.prompts)} prompts for {len(request.points)} images; give one per image."
                )
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
        """The newest generator of a run; see `ModelStore.model`. Any thread may ask."""
        return self._models.model(name)

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
            images = render_rows(model, rows, head.request)
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
                    self._end(job, "done", Answer(images=whole, model=model.hash, batch_size=model.rows.least))

    def _choose_rows(self, head: Job, model: LoadedModel) -> list[tuple[Job, int]]:
        """(job, image) of each row; jobs that this model cannot answer end here, one by one. The lock is held."""
        rows: list[tuple[Job, int]] = []
        waiting = self._queue.compatible(head)
        size = model.rows.choose(sum(job.total - job.finished for job in waiting))
        for job in waiting:
            free = size - len(rows)
            if not free:
                break
            try:
                check_request(model, job)
            except PagodaError as error:
                self._end(job, "failed", error=error)
                continue
            job.state, job.model = "running", model.hash
            rows += [(job, i) for i in range(job.finished, min(job.total, job.finished + free))]
        return rows[: max(model.rows.least, model.rows.choose(len(rows)))]  # fewer than a call where some were refused

    def _finish(self, job: Job, state: Any, result: Any = None, error: BaseException | None = None) -> None:
        with self._changed:
            self._end(job, state, result, error)

    def _end(self, job: Job, state: Any, result: Any = None, error: BaseException | None = None) -> None:
        """Take a job out and give its outcome; the lock is held."""
        self._queue.remove(job)
        job.end(state, result, error)
