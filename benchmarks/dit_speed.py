"""A training step of our DiT beside that of the official one at equal size: block by block in turn, in one process.

The official network runs from the folder that PAGODA_PEERS names (`<folder>/DiT` is a clone of facebookresearch/DiT; nothing in it is
changed). It takes three layers from timm (pip install --no-deps timm), which asks for torchvision; the one class that it wants of it,
a normalisation that a DiT does not have, is put in its place here.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.dit_steps import trained_steps
from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.peer_loops import peer_folder
from pagoda.errors import DataError
from pagoda.networks import backbone_preset

SIZE, CHANNELS, CLASSES = 32, 4, 1000
ROUNDS, STEPS = 4, 2
BATCHES = {"S/2, batch 2": 2, "S/2, batch 8": 8}


def ours(batch: int, seed: int, folder: Path) -> Callable[[int], float]:
    """The preset `dit_s` in our loop."""
    return trained_steps(
        backbone_preset("dit_s", SIZE),
        size=SIZE,
        channels=CHANNELS,
        num_classes=CLASSES,
        batch=batch,
        folder=folder,
        seed=seed,
    )


def official(batch: int, seed: int, folder: Path) -> Callable[[int], float]:
    """DiT-S/2 of facebookresearch/DiT with AdamW and averaged weights, as its script has them; without its loss of the variance."""
    torch.manual_seed(seed)
    network = official_module().DiT_models["DiT-S/2"](input_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, CHANNELS, SIZE, SIZE, generator=generator) * 2 - 1
    t = torch.randint(0, 1000, (batch,), generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            noise = torch.randn_like(images)
            loss = (network(images + noise, t, labels)[:, :CHANNELS] - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                    mine.mul_(0.9999).add_(theirs, alpha=1e-4)
        return (time.perf_counter() - start) / steps

    return run


@cache
def official_module() -> Any:
    """Its `models.py`. What stands in for torchvision and timm while it is loaded is gone afterwards."""
    before = dict(sys.modules)
    try:
        return load_official()
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


def load_official() -> Any:
    """See `official_module`."""
    found = importlib.util.find_spec("timm")
    if found is None or found.submodule_search_locations is None:
        raise DataError("the official DiT needs timm: pip install --no-deps timm.")
    torchvision: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": nn.Identity},
    }
    # timm's own `__init__` would load all of its networks and their transforms of images.
    packages = {**torchvision, "timm": {"__path__": list(found.submodule_search_locations)}, "timm.models": {}}
    for name, content in packages.items():
        add_module(name, {"__path__": [], **content})
    layers = importlib.import_module("timm.layers")
    add_module(
        "timm.models.vision_transformer",
        {name: getattr(layers, name) for name in ("PatchEmbed", "Attention", "Mlp")},
    )
    spec = importlib.util.spec_from_file_location("official_dit", Path(peer_folder("DiT")) / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_module(name: str, content: dict[str, Any]) -> None:
    """A module by hand, where there is none of that name."""
    if name not in sys.modules:
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module


def compare(batch: int, steps: int, rounds: int, seed: int) -> dict[str, float]:
    """Seconds of their step over ours: the geometric mean of two medians over rounds, each network made first once."""
    pairs, medians = [], []
    for makers in ((ours, official), (official, ours)):
        with TemporaryDirectory() as folder:
            made = {make: make(batch, seed, Path(folder) / make.__name__) for make in makers}
            for run in made.values():
                run(1)
            timed = []
            for index in range(rounds):
                order = (ours, official) if index % 2 == 0 else (official, ours)
                seconds = {make: made[make](steps) for make in order}
                timed.append((seconds[ours], seconds[official]))
        medians.append(statistics.median(b / a for a, b in timed))
        pairs += timed
    return {
        "ms_ours": 1e3 * statistics.median(a for a, _ in pairs),
        "ms_official": 1e3 * statistics.median(b for _, b in pairs),
        "faster": math.sqrt(medians[0] * medians[1]),
    }


@benchmark(
    "dit_speed",
    question=(
        "Is a training step of our DiT at least as fast as that of facebookresearch/DiT at equal size (S/2 on latents of 32 x 32, "
        "float32, each with its own optimiser and averaged weights)? `faster` is the official one's time over ours. It runs from "
        "the folder that PAGODA_PEERS names."
    ),
    passes=[
        PassLine(
            f"{name}: at least as fast as the official DiT",
            lambda r, name=name: r.median(name, "faster"),
            at_least=1.0,
        )
        for name in BATCHES
    ],
)
def dit_speed(budget: float) -> dict[str, Arm]:
    """One arm a batch."""
    steps, rounds = max(1, round(STEPS * budget)), max(2, 2 * round(ROUNDS * budget / 2))
    return {name: partial(compare, batch, steps, rounds) for name, batch in BATCHES.items()}
