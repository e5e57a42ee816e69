"""The web app: a model server with a queue, careful reading of uploads, and a page of tabs. It holds no logic of models."""

from pagoda.app.catalog import RunCatalog, RunEntry
from pagoda.app.guard import Guard, GuardConfig
from pagoda.app.jobs import ImageRequest, Job, JobCancelledError, JobQueue, TaskRequest
from pagoda.app.models import LoadedModel
from pagoda.app.server import Answer, ModelServer
from pagoda.app.server_config import ServerConfig
from pagoda.app.serving import AppConfig, RunningApp
from pagoda.app.uploads import UploadedImage, UploadLimits, clean_name, read_upload, read_uploaded_file

__all__ = [
    "Answer",
    "AppConfig",
    "Guard",
    "GuardConfig",
    "ImageRequest",
    "Job",
    "JobCancelledError",
    "JobQueue",
    "LoadedModel",
    "ModelServer",
    "RunCatalog",
    "RunEntry",
    "RunningApp",
    "ServerConfig",
    "TaskRequest",
    "UploadLimits",
    "UploadedImage",
    "clean_name",
    "read_upload",
    "read_uploaded_file",
]
