"""The teachers that the benchmarks of `pagoda.understanding` read: trained by the command line once a seed, kept in PAGODA_RUNS."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.metrics import measure_command
from benchmarks.real_sets import data_file, reduced
from pagoda.data import SourceConfig, open_source
from pagoda.stages.reading import ReadableModel, open_readable

FASHION = [
    "--base",
    "16",
    "--size",
    "16",
    "--preset",
    "small",
    "--set",
    "source.pad=32",
    "mirror=false",
]
SETTINGS: dict[str, list[str]] = {
    "shapes": ["--base", "8", "--size", "8", "--preset", "tiny", "--set", "mirror=false"],
    "fashion-labels": [*FASHION, "teach.loop.steps=1200"],
    "fashion-plain": [*FASHION, "teach.condition_dropout=1.0"],
}
"""Options of `pagoda teach` by name. `fashion-plain` never sees a label, and is trained as long as the preset says."""


@cache
def teacher(name: str, seed: int) -> ReadableModel:
    """A teacher, trained now unless its run is there already."""
    runs = Path(os.environ.get("PAGODA_RUNS", "runs"))
    runs.mkdir(parents=True, exist_ok=True)
    out = runs / f"understanding-{name}-seed{seed}"
    data = "shapes" if name == "shapes" else str(data_file("fashion_mnist"))
    command = [
        sys.executable,
        "-m",
        "pagoda.cli.main",
        "teach",
        data,
        "--out",
        str(out),
        "--seed",
        str(seed),
        *SETTINGS[name],
    ]
    if not (out / "teacher").is_dir():
        measure_command(command, log=runs / f"{out.name}.log")
    return open_readable(out, device="cpu")


@cache
def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn shapes of 8 px that no teacher was trained on, (count, 3, 8, 8) in [-1, 1], and their classes."""
    return as_floats(reduced(open_source(f"shapes:count={count},seed={1000 + seed}"), 8, range(count)))


@cache
def fashion(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split of Fashion-MNIST at 16 px, (count, 1, 16, 16) in [-1, 1], and their classes."""
    source = open_source(str(data_file("fashion_mnist")), options=SourceConfig(pad=32, split=split))
    return as_floats(reduced(source, 16, range(min(count, len(source)))))


def as_floats(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Bytes as floats in [-1, 1]."""
    return pair[0].float() / 127.5 - 1, pair[1]


def fresh(model: ReadableModel, seed: int) -> ReadableModel:
    """The same network with random weights: what the architecture alone gives."""
    import copy
    import dataclasses

    denoiser = copy.deepcopy(model.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in denoiser.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return dataclasses.replace(model, denoiser=denoiser)
