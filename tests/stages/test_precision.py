"""bf16 on a CPU: chosen where there is hardware for it, near float32 in every stage, and as reproducible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_config
from torch.nn import functional as F

from pagoda.errors import ConfigError
from pagoda.stages.config import RunConfig
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.training import Runtime, runtime


@pytest.fixture
def with_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with hardware for bf16: others calculate the same, slower."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)


@pytest.fixture
def without_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)


def test_auto_is_bf16_with_hardware_for_it(with_hardware: None) -> None:
    assert Runtime("cpu", "auto").precision == "bf16"
    assert Runtime("cpu", "bf16").precision == "bf16"
    assert Runtime("cpu").precision == "float32"  # never unasked


def test_auto_is_float32_without(without_hardware: None) -> None:
    assert Runtime("cpu", "auto").precision == "float32"
    with pytest.raises(ConfigError, match=r"precision=bf16 is slower .* Use precision=float32 or precision=auto"):
        Runtime("cpu", "bf16")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision must be one of .*auto.*float32.*bf16.*, got 'fp8'"):
        Runtime("cpu", "fp8")


def test_attention_is_not_the_slow_fused_one_in_bf16(with_hardware: None) -> None:
    q = torch.randn(2, 2, 4, 16, requires_grad=True)
    exact = F.scaled_dot_product_attention(q, q, q)
    with Runtime("cpu", "bf16").autocast():
        found = F.scaled_dot_product_attention(q, q, q)
    assert "Flash" not in type(found.grad_fn).__name__
    assert "Flash" in type(exact.grad_fn).__name__  # whose choice is left alone elsewhere
    again = F.scaled_dot_product_attention(q, q, q)
    assert type(again.grad_fn) is type(exact.grad_fn)
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def bf16(precision: str = "bf16", **changes: object) -> RunConfig:
    return tiny_config(precision=precision, distill__matching__weight=1.0, distill__matching__start=0.5, **changes)


def first_figures(run: RunFolder) -> dict[str, Mapping[str, float]]:
    """Of each stage, what is logged first: of steps whose weights have hardly moved yet."""
    first: dict[str, Mapping[str, float]] = {}
    for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first.setdefault(row["stage"], row)
    return first


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    """All networks that a run has made, by file and name."""
    files = [*run.teacher.rglob("*.safetensors"), *(run.path / "generator-16").rglob("*.safetensors")]
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_every_stage_is_near_float32_and_keeps_float32_weights(with_hardware: None, tmp_path: Path) -> None:
    # Adam's first steps go by signs, which rounding turns: with usual rates the stages would start from unlike weights.
    still = {f"{stage}__optimizer__lr": 1e-6 for stage in ("distill", "grow")}
    run = train(bf16(**still), str(tmp_path / "run"), quiet=True)
    exact_run = train(bf16("float32", **still), str(tmp_path / "exact"), quiet=True)
    for stage, exact in first_figures(exact_run).items():
        found = first_figures(run)[stage]
        names = [n for n in ("teacher/loss", "generator/reconstruction", "generator/feature") if n in exact]
        for name in names:
            assert found[name] == pytest.approx(exact[name], rel=0.03), (stage, name)
        assert stage == "encode" or any(found[name] != exact[name] for name in names), stage  # another calculation
    made = weights(run)
    assert made
    assert all(tensor.dtype != torch.bfloat16 for tensor in made.values())
    encoded, exact_encoded = (r.require("encode", "")["results"] for r in (run, exact_run))
    assert encoded["std"] == pytest.approx(exact_encoded["std"], abs=0.01)


def test_what_auto_has_become_is_told(with_hardware: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(precision="auto"), str(tmp_path / "run"), until="teach")
    assert "precision: bf16 (precision=auto on cpu)" in "".join(capsys.readouterr())


def test_a_run_in_bf16_is_the_same_bitwise_stage_by_stage(with_hardware: None, tmp_path: Path) -> None:
    whole = train(bf16(), str(tmp_path / "whole"), quiet=True)
    for until in ("teach", "encode", "distill"):
        train(bf16(), str(tmp_path / "parts"), until=until, quiet=True)
    parts = train(bf16(), str(tmp_path / "parts"), quiet=True)
    before, after = weights(whole), weights(parts)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("tiles", "products", "expected"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_either_kind_of_instructions_counts_as_hardware(
    monkeypatch: pytest.MonkeyPatch, tiles: bool, products: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: products)
    assert runtime.cpu_has_bf16() is expected
