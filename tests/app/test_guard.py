"""What stands before the page: hosts, origins, passwords, paths, sizes, slowness, and the headers of every answer."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from pagoda.app import Guard, GuardConfig, UploadLimits
from pagoda.app.guard import HEADERS

LIMITS = UploadLimits(max_bytes=1000, max_seconds=0.1)
HOST = "127.0.0.1:7860"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body, and headers that are not ours to send."""
    total = 0
    while True:
        message = await receive()
        total += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    headers = [(b"content-type", b"text/html"), (b"server", b"secret 1.0"), (b"access-control-allow-origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"<body>", "more_body": True})
    await send({"type": "http.response.body", "body": str(total).encode()})


def ask(
    path: str = "/",
    *,
    method: str = "GET",
    config: GuardConfig | None = None,
    body: list[bytes] | None = None,
    rewrite: Any = None,
    **headers: str,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of an answer."""
    sent: list[Any] = []
    pieces = [b""] if body is None else body

    async def receive() -> Any:
        if not pieces:
            await asyncio.sleep(3600)  # the rest never comes
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces) or piece == b"wait"}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    guard = Guard(echo, config or GuardConfig(limits=LIMITS), rewrite_page=rewrite)
    asyncio.run(guard(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]).decode()


def test_an_ordinary_request_passes_and_every_answer_has_the_headers() -> None:
    for path, expected in (("/", 200), ("/nowhere", 404)):
        status, headers, _ = ask(path)
        assert status == expected
        assert HEADERS.items() <= headers.items()
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_the_page_is_rewritten_and_nothing_else_is() -> None:
    status, headers, body = ask("/", rewrite=lambda page: page.replace("<body>", "<body class=ours>"))
    assert (status, body) == (200, "<body class=ours>0")
    assert headers["content-length"] == str(len(body))
    assert ask("/config", rewrite=lambda page: "changed")[2] == "<body>0"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "[::1]:7860", HOST])
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert ask(host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "0.0.0.0"])
def test_another_name_for_this_machine_is_refused(host: str) -> None:
    assert ask(host=host)[0] == 421
    assert ask(host=host, config=GuardConfig(names=None, limits=LIMITS))[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9999", "null"])
def test_requests_from_other_sites_are_refused(origin: str) -> None:
    assert ask("/gradio_api/queue/join", method="POST", origin=origin)[0] == 403
    assert ask("/gradio_api/queue/join", method="POST", origin=f"http://{HOST}")[0] == 200


HOSTILE_PATHS = [
    "/etc/passwd",
    "/gradio_api/proxy=https://evil.example",
    "/gradio_api/vibe-edit",
    "/gradio_api/vibe-code/",
    "/gradio_api/run/predict",
    "/gradio_api/runs",
    "/gradio_api/token",
    "/gradio_api/openapi.json",
    "/monitoring",
    "/login",
    "/assets/../../../../etc/passwd",
    "/assets/%2e%2e/%2e%2e/etc/passwd",
    "/static/..\\..\\secret",
    "/gradio_api/file=../../etc/passwd",
    "/gradio_api/file=/tmp/a/../../etc/passwd",
    "/assets/a\0b",
    "//evil.example/",
    "/docs",
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_paths_that_the_page_does_not_need_are_not_there(path: str) -> None:
    assert ask(path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(method: str) -> None:
    assert ask(method=method)[0] == 405


@pytest.mark.parametrize("length", ["70000", "-1", "many", "9" * 30])
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(length: str) -> None:
    assert ask("/gradio_api/upload", method="POST", content_length=length)[0] == 413


def test_a_body_that_turns_out_too_large_is_cut_off() -> None:
    assert ask("/gradio_api/upload", method="POST", body=[b"x" * 40_000] * 9)[0] == 413
    assert ask("/gradio_api/upload", method="POST", body=[b"x" * 40_000])[2] == "<body>40000"


def test_a_body_whose_rest_does_not_come_is_given_up() -> None:
    assert ask("/gradio_api/upload", method="POST", body=[b"wait"])[0] == 408


def basic(word: str, name: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode()


def test_a_password_is_asked_for_and_checked() -> None:
    config = GuardConfig(names=None, password="pagoda-ünter:uns", limits=LIMITS)
    status, headers, _ = ask(config=config)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic ")
    assert ask(config=config, authorization=basic("pagoda-ünter:uns"))[0] == 200
    for wrong in (
        basic("wrong"),
        basic(""),
        "Basic ???",
        "Bearer x",
        "Basic",
        basic("pagoda-ünter:uns").replace("Basic", "Digest"),
    ):
        assert ask(config=config, authorization=wrong)[0] == 401
    assert "ünter" not in repr(config)


def test_websockets_are_closed_at_once() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": []}
    asyncio.run(Guard(echo, GuardConfig())(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
