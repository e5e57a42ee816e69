"""`python -m benchmarks`: what a person types, on a real benchmark at a small share of its budget."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.__main__ as command_line
import pytest
import torch
from benchmarks.oracle_inversion import kurtosis


def test_list_names_every_benchmark_with_its_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in command_line.names())
    assert "oracle_inversion: How far from unit variance" in listed


def test_every_benchmark_knows_the_module_that_registers_it() -> None:
    # Processes of `--jobs` import it; the function of a benchmark on real data comes from a helper's module.
    assert {name: command_line.find(name).module for name in command_line.names()} == {
        name: f"benchmarks.{name}" for name in command_line.names()
    }


def test_run_writes_both_files_and_table_renders_the_same_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "oracle_inversion.json"
    arguments = ["run", "oracle_inversion", "--seeds", "1", "--json", str(path), "--budget", "0.02"]
    assert command_line.main(arguments) == 0
    record, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert record["complete"] is True
    assert record["command"].startswith("python -m benchmarks run oracle_inversion --seeds 1")
    assert len(record["arms"]) == 18
    path.with_suffix(".md").unlink()
    assert command_line.main(["table", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == page
    assert str(path.with_suffix(".md")) in capsys.readouterr().out


def test_all_runs_every_benchmark_and_names_those_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "names", lambda: ["emoji", "oracle_inversion"])
    monkeypatch.delenv("PAGODA_DATA", raising=False)
    arguments = ["all", "--seeds", "1", "--folder", str(tmp_path), "--budget", "0.02"]
    assert command_line.main(arguments) == 1
    assert json.loads((tmp_path / "oracle_inversion.json").read_text())["complete"] is True
    told = capsys.readouterr().err
    assert "did not run: emoji" in told
    assert "PAGODA_DATA" in told


def test_mistakes_are_one_sentence_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["run", "oracle_invertion", "--json", str(tmp_path / "x.json")]) == 1
    assert "Did you mean `oracle_inversion`?" in capsys.readouterr().err
    assert command_line.main(["table", str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_kurtosis_of_known_distributions() -> None:
    signs = torch.tensor([-1.0, 1.0]).repeat(100).double()
    assert kurtosis(signs) == pytest.approx(1)
    gaussian = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(3 * gaussian + 5) == pytest.approx(3, abs=4 * (24 / 200_000) ** 0.5)
