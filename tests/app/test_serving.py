"""The app as it listens: where, for whom, on which port, and what of the disk can be had through it."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from pagoda.app.guard import HEADERS
from pagoda.app.serving import AppConfig, RunningApp, bind
from pagoda.errors import ConfigError, ResourceError


def request(
    app: Any, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_the_page_comes_with_its_first_picture_and_asks_nobody_else_for_anything(app: Any) -> None:
    status, headers, body = request(app, "GET", "/")
    page = body.decode()
    assert status == 200
    assert HEADERS.items() <= headers.items()
    assert 'id="first-picture"' in page
    assert 'src="data:image/webp;base64,' in page
    assert not re.search(r"""(?:src|href|content)=["'](?:https?:)?//""", page)
    assert str(app.server.catalog.root) not in page
    _, _, theme = request(app, "GET", "/theme.css")
    assert b"@import" not in theme
    assert b"url(http" not in theme


def test_files_outside_of_the_folder_of_uploads_cannot_be_had(app: Any, runs: Path) -> None:
    for path in (runs / "finished" / "config.yaml", runs / "notes" / "secret.txt", Path("/etc/passwd"), Path(__file__)):
        status, _, body = request(app, "GET", f"/gradio_api/file={path}")
        assert status in (403, 404)
        assert b"hidden words" not in body
        assert b"root:" not in body
    assert request(app, "GET", "/gradio_api/file=pyproject.toml")[0] in (403, 404)


def handler_of(app: Any, component: str) -> tuple[int, int]:
    """Numbers of the handler that a change of a component starts, and of its inputs."""
    config = json.loads(request(app, "GET", "/config")[2])
    number = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == component)
    found = next(d for d in config["dependencies"] if [number, "change"] in d["targets"])
    return found["id"], len(found["inputs"])


def test_a_handler_that_is_given_a_path_of_ours_reads_nothing_from_there(app: Any, runs: Path) -> None:
    handler, _ = handler_of(app, "about-upload")
    for path in (runs / "notes" / "secret.txt", Path("/etc/passwd"), Path("../../etc/passwd")):
        data = [{"path": str(path), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}, "finished"]
        body = json.dumps({"data": data, "fn_index": handler, "session_hash": "hostile", "trigger_id": None}).encode()
        status, _, joined = request(app, "POST", "/gradio_api/queue/join", body, content_type="application/json")
        if status != 200:
            continue
        _, _, events = request(app, "GET", "/gradio_api/queue/data?session_hash=hostile")
        said = events.decode()
        assert '"success":false' in said.replace(" ", "") or "no file that was uploaded here" in said, said
        assert "root:" not in said
        assert "hidden words" not in said
        assert b"event_id" in joined


def test_an_upload_with_a_path_for_a_name_stays_in_its_folder(app: Any, runs: Path) -> None:
    before = sorted(path.name for path in runs.rglob("*"))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../../escaped.png"\r\n'
        b"Content-Type: image/png\r\n\r\nnot an image\r\n--x--\r\n"
    )
    status, _, answer = request(app, "POST", "/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")
    assert status == 200
    assert all(Path(path).resolve().is_relative_to(app.folder) for path in json.loads(answer))
    assert sorted(path.name for path in runs.rglob("*")) == before
    assert not list(app.folder.parent.glob("escaped*"))


def test_an_upload_beyond_the_limit_is_refused(app: Any) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(app.config.limits.max_bytes + 100_000) + b"\r\n--x--\r\n"
    try:
        status, _, _ = request(app, "POST", "/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")
    except (BrokenPipeError, ConnectionResetError):  # refused while the rest was still on its way
        return
    assert status == 413


def test_two_apps_do_not_share_a_port(app: Any, runs: Path) -> None:
    with pytest.raises(ResourceError, match=f"port {app.port} of 127.0.0.1 is taken.*--port {app.port + 1}"):
        RunningApp(runs, AppConfig(port=app.port))


def test_an_address_of_nobodys_is_refused() -> None:
    with pytest.raises(ResourceError, match="cannot listen on"):
        bind("203.0.113.7", 0)
    with pytest.raises(ResourceError, match="is no address to listen on"):
        bind("no such host", 0)


def test_a_free_port_is_found() -> None:
    with bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5):
        assert listening.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_listening_elsewhere_needs_a_password(host: str) -> None:
    with pytest.raises(ConfigError, match="no password is set"):
        AppConfig(host=host)
    assert not AppConfig(host=host, password="long enough").local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_none(host: str) -> None:
    assert AppConfig(host=host).local


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8 characters, got 5"):
        AppConfig(password="short")
    with pytest.raises(ConfigError, match="port must lie in"):
        AppConfig(port=70_000)
    assert "long enough" not in repr(AppConfig(password="long enough"))
