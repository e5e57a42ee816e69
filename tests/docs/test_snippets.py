"""The documentation holds: its snippets run, its commands parse, its settings exist, its links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.__main__ import names as benchmark_names
from benchmarks.__main__ import parser as benchmark_parser

from pagoda.cli.main import COMMANDS, main
from pagoda.cli.settings import parse_settings
from pagoda.stages.config import from_dict, override, to_dict
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "systems").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NEEDS_NO_CHECK = {"ruff", "pytest"}
"""First words of shell lines that are left to the tools' own tests."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """Of its first line in the page."""


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(m.group(1), m.group(2), text[: m.start(2)].count("\n") + 1) for m in BLOCK.finditer(text)]
    return [block for block in found if block.language == language]


def shell_lines(page: Path) -> list[str]:
    joined = [block.text.replace("\\\n", " ") for block in blocks(page, "bash")]
    return [line for text in joined for line in text.splitlines() if shlex.split(line, comments=True)]


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, language)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Targets of links into a page, as GitHub makes them of headings."""
    outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_snippets_run_in_order(
    page: Path, finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "runs" / "photos")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "snippets"}
    for block in blocks(page, "python"):
        tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)  # errors point into the page
        exec(compile(tree, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_shell_lines_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):  # `# name.yaml` on the first line makes a block a file
        title = block.text.splitlines()[0].removeprefix("#").strip()
        Path(title).write_text(block.text, encoding="utf-8")
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        program, arguments = Path(words[0]).name, words[1:]
        if program in ("python", "torchrun"):
            assert "-m" in arguments, line
            module = arguments.index("-m") + 1
            program, arguments = arguments[module], arguments[module + 1 :]
        if program in ("pagoda", "pagoda.cli.main"):
            check_command(arguments, line, monkeypatch, capsys)
        elif program == "benchmarks":
            options = benchmark_parser().parse_args(arguments)
            assert getattr(options, "name", "NAME") in ["NAME", *benchmark_names()], line
        elif program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(arguments) <= set(targets), line
        elif program == "pip":
            check_install(line)
        elif program.startswith("recipes."):
            assert (ROOT / program.replace(".", "/")).with_suffix(".py").is_file(), line
        else:
            assert program in NEEDS_NO_CHECK, f"no check is known for this line: {line}"


def check_command(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real command line, with `run` taken out; what starts a run is then resolved by `--dry-run`."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        for kind in COMMANDS.values():
            patch.setattr(kind, "run", lambda command: seen.append(command))
        try:
            status = main(arguments)
        except SystemExit:
            pytest.fail(f"the command line refuses `{line}`: {capsys.readouterr().err}")
    assert (status, len(seen)) == (0, 1), line
    command = seen[0]
    capsys.readouterr()
    for folder in ("teacher", "codec"):  # of the reader's
        if getattr(command, folder, None) is not None:
            command = dataclasses.replace(command, **{folder: None})
    if hasattr(command, "dry_run") and hasattr(command, "resolve"):
        dataclasses.replace(command, dry_run=True).run()
        resolved = command.resolve()
        assert from_dict(type(resolved), yaml.safe_load(capsys.readouterr().out)) == resolved
    elif hasattr(command, "set"):
        override(preset_config("small", "photos/", base=32, size=128), parse_settings(command.set))


def check_install(line: str) -> None:
    """Extras that are asked for exist, and a pin is the one of the constraints."""
    offered = metadata.metadata("pagoda").get_all("Provides-Extra") or []
    for extras in re.findall(r"\[([\w,]+)\]", line):
        assert set(extras.split(",")) <= set(offered), line
    for pin in re.findall(r"[\w-]+==[\d.]+", line):
        assert pin in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_that_are_named_exist(page: Path) -> None:
    config = preset_config("small", "photos/", base=32, size=128)
    sections = [key for key, value in to_dict(config).items() if isinstance(value, dict)]
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for section, rest, given in re.findall(r"`(\w+)\.([a-z_.]+)(=[^`]*)?`", text):
        if section not in sections:
            continue
        value: Any = to_dict(config)
        for part in f"{section}.{rest}".split("."):
            assert part in value, f"{name(page)} names `{section}.{rest}`, which is no setting"
            value = value[part]
        if given:
            override(config, parse_settings([f"{section}.{rest}{given}".replace('"', "")]))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{name(page)} links to what is not there: {broken}"


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
