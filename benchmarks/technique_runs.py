"""One stage-1 run with techniques on a small set, and what is measured of it: shared by the benchmarks of techniques."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Results
from benchmarks.metrics import score_images
from benchmarks.technique_sets import SIZE, SmallSet, small_sets
from pagoda.diffusion import Condition, Denoiser, EDMDenoiser, GuidedDenoiser, karras_sigmas, sample
from pagoda.diffusion.solvers import DPMSolver2M
from pagoda.evaluation import ClassifierFeatures
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.train import train
from pagoda.training import NoiseLaw, noise_of_seeds, seeded_generator

LAW = NoiseLaw(mean=-0.6, std=1.2)
BANDS = 8
SETTINGS: dict[str, Any] = {
    "backbone": "dit_nano",
    "device": "cpu",
    "threads": 1,
    "mirror": False,
    "teach.loop.batch_size": 32,
    "teach.loop.preview_every": 0,
    "teach.loop.log_every": 50,
    "teach.loop.checkpoint_every": 100_000,
    "teach.optimizer.lr": 2e-3,
    "teach.ema": 0.995,
    "teach.noise.mean": LAW.mean,
    "teach.noise.std": LAW.std,
}
STEPS = 500
WEIGHTS = (1.5, 2.0, 3.0)
"""Of guidance, where an arm is judged by the best of them and none."""


def arm(
    techniques: Sequence[Any], *, budget: float, data: str = "shapes", guided: bool = False, **changes: Any
) -> Callable[[int], dict[str, float]]:
    """A run with these techniques, for every seed.

    Args:
        techniques: As in a configuration.
        budget: Factor of the steps and of the samples.
        data: Name of a small set.
        guided: Whether samples are drawn with guidance too.
        changes: Other settings, their dots written as `__`.
    """

    def measure(seed: int) -> dict[str, float]:
        settings = {**SETTINGS, "seed": seed, "teach.loop.steps": max(20, round(STEPS * budget))}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        settings["techniques"] = list(techniques)
        chosen = small_sets()[data]
        with tempfile.TemporaryDirectory() as folder:
            source = chosen.source(Path(folder) / "images")
            config = override(preset_config("tiny", source, base=SIZE, size=SIZE), settings)
            run = train(config, folder + "/run", until="teach", quiet=True)
            denoiser, _ = load_teacher(run.teacher)
            last = json.loads(run.metrics.read_text(encoding="utf-8").splitlines()[-1])
            figures = {"seconds": run.require("teach", "pagoda teach")["results"]["seconds"]}
        figures |= {key.split("/", 1)[1]: value for key, value in last.items() if key.count("/") == 2}
        count = max(200, round(1000 * budget))
        figures |= distance(denoiser, chosen, seed, count) | held_out_loss(denoiser, *chosen.held_out)
        if guided:
            swept = {w: distance(GuidedDenoiser(denoiser, w), chosen, seed, count)["distance"] for w in WEIGHTS}
            figures |= {f"distance_w{weight:g}".replace(".", "_"): value for weight, value in swept.items()}
            figures["best_distance"] = min(figures["distance"], *swept.values())
        return figures

    return measure


def distance(denoiser: Denoiser, data: SmallSet, seed: int, count: int) -> dict[str, float]:
    """Fréchet distance of samples to held-out images, and the floor that held-out images have among themselves."""
    real, real_labels = data.held_out
    labels = real_labels[torch.arange(count) % len(real_labels)]  # classes as frequent as among the held-out images
    z = noise_of_seeds(list(range(count)), tuple(real.shape[1:]))
    made = []
    for rows in torch.arange(count).split(250):
        condition = Condition.of_labels(labels[rows])
        made.append(sample(denoiser, z[rows], sigmas=karras_sigmas(16), condition=condition, solver=DPMSolver2M()))
    found = score_images(ClassifierFeatures(data.judge), real, real_labels, torch.cat(made).clamp(-1, 1), seed)
    return {"distance": found["distance"], "floor": found["floor"]}


@torch.no_grad()
def held_out_loss(denoiser: EDMDenoiser, real: Tensor, labels: Tensor) -> dict[str, float]:
    """Weighted denoising loss in bands of equal training mass; the same noise for every network."""
    images, labels = real[:480].float() / 127.5 - 1, labels[:480]
    noise = torch.randn(images.shape, generator=seeded_generator("techniques", "held-out"))
    losses = []
    for band in range(BANDS):
        quantile = (torch.arange(len(images)) + 0.5) / len(images) / BANDS + band / BANDS
        sigma = LAW.sigma_at(quantile).float()
        estimate = denoiser(images + sigma[:, None, None, None] * noise, sigma, Condition.of_labels(labels))
        std = denoiser.sigma_data
        weight = (sigma**2 + std**2) / (sigma * std) ** 2
        losses.append(float((weight * (estimate - images).square().flatten(1).mean(1)).mean()))
    return {"held_out": sum(losses) / BANDS, **{f"band_{k}": value for k, value in enumerate(losses)}}


def ratio(name: str, metric: str = "distance", below: str = "plain") -> Callable[[Results], float]:
    """Median over the seeds of an arm's figure over another arm's of the same seed."""

    def value(results: Results) -> float:
        pairs = zip(results.values(name, metric), results.values(below, metric), strict=True)
        return float(np.median([a / b for a, b in pairs]))

    return value


def spread(results: Results, metric: str = "distance", name: str = "plain") -> float:
    """Largest over smallest figure of an arm over the seeds."""
    return results.max(name, metric) / results.min(name, metric)


def named(
    arms: Mapping[str, Sequence[Any]], budget: float, *, data: Sequence[str]
) -> dict[str, Callable[[int], dict[str, float]]]:
    """Arms by name, on every set: `fashion: cep`."""
    return {
        f"{on}: {name}": arm(techniques, budget=budget, data=on) for on in data for name, techniques in arms.items()
    }
