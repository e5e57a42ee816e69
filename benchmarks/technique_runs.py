"""One stage-1 run with techniques on drawn shapes, and what is measured of it: shared by the benchmarks of techniques."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Results
from benchmarks.metrics import score_images
from pagoda.data import Downsampler, ShapesSource
from pagoda.diffusion import Condition, Denoiser, EDMDenoiser, GuidedDenoiser, karras_sigmas, sample
from pagoda.diffusion.solvers import DPMSolver2M
from pagoda.evaluation import ClassifierFeatures, SmallClassifier, train_classifier
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.train import train
from pagoda.training import NoiseLaw, noise_of_seeds, seeded_generator

SIZE, CLASSES = 16, 10
TRAINED = 600
"""Images that are trained on: few, so that training longer or better shows."""
HELD_OUT_SEED, JUDGE_SEED = 1000, 1001
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


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn shapes (count, 3, SIZE, SIZE) uint8 and their classes."""
    source, reduce = ShapesSource(count=count, size=SIZE, seed=seed), Downsampler()
    images = np.stack([reduce(source.image(i), SIZE) for i in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % CLASSES


@lru_cache(maxsize=1)
def held_out() -> tuple[Tensor, Tensor]:
    """2,000 shapes that no run sees."""
    return draw(2000, HELD_OUT_SEED)


@lru_cache(maxsize=1)
def judge() -> SmallClassifier:
    """The classifier whose features are compared; trained on images that no run sees and nothing is measured on."""
    images, labels = draw(4000, JUDGE_SEED)
    return train_classifier(images, labels, num_classes=CLASSES, steps=600)


WEIGHTS = (1.5, 2.0, 3.0)
"""Of guidance, where an arm is judged by the best of them and none."""


def arm(
    techniques: Sequence[Any], *, budget: float, guided: bool = False, **changes: Any
) -> Callable[[int], dict[str, float]]:
    """A run with these techniques, for every seed.

    Args:
        techniques: As in a configuration.
        budget: Factor of the steps and of the samples.
        guided: Whether samples are drawn with guidance too.
        changes: Other settings, their dots written as `__`.
    """

    def measure(seed: int) -> dict[str, float]:
        settings = {**SETTINGS, "seed": seed, "teach.loop.steps": max(20, round(STEPS * budget))}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        settings["techniques"] = list(techniques)
        data = f"shapes:count={TRAINED}"
        config = override(preset_config("tiny", data, base=SIZE, size=SIZE), settings)
        with tempfile.TemporaryDirectory() as folder:
            run = train(config, folder + "/run", until="teach", quiet=True)
            denoiser, _ = load_teacher(run.teacher)
            last = json.loads(run.metrics.read_text(encoding="utf-8").splitlines()[-1])
            figures = {"seconds": run.require("teach", "pagoda teach")["results"]["seconds"]}
        figures |= {key.split("/", 1)[1]: value for key, value in last.items() if key.count("/") == 2}
        count = max(200, round(1000 * budget))
        figures |= score(denoiser, seed, count)
        if guided:
            swept = {weight: distance(GuidedDenoiser(denoiser, weight), seed, count)["distance"] for weight in WEIGHTS}
            figures |= {f"distance_w{weight:g}".replace(".", "_"): value for weight, value in swept.items()}
            figures["best_distance"] = min(figures["distance"], *swept.values())
        return figures

    return measure


def score(denoiser: EDMDenoiser, seed: int, count: int) -> dict[str, float]:
    """Distance of samples, and the denoising loss on held-out images, in all and by band of the noise level."""
    return distance(denoiser, seed, count) | held_out_loss(denoiser, *held_out())


def distance(denoiser: Denoiser, seed: int, count: int) -> dict[str, float]:
    """Fréchet distance of samples to held-out images, and the floor that held-out images have among themselves."""
    labels = torch.arange(count) % CLASSES
    z = noise_of_seeds(list(range(count)), (3, SIZE, SIZE))
    made = []
    for rows in torch.arange(count).split(250):
        condition = Condition.of_labels(labels[rows])
        made.append(sample(denoiser, z[rows], sigmas=karras_sigmas(16), condition=condition, solver=DPMSolver2M()))
    real, real_labels = held_out()
    found = score_images(ClassifierFeatures(judge()), real, real_labels, torch.cat(made).clamp(-1, 1), seed)
    return {"distance": found["distance"], "floor": found["floor"]}


@torch.no_grad()
def held_out_loss(denoiser: EDMDenoiser, real: Tensor, labels: Tensor) -> dict[str, float]:
    """Weighted denoising loss in bands of equal training mass; the same noise for every network."""
    images = real[:480].float() / 127.5 - 1
    noise = torch.randn(images.shape, generator=seeded_generator("techniques", "held-out"))
    losses = []
    for band in range(BANDS):
        quantile = (torch.arange(len(images)) + 0.5) / len(images) / BANDS + band / BANDS
        sigma = LAW.sigma_at(quantile).float()
        estimate = denoiser(images + sigma[:, None, None, None] * noise, sigma, Condition.of_labels(labels[:480]))
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


def named(arms: Mapping[str, Sequence[Any]], budget: float) -> dict[str, Callable[[int], dict[str, float]]]:
    """Arms by name."""
    return {name: arm(techniques, budget=budget) for name, techniques in arms.items()}
