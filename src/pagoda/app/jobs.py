"""Requests that wait for their turn: a bounded queue, in order of arrival, fair between clients, each with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pagoda.errors import PagodaError, ResourceError
from pagoda.stages.exploring import LatentPoint

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class JobCancelledError(PagodaError):
    """The one who asked has cancelled, or has left."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images of a run's generator.

    Args:
        run: Name in the catalog.
        points: One per image.
        labels: One class per image; None = by the seed, or no classes.
        prompts: One text per image, for a run of texts; None = captions of its data, by the seed.
        sizes: Sides of the images in pixels; the largest when empty.
        guidance: See `render_points`.
    """

    run: str
    points: tuple[LatentPoint, ...]
    labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    sizes: tuple[int, ...] = ()
    guidance: float = 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests of equal keys may share a batch."""
        return (self.run, self.sizes, self.guidance, self.labels is None)


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Work of another sort that needs the model to itself for a while.

    Args:
        run: Name in the catalog.
        work: Takes the job, to tell it how far it is and to ask whether to stop; what it returns is the result.
    """

    run: str
    work: Callable[[Job], Any]


@dataclass(eq=False)
class Job:
    """A request on its way. Made by `JobQueue.add`; read from any thread.

    Attributes:
        request: What was asked.
        client: Who asked.
        turn: Round of the queue in which it is served: later requests of one client come after other clients' first ones.
        serial: Place in the order of arrival.
        deadline: Moment (`time.monotonic`) at which it is given up.
        state: How far it is.
        finished: Images, or steps, that are done, of `total`.
        model: Hash of the model that made its first images.
        ended_at: Moment (`time.monotonic`) at which it was over; None before.
    """

    request: ImageRequest | TaskRequest
    client: str
    turn: int
    serial: int
    deadline: float
    total: int
    state: State = "waiting"
    finished: int = 0
    model: str = ""
    ended_at: float | None = None
    _result: Any = None
    _error: BaseException | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    pieces: list[dict[int, Tensor]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether there is a result, an error, or nobody who wants it."""
        return self._over.is_set()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end.

        Raises:
            TimeoutError: it is not over after `timeout` seconds.
            JobCancelledError: it was cancelled.
            PagodaError: what went wrong.
        """
        if not self._over.wait(timeout):
            raise TimeoutError(f"not over after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._result

    def advance(self, finished: int, total: int | None = None) -> None:
        """Say how far the work is, and stop here when it is no longer wanted.

        Raises:
            JobCancelledError: cancelled meanwhile.
            ResourceError: the time limit is over.
        """
        self.finished, self.total = finished, self.total if total is None else total
        if self._stop.is_set():
            raise JobCancelledError("cancelled")
        if time.monotonic() > self.deadline:
            raise self.too_late()

    def too_late(self) -> ResourceError:
        """The error of a job whose time is over."""
        return ResourceError(
            f"the time limit of a request is over, with {self.finished} of {self.total} done. Ask for fewer or smaller images, "
            "or start `pagoda app` with a larger --time-limit."
        )

    def ask_to_stop(self) -> None:
        """The work stops where it next looks."""
        self._stop.set()

    @property
    def should_stop(self) -> bool:
        """Whether somebody asked."""
        return self._stop.is_set()

    def end(self, state: State, result: Any = None, error: BaseException | None = None) -> None:
        """Set the outcome, once."""
        if not self._over.is_set():
            self.state, self._result, self._error = state, result, error
            self.pieces = []
            self.ended_at = time.monotonic()
            self._over.set()


class JobQueue:
    """The waiting and the running job. Not thread-safe by itself: the server holds its lock around every call.

    Args:
        most: Waiting jobs at most.
        most_per_client: Of one client.
        seconds: Time limit of a job, from its arrival.
    """

    def __init__(self, *, most: int, most_per_client: int, seconds: float) -> None:
        self._most, self._most_per_client, self._seconds = most, most_per_client, seconds
        self._jobs: list[Job] = []
        self._serial = 0
        self._turn = 0
        self._last_turn: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, request: ImageRequest | TaskRequest, client: str) -> Job:
        """Take a request in.

        Raises:
            ResourceError: the queue is full, or this client has too many in it.
        """
        if len(self._jobs) >= self._most:
            raise ResourceError(
                f"{len(self._jobs)} requests are waiting, which is as many as are let in. Try again in a moment."
            )
        own = sum(job.client == client for job in self._jobs)
        if own >= self._most_per_client:
            raise ResourceError(f"{own} of your requests are waiting already. Wait for one of them, or cancel it.")
        turn = max(self._turn, self._last_turn.get(client, -1) + 1)
        total = len(request.points) if isinstance(request, ImageRequest) else 1
        job = Job(request, client, turn, self._serial, time.monotonic() + self._seconds, total)
        self._serial += 1
        self._last_turn[client] = turn
        self._jobs.append(job)
        self._jobs.sort(key=lambda job: (job.turn, job.serial))
        return job

    def head(self) -> Job | None:
        """The job that is to be served now; its round becomes the present one."""
        if not self._jobs:
            return None
        self._turn = max(self._turn, self._jobs[0].turn)
        self._last_turn = {client: turn for client, turn in self._last_turn.items() if turn >= self._turn}
        return self._jobs[0]

    def compatible(self, head: Job) -> list[Job]:
        """`head` and the jobs after it that may share its batch, in their order."""
        assert isinstance(head.request, ImageRequest)
        key = head.request.key
        return [job for job in self._jobs if isinstance(job.request, ImageRequest) and job.request.key == key]

    def of_client(self, client: str) -> list[Job]:
        """Jobs of one client."""
        return [job for job in self._jobs if job.client == client]

    def all(self) -> list[Job]:
        """Every job, in the order of service."""
        return list(self._jobs)

    def place(self, job: Job) -> int:
        """Jobs before this one; 0 when it is being served or over."""
        return self._jobs.index(job) if job in self._jobs else 0

    def remove(self, job: Job) -> None:
        """Take a job out; nothing happens when it has left already."""
        if job in self._jobs:
            self._jobs.remove(job)

    def expired(self) -> list[Job]:
        """Jobs whose time is over."""
        now = time.monotonic()
        return [job for job in self._jobs if now > job.deadline]
