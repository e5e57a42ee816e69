"""What every tab of the page works with, and how a tab waits for the model server without holding anything up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pagoda.app.jobs import ImageRequest, Job, JobCancelledError, TaskRequest
from pagoda.app.models import LoadedModel
from pagoda.app.page_style import progress_line, told
from pagoda.app.server import ModelServer
from pagoda.app.uploads import UploadLimits
from pagoda.errors import ConfigError, PagodaError

_LOOK_EVERY = 0.03
"""Seconds between two looks at a job."""
Handler = Callable[..., Any]


@dataclass(frozen=True)
class PageContext:
    """What a tab is built with.

    Attributes:
        gr: Gradio.
        server: Answers requests.
        folder: Where uploads and downloads lie, below which nothing else does.
        limits: Of uploads.
    """

    gr: ModuleType
    server: ModelServer
    folder: Path
    limits: UploadLimits

    def with_request(self, handler: Handler) -> Handler:
        """Have Gradio hand the visitor's request to the parameter `request` of a handler.

        Gradio finds it by the parameter's annotation, which modules that must not import Gradio cannot write.
        """
        handler.__annotations__ = {"request": self.gr.Request}
        return handler

    def model(self, name: Any) -> LoadedModel | None:
        """The model of a run, or None when it has none that can be loaded; `problem` says why."""
        try:
            return self.server.model(str(name))
        except PagodaError:
            return None

    def problem(self, name: Any) -> str:
        """Why a run has no model to show, in words for the visitor; nothing when it has one."""
        if not name:
            return (
                f"There is no run in {self.server.catalog.root.name}/ yet. Make one with `pagoda train DATA --out RUN`."
            )
        try:
            self.server.model(str(name))
        except PagodaError as error:
            return str(error)
        return ""


def client_of(request: Any) -> str:
    """Who asks: one page in one browser window."""
    return str(getattr(request, "session_hash", None) or "nobody")


@dataclass(frozen=True)
class Step:
    """How a job stands: words for the visitor, and the outcome when it is over."""

    html: str
    outcome: Any = None


async def follow(
    context: PageContext, work: ImageRequest | TaskRequest, client: str, *, what: str = "images"
) -> AsyncIterator[Step]:
    """Submit and follow a request to its end; the last step carries the outcome, or words about what went wrong.

    When the visitor leaves, or the event is cancelled, the job is given up.
    """
    job: Job | None = None
    try:
        job = context.server.submit(work, client=client)
        said = ""
        while not job.is_over:
            words = _words(context.server, job, what)
            if words != said:
                said = words
                yield Step(words)
            await asyncio.sleep(_LOOK_EVERY)
        yield Step("", job.result(0))
    except JobCancelledError:
        yield Step(told("Cancelled."))
    except PagodaError as error:
        yield Step(told(str(error), bad=True))
    finally:
        if job is not None and not job.is_over:
            context.server.cancel(job)


def _words(server: ModelServer, job: Job, what: str) -> str:
    before = server.place(job)
    if before:
        return progress_line(f"Waiting: {before} before you.", 0, job.total)
    return progress_line(f"{job.finished} of {job.total} {what}", job.finished, job.total)


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """A whole number that a visitor typed.

    Raises:
        ConfigError: nothing, something else, or out of range.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low:,} to {high:,}, got {str(value)[:40]!r}.")
    return value


def number(value: Any, name: str, low: float, high: float) -> float:
    """A number that a visitor set.

    Raises:
        ConfigError: something else, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:40]!r}.")
    return float(value)
