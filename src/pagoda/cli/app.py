"""`pagoda app`: the web app over a folder of runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pagoda.errors import ConfigError

PASSWORD = "PAGODA_APP_PASSWORD"


@dataclass(frozen=True, kw_only=True)
class App:
    """A web page over a folder of runs: generate, explore, watch a training, look at the data. Needs pip install 'pagoda[app]'.

    It listens on this machine only, unless --host says otherwise and a password is set (in the environment variable
    PAGODA_APP_PASSWORD, or in the file of --password-file).

    Examples:
      pagoda app runs/
      pagoda app runs/ --port 8080 --batch-size 16
      PAGODA_APP_PASSWORD=... pagoda app runs/ --host 0.0.0.0
    """

    runs: tyro.conf.Positional[str]
    """Folder of run folders, or one run folder. Nothing outside of it is shown."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7860
    """Port; 0 takes a free one."""
    password_file: Path | None = None
    """File whose first line is the password."""
    batch_size: int = 8
    """Rows of the smallest call of a network: what a single image costs."""
    max_rows: int = 64
    """Rows of a call at most, while many wait."""
    max_images: int = 64
    """Images of a request at most."""
    max_waiting: int = 128
    """Requests that wait at most."""
    time_limit: float = 120.0
    """Seconds after which a request is given up."""
    max_upload_mib: float = 16.0
    """Size of an uploaded file at most, in MiB."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a GPU when there is one."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start, say that all is well, and stop."""

    def run(self) -> None:
        """Serve until interrupted."""
        password = self._password()
        from pagoda.app.server_config import ServerConfig
        from pagoda.app.serving import AppConfig, RunningApp
        from pagoda.app.uploads import UploadLimits
        from pagoda.training import Runtime

        config = AppConfig(
            host=self.host,
            port=self.port,
            password=password,
            server=ServerConfig(
                batch_size=self.batch_size,
                max_rows=self.max_rows,
                max_images=self.max_images,
                max_waiting=self.max_waiting,
                time_limit=self.time_limit,
                device=str(Runtime(self.device).device),
            ),
            limits=UploadLimits(max_bytes=int(self.max_upload_mib * 2**20)),
        )
        with RunningApp(self.runs, config) as app:
            print(f"pagoda app on {app.url}   (Ctrl-C stops it)", flush=True)
            if not config.local:
                print(
                    "It can be reached from other machines, and the password travels unencrypted: put a proxy with TLS before it.",
                    file=sys.stderr,
                )
            if not self.check:
                app.wait()

    def _password(self) -> str | None:
        if self.password_file is None:
            return os.environ.get(PASSWORD) or None
        try:
            lines = self.password_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--password-file {self.password_file} cannot be read ({error}).") from error
        if not lines or not lines[0]:
            raise ConfigError(f"--password-file {self.password_file} has no first line; write the password there.")
        return lines[0]
