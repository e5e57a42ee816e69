"""`pagoda app` on the command line: what is refused before anything listens, and in which words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.app import PASSWORD
from pagoda.cli.main import main


@pytest.fixture(autouse=True)
def _no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["app", *arguments]) == 1
    return capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refused(capsys, str(tmp_path / "nowhere"))


def test_listening_elsewhere_without_a_password_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PASSWORD in refused(capsys, str(tmp_path), "--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("", "no first line"), ("short\n", "8 characters")]
)
def test_a_password_file_that_is_no_good_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    assert message in refused(capsys, str(tmp_path), "--host", "0.0.0.0", "--password-file", str(file))


def test_settings_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch_size must be >= 1" in refused(capsys, str(tmp_path), "--batch-size", "0")
    assert "max_bytes must be > 0" in refused(capsys, str(tmp_path), "--max-upload-mib", "0")
    assert "port must lie in" in refused(capsys, str(tmp_path), "--port", "70000")


def test_without_gradio_the_line_that_brings_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'pagoda[app]'" in refused(capsys, str(tmp_path), "--port", "0")


def test_the_app_starts_where_there_is_no_run_yet(
    app: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(app.folder))  # this one sets its own; the first app's comes back
    assert main(["app", str(tmp_path), "--port", "0", "--check"]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out
