"""From a folder of runs to a server that listens: port, password, guard, page, and their end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pagoda.app.catalog import RunCatalog
from pagoda.app.context import PageContext
from pagoda.app.guard import LOCAL_NAMES, Guard, GuardConfig
from pagoda.app.jobs import ImageRequest
from pagoda.app.page import build_page, default_run, theme
from pagoda.app.page_style import app_style, first_picture, rewrite_page
from pagoda.app.server import ModelServer
from pagoda.app.server_config import ServerConfig
from pagoda.app.tab_generate import FIRST_COUNT
from pagoda.app.uploads import UploadLimits
from pagoda.errors import ConfigError, PagodaError, ResourceError, import_extra
from pagoda.images import make_grid
from pagoda.stages.exploring import LatentPoint

SHORTEST_PASSWORD = 8


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Where the app listens and what it takes."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but the loopback needs a password."""
    port: int = 7860
    """Port; 0 takes a free one."""
    password: str | None = field(default=None, repr=False)
    """Asked for by the browser, with any user name; None for none."""
    server: ServerConfig = ServerConfig()
    """Of the model server."""
    limits: UploadLimits = UploadLimits()
    """Of uploads."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"the port must lie in 0..65535, got {self.port}.")
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise ConfigError(
                f"the password must have at least {SHORTEST_PASSWORD} characters, got {len(self.password)}."
            )
        if not self.local and self.password is None:
            raise ConfigError(
                f"listening on {self.host} lets others in, and no password is set. Put one into the environment variable "
                "PAGODA_APP_PASSWORD or into a file for --password-file, or listen on 127.0.0.1."
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class RunningApp:
    """An app that listens, in a thread of its own. Close it, or use it as a context.

    Args:
        root: A folder of run folders, or one run folder.
        config: Where and what.

    Raises:
        ConfigError: the root is no folder.
        MissingExtraError: Gradio is not installed.
        ResourceError: the port is taken, or the address is none of this machine's.
    """

    def __init__(self, root: Path | str, config: AppConfig | None = None) -> None:
        self.config = AppConfig() if config is None else config
        catalog = RunCatalog(root)
        # Read when Gradio is imported: nothing is sent anywhere, nothing is looked up.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        gr, uvicorn, fastapi = (import_extra(name, "app") for name in ("gradio", "uvicorn", "fastapi"))
        self._socket = bind(self.config.host, self.config.port)
        self.port: int = self._socket.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="pagoda-app-")).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        self.server = ModelServer(catalog, self.config.server)
        try:
            # Inside of a running loop, in a thread of its own: where none runs, Gradio opens loops that nobody closes.
            with ThreadPoolExecutor(1, thread_name_prefix="pagoda-page") as pool:
                guard = pool.submit(lambda: asyncio.run(self._build(gr, fastapi))).result()
            self._uvicorn = uvicorn.Server(
                uvicorn.Config(
                    guard,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    ws="none",
                    timeout_keep_alive=15,
                    timeout_graceful_shutdown=2,
                    limit_concurrency=500,
                    h11_max_incomplete_event_size=65536,
                )
            )
            self._thread = threading.Thread(target=self._listen, name="pagoda-app", daemon=True)
            self._thread.start()
            while not self._uvicorn.started:
                if not self._thread.is_alive():
                    raise ResourceError(f"the server on {self.url} has stopped before it listened.")
                self._thread.join(0.02)
        except BaseException:
            self._socket.close()
            self.server.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> RunningApp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """What to open in a browser on this machine."""
        return f"http://{self._host if self.config.local else '127.0.0.1'}:{self.port}/"

    @property
    def _host(self) -> str:
        """As an address has it: IPv6 in brackets."""
        return f"[{self.config.host}]" if ":" in self.config.host else self.config.host

    def wait(self) -> None:
        """Return when it is closed or interrupted."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop listening, cancel what is under way, and remove uploads and downloads."""
        self._uvicorn.should_exit = True
        self._thread.join(10)
        self._socket.close()
        self.server.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _build(self, gr: ModuleType, fastapi: ModuleType) -> Guard:
        """The page with the guard before it."""
        context = PageContext(gr, self.server, self.folder, self.config.limits)
        page = build_page(context)
        api = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        gr.mount_gradio_app(
            api,
            page,
            path="/",
            server_name=self.config.host,
            server_port=self.port,
            theme=theme(gr),
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            blocked_paths=[str(self.server.catalog.root)],
            max_file_size=self.config.limits.max_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            show_error=False,
        )
        # Gradio looks where a file that a visitor names lies only in an app that it has launched itself; mounted ones it trusts.
        page.has_launched = page.is_running = True
        names = (*LOCAL_NAMES, self._host) if self.config.local else None
        return Guard(
            api,
            GuardConfig(names=names, password=self.config.password, limits=self.config.limits),
            rewrite_page=_rewriter(context),
        )

    def _listen(self) -> None:
        self._uvicorn.run(sockets=[self._socket])


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        ResourceError: somebody else does already, or it is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ResourceError(f"{host!r} is no address to listen on ({error}). Try 127.0.0.1.") from error
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":  # there it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} of {host} is taken, perhaps by another `pagoda app`. Stop it, or choose another: --port {port + 1}."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ResourceError(f"port {port} is not for ordinary users. Choose one from 1024: --port 7860.") from error
        raise ResourceError(f"cannot listen on {host}:{port} ({error.strerror}). Try --host 127.0.0.1.") from error
    return listening


def _rewriter(context: PageContext) -> Callable[[str], str]:
    """What puts style and first picture into the page. The picture is made now, so that it is there before any script."""
    style = app_style()
    first = first_picture("pagoda", None)
    name = default_run(context)
    if name is not None:
        image = None
        try:
            request = ImageRequest(run=name, points=tuple(LatentPoint(seeds=(i,)) for i in range(FIRST_COUNT)))
            answer: Any = context.server.submit(request).result(context.server.config.time_limit)
            image = make_grid(answer.images[max(answer.images)], columns=FIRST_COUNT)
        except PagodaError:
            image = None  # the page itself says what is wrong with this run
        first = first_picture(name, image)
    return lambda page: rewrite_page(page, style=style, first=first)
