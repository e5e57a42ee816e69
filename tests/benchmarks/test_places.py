"""Where a benchmark measures, how it waits for a GPU, and that models run in bf16: no GPU is needed for any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.places import Place, choose_place
from torch import nn

from benchmarks import places, price_512
from pagoda.errors import ConfigError


def with_gpu(monkeypatch: pytest.MonkeyPatch, seen: bool, *, bf16: bool = True) -> None:
    """As PyTorch answers on a machine with a GPU or without; emulation, which every GPU has, does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(
    ("seen", "bf16", "asked", "found"),
    [
        (False, False, (), ("cpu", "float32")),
        (True, True, (), ("cuda", "bf16")),
        (True, False, (), ("cuda", "float32")),
        (True, True, ("cpu",), ("cpu", "float32")),
        (True, True, ("cuda", "float32"), ("cuda", "float32")),
        (False, False, ("auto", "bf16"), ("cpu", "bf16")),
    ],
)
def test_a_gpu_in_bf16_is_taken_where_there_is_one(
    seen: bool, bf16: bool, asked: tuple[str, ...], found: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, seen, bf16=bf16)
    assert choose_place(*asked) == Place(*found)


def test_what_is_not_there_or_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, False)
    for asked, told in ((("cuda",), "sees no GPU"), (("tpu",), "got 'tpu'"), (("cpu", "fp8"), "got 'fp8'")):
        with pytest.raises(ConfigError, match=told):
            choose_place(*asked)


class LateGpu:
    """A GPU whose work is done when it is waited for, and the clock beside it."""

    def __init__(self) -> None:
        self.now, self.pending, self.waits = 0.0, 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def call(self) -> None:
        self.pending += 3.0

    def synchronize(self) -> None:
        self.waits += 1
        self.now, self.pending = self.now + self.pending, 0.0


def test_a_call_on_a_gpu_takes_until_its_work_is_done_and_nothing_of_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = LateGpu()
    monkeypatch.setattr(places, "time", gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    gpu.call()  # still under way
    assert Place("cuda", "bf16").seconds(gpu.call) == 3.0
    assert gpu.waits == 2
    assert Place("cpu", "float32").seconds(gpu.call) == 0.0
    assert gpu.waits == 2, "nothing is waited for on a CPU"


def test_networks_and_inputs_come_in_the_numbers_of_their_place() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("exact", torch.ones(2, dtype=torch.float64))
    weight = module.weight.data_ptr()
    price_512.ON_CPU.bring(module)
    assert module.exact.dtype == torch.float64
    assert module.weight.data_ptr() == weight, "on the CPU in float32 nothing changes"
    half = Place("cpu", "bf16")
    half.bring(module)
    assert module.weight.dtype == half.tensor(torch.ones(2)).dtype == torch.bfloat16
    assert half.tensor(torch.tensor([999])).dtype == torch.int64


@pytest.mark.parametrize("model", price_512.MODELS)
def test_both_models_do_the_same_work_in_bf16_and_tell_nothing_new_on_a_cpu(model: str) -> None:
    exact, half = (
        price_512.measure(model, price_512.SMALL, 0, Place("cpu", precision), threads=1, calls=1)
        for precision in ("float32", "bf16")
    )
    counted = [key for key in exact if "ms" not in key and key != "images_per_s"]
    assert set(exact) == set(half)
    assert "gpu_peak_mib" not in exact
    assert {key: half[key] for key in counted} == {key: exact[key] for key in counted}


@pytest.mark.parametrize(("seen", "where"), [(False, ["cpu", "float32"]), (True, ["cuda", "bf16"])])
def test_arms_are_measured_at_the_place_that_their_question_names(
    seen: bool, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, seen)
    commands = []

    def measured(command: list[str], *, log: Path) -> dict[str, Any]:
        commands.append(command)
        log.write_text('{"ms": 1.0}\n')
        return {"peak_mib": 5.0}

    monkeypatch.setattr(price_512, "measure_command", measured)
    arms = price_512.price_512(1.0)
    assert list(arms) == list(price_512.MODELS)
    assert arms["generator"](3) == {"ms": 1.0, "process_peak_mib": 5.0}
    assert commands[0][-5:] == ["generator", "full", "3", *where]
    assert price_512.described(choose_place()) == ("on a GPU in bf16" if seen else "on two threads")
