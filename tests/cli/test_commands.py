"""The command line: help that can be pasted, settings that round-trip, errors for people, stages one by one."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.conftest import TINY, tiny_config

import pagoda
from pagoda.cli import sampling
from pagoda.cli.configuring import flatten
from pagoda.cli.main import COMMANDS, gather_settings, main
from pagoda.cli.settings import parse_settings
from pagoda.errors import ConfigError
from pagoda.images import read_metadata
from pagoda.stages.config import RunConfig, from_dict, override, read_yaml, to_yaml
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def help_of(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", *command, "--help"], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    return result.stdout


# Help.


@pytest.mark.parametrize("command", [(), *(tuple(name.split()) for name in COMMANDS)])
def test_help_opens_with_examples_and_answers_at_once(command: tuple[str, ...]) -> None:
    started = time.monotonic()
    text = help_of(*command)
    assert time.monotonic() - started < 5  # PyTorch alone takes as long to import on a slow disk; this needs none of it
    opening = text[: text.index("╭")]
    examples = [line.strip() for line in opening.splitlines() if line.startswith("  ")]
    runnable = [line for line in examples if line.startswith(" ".join(("pagoda", *command)))]
    assert len(runnable) >= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_can_be_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = COMMANDS[name]
    seen: list[object] = []
    monkeypatch.setattr(kind, "run", lambda self: seen.append(self))
    lines = [line.strip() for line in (kind.__doc__ or "").splitlines() if line.strip().startswith("pagoda ")]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    assert [type(command) for command in seen] == [kind] * len(lines)


GROUPS = sorted({name.split()[0] for name in COMMANDS if " " in name})


@pytest.mark.parametrize("group", GROUPS)
def test_the_first_word_of_two_lists_what_may_follow(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    members = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
    assert main([group, "--help"]) == main([group, "-h"]) == 0
    told = capsys.readouterr().out
    for member in members:
        assert f"  {member} " in told
        assert (COMMANDS[f"{group} {member}"].__doc__ or "").strip().splitlines()[0] in told
    example = next(line for line in told.splitlines() if line.startswith(f"  pagoda {group} "))
    assert example.split()[2] in members
    assert main([group]) == 1
    assert capsys.readouterr().err in told
    assert main([group, members[0] + "x"]) == 1
    assert f"`pagoda {group}` has no command `{members[0]}x`. Did you mean `{members[0]}`?" in capsys.readouterr().err


def test_no_torch_is_imported_to_parse() -> None:
    check = "import sys, pagoda.cli.main; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_version_is_told(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pagoda {pagoda.__version__}\n"
    result = subprocess.run([sys.executable, "-m", "pagoda", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"pagoda {pagoda.__version__}\n"


@pytest.mark.parametrize(
    "words", [["trian"], ["train", "shapes"], ["sample", "x", "--m", "3"], ["train", "--out", "x"]]
)
def test_a_command_that_cannot_be_parsed_ends_with_2(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out


# Settings.


def resolved(capsys: Capture, *arguments: object) -> RunConfig:
    """The configuration that a command prints with `--dry-run`."""
    assert run(*arguments, "--dry-run") == 0
    return from_dict(RunConfig, yaml.safe_load(capsys.readouterr().out))


START = ("train", "shapes:count=40", "--out", "nowhere", "--base", 8, "--size", 16, "--preset", "tiny")


def test_dry_run_prints_what_would_be_run_and_does_nothing(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = resolved(capsys, "train", "shapes", "--out", out, "--base", 8, "--size", 32, "--preset", "tiny")
    assert config == preset_config("tiny", "shapes", base=8, size=32)
    assert not out.exists()


def test_what_dry_run_prints_is_read_back_as_a_file(capsys: Capture, tmp_path: Path) -> None:
    config = tiny_config(seed=3, teach__ema=0.9, source__filter="a=b: c")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = ("train", config.data, "--out", "nowhere", "--preset", "tiny", "--config", path)
    assert resolved(capsys, *again) == config


def test_named_options_win_over_settings_and_those_over_the_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("seed: 1\nbase: 16\nsize: 64\ndata: another\nteach: {ema: 0.5, loop: {steps: 7}}\n")
    start = ("train", "shapes", "--out", "nowhere", "--preset", "tiny", "--config", path)
    config = resolved(capsys, *start)
    assert (config.data, config.seed, config.base, config.size) == ("shapes", 1, 16, 64)
    assert (config.teach.ema, config.teach.loop.steps) == (0.5, 7)
    config = resolved(capsys, *start, "--set", "seed=2", "teach.ema=0.6", "--size", 32)
    assert (config.seed, config.teach.ema, config.size, config.teach.loop.steps) == (2, 0.6, 32, 7)
    assert resolved(capsys, *start, "--set", "seed=2", "--seed", 3).seed == 3


def test_the_network_of_a_preset_fits_the_base_size_of_the_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("base: 32\n")
    config = resolved(capsys, "train", "shapes", "--out", "x", "--preset", "small", "--config", path)
    assert config == preset_config("small", "shapes", base=32, size=256)


def test_options_reach_their_setting(capsys: Capture) -> None:
    options = ("--device", "cpu", "--filter", "tone=", "--label-column", "group", "--caption-column", "words")
    config = resolved(capsys, *START, *options)
    source = (config.source.filter, config.source.label_column, config.source.caption_column)
    assert source == ("tone=", "group", "words")
    assert config.device == "cpu"


def test_every_value_of_set_counts(capsys: Capture) -> None:
    """A parser would keep only the last `--set`, and the others would be lost without a word."""
    ways = [
        ("--set", "seed=4", "mirror=false"),
        ("--set", "seed=4", "--set", "mirror=false"),
        ("--set=seed=4", "--set=mirror=false"),
    ]
    for words in ways:
        config = resolved(capsys, *START, *words)
        assert (config.seed, config.mirror) == (4, False)


def test_the_data_may_follow_the_settings() -> None:
    assert gather_settings(["train", "--set", "a=1", "b=2", "photos", "--quiet"]) == [
        *("train", "photos", "--quiet", "--set", "a=1", "b=2")
    ]
    assert gather_settings(["encode", "RUN"]) == ["encode", "RUN"]


def test_settings_are_read_as_yaml() -> None:
    text = ["a=1", "b.c=1e-3", "d=[1, 2]", "e=", "f=skin_tone=", "g=null", "h=true", "i=x y"]
    values = parse_settings(text)
    assert values == {"a": 1, "b.c": "1e-3", "d": [1, 2], "e": "", "f": "skin_tone=", "g": None, "h": True, "i": "x y"}
    assert override(tiny_config(), {"teach.ema": "1e-3"}).teach.ema == 1e-3
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": [3]}) == {"a.b.c": 1, "a.d": 2, "e": [3]}
    with pytest.raises(ConfigError, match=r"key=value, got 'steps'"):
        parse_settings(["steps"])
    with pytest.raises(ConfigError, match=r"'a=\[1': the value cannot be read as YAML"):
        parse_settings(["a=[1"])


# Errors.


def fails(capsys: Capture, *arguments: object) -> str:
    """What a command writes to stderr when it ends with 1: one message, no traceback, nothing on stdout."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "teach.loop.stpes=3"), "ConfigError: unknown key `teach.loop.stpes`"),
        (("--set", "teach.loop.stpes=3"), "Did you mean `steps`?"),
        (("--set", "sead=3"), "Did you mean `seed`?"),
        (("--set", "seed=x"), "ConfigError: `seed` must be of type int, got 'x'."),
        (("--base", 8, "--size", 20), "ConfigError: size must be base x 2^k: with base 8 one of 8, 16, 32"),
        (("--base", 8, "--set", "size=24"), "ConfigError: size must be base x 2^k: with base 8 one of 8, 16, 32"),
        (("--base", 9, "--size", 18), "ShapeError: "),
        (("--base", 9, "--size", 18), "9"),
        (("--config", "nowhere.yaml"), "ConfigError: cannot read the configuration nowhere.yaml"),
        (("--filter", "tone="), "ConfigError: `shapes` is drawn as it is and does not take"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_made(
    words: tuple[object, ...], message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(context: object, stage: str) -> None:
        raise AssertionError(f"stage {stage} was started")

    monkeypatch.setattr("pagoda.stages.train.run_stage", trained)
    out = tmp_path / "run"
    options = words if "--base" in words else ("--base", 8, "--size", 16, *words)
    error = fails(capsys, "train", "shapes:count=40", "--out", out, "--preset", "tiny", "--device", "cpu", *options)
    assert message in error
    assert not (out / "checkpoints").exists()


def test_an_unreadable_configuration_file_is_named(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in [("a: [1", "cannot read the configuration"), ("- 1\n- 2", "must hold settings by name")]:
        path.write_text(text)
        error = fails(capsys, *START, "--config", path)
        assert error.startswith("ConfigError: ")
        assert message in error
        assert "bad.yaml" in error


def test_a_run_with_an_unknown_key_in_its_file_is_refused_with_the_place(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    text = finished_run.config_path.read_text().replace("sigma_max:", "sigma_mex:")
    (copy / "config.yaml").write_text(text)
    error = fails(capsys, "encode", copy)
    assert "unknown key `sigma_mex`. Did you mean `sigma_max`?" in error
    assert str(copy / "config.yaml") in error
    assert (copy / "config.yaml").read_text() == text


@pytest.mark.parametrize("command", ["encode", "distill", "grow", "sample"])
def test_a_folder_that_is_no_run_is_refused_with_the_next_step(command: str, tmp_path: Path, capsys: Capture) -> None:
    error = fails(capsys, command, tmp_path)
    assert error.startswith("ArtifactError: ")
    assert "pagoda train DATA --out" in error


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGODA_TRACEBACK", "1")
    with pytest.raises(pagoda.errors.ArtifactError):
        run("sample", tmp_path)


def test_an_interrupted_command_ends_with_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling.Sample, "run", interrupted)
    assert run("sample", "RUN") == 130
    assert "run the same command again to continue" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    script = f"{sys.executable} -m pagoda.cli.main train --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr
    assert result.stdout.strip() in ("0", "141")


# Sampling.


@pytest.fixture
def copied(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_sample_with_nothing_else_writes_a_grid_that_says_what_made_it(copied: RunFolder, capsys: Capture) -> None:
    assert run("sample", copied.path) == 0
    path = copied.path / "samples" / "grid-16-seed0.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert picture_size(path) == (8 * 17 + 1, 8 * 17 + 1)
    facts = read_metadata(path)
    assert facts is not None
    assert facts["seeds"] == list(range(64))
    assert facts["labels"] == [seed % 10 for seed in range(64)]


def test_sample_options(copied: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    options = ("--n", 6, "--label", 3, "--seed", 100, "--resolution", 8, "--columns", 3, "--out", out)
    assert run("sample", copied.path, *options) == 0
    assert picture_size(out) == (3 * 9 + 1, 2 * 9 + 1)
    facts = read_metadata(out)
    assert facts is not None
    assert (facts["labels"], facts["seeds"], facts["resolution"]) == ([3] * 6, list(range(100, 106)), 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--label", 99), "ConfigError: labels must lie in 0..9 (or -1 for none), got [99]."),
        (("--n", 0), "ConfigError: --n must be >= 1, got 0."),
        (("--resolution", 64), "ShapeError: "),
        (("--resolution", 64), "[8, 16]"),
        (("--batch-size", 0), "ConfigError: batch_size must be >= 1, got 0."),
        (("--columns", 0), "ConfigError: --columns must be >= 1, got 0."),
    ],
)
def test_impossible_samples_are_refused(
    finished_run: RunFolder, words: tuple[object, ...], message: str, capsys: Capture, tmp_path: Path
) -> None:
    assert message in fails(capsys, "sample", finished_run.path, "--out", tmp_path / "grid.png", *words)
    assert list(tmp_path.iterdir()) == []


# Data.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(20):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def test_data_check_describes_good_data(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("data", "check", photos, "--size", 16, "--json", tmp_path / "new" / "report.json") == 0
    text = capsys.readouterr().out
    assert "20 images, 20 usable" in text
    assert "cats: 10" in text
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (report["usable"], report["bad"]) == (20, [])


def test_data_check_names_planted_bad_files_and_ends_with_1(photos: Path, capsys: Capture) -> None:
    truncated, empty, foreign, small = (photos / "cats" / f"bad{i}.png" for i in range(4))
    truncated.write_bytes((photos / "cats" / "01.png").read_bytes()[:200])
    empty.write_bytes(b"")
    foreign.write_text("not an image")
    Image.new("RGB", (4, 4)).save(small)
    assert run("data", "check", photos, "--size", 16) == 1
    captured = capsys.readouterr()
    for number, reason in enumerate(["truncated", "0 bytes", "", "4x4 pixels, smaller than 16"]):
        line = next(line for line in captured.out.splitlines() if f"bad{number}.png" in line)
        assert reason in line
    assert captured.err.splitlines()[-1].strip() != ""
    assert "DataError: 4 of 24 images cannot be used" in captured.err
    assert "Traceback" not in captured.err


def test_data_check_moves_bad_files_away(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    (photos / "cats" / "bad.png").write_bytes(b"")
    assert run("data", "check", photos, "--size", 16, "--move-bad", tmp_path / "bad") == 0
    assert (tmp_path / "bad" / "cats" / "bad.png").is_file()
    assert "moved" in capsys.readouterr().out
    assert run("data", "check", photos, "--size", 16) == 0


def test_data_check_asks_for_captions(photos: Path, capsys: Capture) -> None:
    assert run("data", "check", photos, "--size", 16, "--captions") == 1
    assert "20 of 20 images have no caption" in capsys.readouterr().err


# Stages one by one.


def test_stages_run_one_by_one_and_a_run_grows_on(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    start = ("--out", out, "--base", 8, "--size", 16, "--preset", "tiny", "--quiet", "--set", *settings)
    run_folder = RunFolder(out)
    assert run("teach", "shapes:count=40", *start) == 0
    assert run_folder.is_done("teach")
    assert not run_folder.is_done("encode")
    assert "no generator yet" in fails(capsys, "sample", out)
    assert run("encode", out, "--quiet") == 0
    assert run_folder.is_done("encode")
    assert run_folder.generator_sizes() == []
    assert run("distill", out, "--quiet") == 0
    assert run_folder.generator_sizes() == [8]
    assert run("grow", out, "--quiet") == 0
    assert run_folder.generator_sizes() == [8, 16]
    for size in (8, 16):  # one stage at a time makes what `train` makes
        ours, theirs = (load_generator(folder, size).state_dict() for folder in (run_folder, finished_run))
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert run("grow", out, "--size", 32, "--quiet", "--set", "grow.steps=[4,2]") == 0
    assert run_folder.generator_sizes() == [8, 16, 32]
    assert run_folder.config() == dataclasses.replace(
        tiny_config(size=32), grow=dataclasses.replace(tiny_config().grow, steps=(4, 2))
    )
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_settings_of_a_stage_that_has_not_started_may_change(copied: RunFolder, capsys: Capture) -> None:
    for made in ("distill", "grow-16"):
        (copied.path / "stages" / f"{made}.json").unlink()
    shutil.rmtree(copied.path / "generator-16")
    assert run("distill", copied.path, "--quiet", "--set", "distill.loop.steps=3") == 0
    assert copied.config().distill.loop.steps == 3
    record = copied.record("distill")
    assert record is not None
    assert record["results"]["steps"] == 3
    error = fails(capsys, "encode", copied.path, "--quiet", "--set", "encode.num_nodes=18")
    assert "encode.num_nodes was 4, is 18" in error
    assert copied.config().encode.num_nodes == 4
    assert read_yaml(copied.config_path)["encode"]["num_nodes"] == 4
