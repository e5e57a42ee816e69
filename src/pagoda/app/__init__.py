"""The web app: a model server with a queue, careful reading of uploads, and a page of tabs. It holds no logic of models."""

from pagoda.app.catalog import RunCatalog, RunEntry
from pagoda.app.jobs import ImageRequest, Job, JobCancelledError, JobQueue, TaskRequest
from pagoda.app.server import Answer, LoadedModel, ModelServer, ServerConfig

__all__ = [
    "Answer",
    "ImageRequest",
    "Job",
    "JobCancelledError",
    "JobQueue",
    "LoadedModel",
    "ModelServer",
    "RunCatalog",
    "RunEntry",
    "ServerConfig",
    "TaskRequest",
]
