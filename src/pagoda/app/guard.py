"""What stands before the page: who may ask, what may be asked for, how large it may be, and the headers of every answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from pagoda.app.uploads import UploadLimits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = "; ".join(
    (
        "default-src 'none'",
        # Gradio's page starts from inline scripts and compiles its templates in the browser.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "manifest-src 'self'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), usb=(), payment=()",
}
"""Sent with every answer."""

_PATHS = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|assets/.+|static/.+|"
    r"gradio_api/(info|app_id|heartbeat/[\w-]+|startup-events|queue/join|queue/data|cancel|reset|upload|upload_progress|"
    r"file=.+|call/[\w-]+(/[\w-]+)?))/?"
)
"""All that the page asks for. Gradio has more: a proxy, run histories, code generation, monitoring."""
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""What this machine calls itself."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Who may ask.

    Args:
        names: Hosts that requests may name, None for any. A server of this machine alone answers to its own names only, which
            keeps out web pages that point a name of theirs at it (DNS rebinding).
        password: Asked for by the browser, any user name; None for none.
        limits: Of bodies.
    """

    names: tuple[str, ...] | None = LOCAL_NAMES
    password: str | None = field(default=None, repr=False)
    limits: UploadLimits = UploadLimits()


class Guard:
    """An ASGI application around another one.

    Args:
        inner: What is guarded.
        config: Who may ask.
        rewrite_page: Changes the HTML of the page itself before it is sent.
    """

    def __init__(
        self, inner: Application, config: GuardConfig, *, rewrite_page: Callable[[str], str] | None = None
    ) -> None:
        self._inner, self._config, self._rewrite = inner, config, rewrite_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":  # the page needs no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = await self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        rewrite = self._rewrite if scope["path"] == "/" and scope["method"] == "GET" else None
        if rewrite is not None:  # it is text that is rewritten, nothing compressed
            scope = {**scope, "headers": [(n, v) for n, v in scope["headers"] if n.lower() != b"accept-encoding"]}
        body, answer = _Body(receive, self._config.limits), _Answer(send, rewrite)
        try:
            await self._inner(scope, body.receive, answer.send)
        except _BodyError as error:
            if not answer.started:
                await _refuse(send, error.status, error.text)

    async def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host, names = headers.get("host", ""), self._config.names
        if names is not None and host not in names and host.rpartition(":")[0] not in names:
            return 421, f"this server answers to {', '.join(names)} only."
        if self._config.password is not None and not _knows(headers.get("authorization", ""), self._config.password):
            await asyncio.sleep(0.5 if "authorization" in headers else 0)  # guessing takes time
            return 401, "a password is needed."
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1] != host:
            return 403, "requests from other sites are not answered."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "only GET, HEAD and POST are answered."
        path = scope["path"]
        parts = unquote(path.replace("\\", "/")).split("/")  # what was quoted twice is looked at too
        absolute = "file=" in path  # an absolute path of an upload: its slashes are its own
        if (
            not _PATHS.fullmatch(path)
            or any(p in (".", "..") for p in parts)
            or ("\0" in path)
            or ("//" in path and not absolute)
        ):
            return 404, "there is nothing here."
        length = headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length) > self._largest_body):
            return 413, f"at most {self._largest_body:,} bytes are taken."
        return None

    @property
    def _largest_body(self) -> int:
        return self._config.limits.max_bytes + 65536  # the file, and what a form has around it


class _BodyError(Exception):
    """A body that is too large or too slow."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class _Body:
    """Counts what comes in, and does not wait for ever."""

    def __init__(self, receive: Receive, limits: UploadLimits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:  # what follows is the news that the visitor has left
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._limits.max_seconds)
        except asyncio.TimeoutError as error:
            raise _BodyError(408, "the rest of the request did not come.") from error
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._limits.max_bytes + 65536:
                raise _BodyError(413, f"at most {self._limits.max_bytes:,} bytes are taken.")
        return message


class _Answer:
    """Puts the headers on, and holds the page back to rewrite it whole."""

    def __init__(self, send: Send, rewrite: Callable[[str], str] | None) -> None:
        self._send, self._rewrite = send, rewrite
        self.started = False
        self._start: Message | None = None
        self._held = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name.encode() for name in HEADERS} | {b"server"}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in ours]
            kept = [(name, value) for name, value in kept if not name.lower().startswith(b"access-control-")]
            kept += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": kept}
            if self._rewrite is not None and message["status"] == 200:
                self._start = message
                return
            self.started = True
        elif self._start is not None and self._rewrite is not None:
            self._held += message.get("body", b"")
            if message.get("more_body"):
                return
            body = self._rewrite(self._held.decode("utf-8")).encode("utf-8")
            dropped = (b"content-length", b"content-encoding")
            headers = [(name, value) for name, value in self._start["headers"] if name.lower() not in dropped]
            headers += [(b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
            self.started = True
            await self._send({**self._start, "headers": headers})
            self._start = None
            message = {"type": "http.response.body", "body": body}
        await self._send(message)


def _knows(authorization: str, password: str) -> bool:
    """Whether a header of basic authentication has the password; takes as long for a wrong one."""
    scheme, _, value = authorization.partition(" ")
    try:
        _, _, given = base64.b64decode(value, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        given = ""
    return hmac.compare_digest(given.encode(), password.encode()) and scheme.lower() == "basic"


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    headers += [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="pagoda", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode("utf-8") + b"\n"})
