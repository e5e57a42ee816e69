"""Does a guidance weight inside of the one-step generator do what guidance does to its teacher: clearer classes, less variety?"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.prior_gap import ALONE, CLASSES, SIZE, UNSEEN_SEED, draw, judge
from pagoda.diffusion import Condition, GuidedDenoiser, build_solver, karras_sigmas, sample
from pagoda.evaluation import ClassifierFeatures, FeatureMoments, contrast, frechet_distance
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.training import noise_of_seeds

WEIGHTS = (1.0, 2.0, 3.0, 4.0)
IMAGES, TEACHER_STEPS = 2000, 300
"""Few steps: a teacher whose classes are not clear yet has something to be guided to."""
ARMS: dict[str, dict[str, Any]] = {
    "rec": {"distill.mode": "rec", **ALONE},
    "both": {"distill.mode": "both", **ALONE},
    "both, matched": {"distill.mode": "both"},
    "both, adversarial": {"distill.mode": "both", "distill.loss.adversarial": 0.1, **ALONE},
    "both, adversarial on the teacher's": {
        "distill.mode": "both",
        "distill.loss.adversarial": 0.1,
        **ALONE,
        "guidance.assignment": "teacher",
    },
}


def judged(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images that the classifier takes for their class, their distance to unseen drawings, their contrast."""
    extractor = ClassifierFeatures(judge())
    real, _ = draw(2000, UNSEEN_SEED)
    made = [extractor.features_and_logits(part) for part in images.split(250)]
    reference = torch.cat([extractor(part.float() / 127.5 - 1) for part in real.split(250)])
    features, logits = (torch.cat([found[k] for found in made]) for k in (0, 1))
    distance = frechet_distance(FeatureMoments.from_features(reference), FeatureMoments.from_features(features))
    agreement = float((logits.argmax(1).cpu() == labels).double().mean())
    return {"agreement": agreement, "distance": distance, "contrast": contrast(images).per_image}


def arm(settings: dict[str, Any], budget: float) -> Arm:
    """A run under guidance, its generator at every weight, and its teacher at every weight."""

    def measure(seed: int) -> dict[str, float]:
        common = {
            "seed": seed,
            "threads": 1,
            "device": "cpu",
            "mirror": False,
            "guidance.scale_max": WEIGHTS[-1],
            "teach.loop.steps": max(20, round(TEACHER_STEPS * budget)),
            "teach.loop.preview_every": 0,
            "distill.loop.steps": max(20, round(800 * budget)),
            "distill.loop.preview_every": 0,
            "distill.teacher_pairs.count": max(64, round(4000 * budget)),
            "evaluation.gap.count": 0,
        }
        data = f"shapes:count={max(60, round(IMAGES * min(1.0, budget)))}"
        config = override(preset_config("tiny", data, base=SIZE, size=SIZE), {**common, **settings})
        count = max(100, round(1000 * budget))
        seeds, labels = list(range(10_000, 10_000 + count)), torch.arange(count) % CLASSES
        with tempfile.TemporaryDirectory() as folder:
            run = train(config, folder + "/run", until="distill", quiet=True)
            generator, (denoiser, _) = load_generator(run), load_teacher(run.teacher)
            figures = {"images": float(count)}
            for weight in WEIGHTS:
                made = sample_images(generator, seeds, labels=labels.tolist(), guidance=weight)
                figures |= {f"{name}_{weight:g}": value for name, value in judged(made, labels).items()}
                taught = teacher_images(GuidedDenoiser(denoiser, weight), seeds, labels)
                figures |= {f"teacher_{name}_{weight:g}": value for name, value in judged(taught, labels).items()}
            results = run.require("encode", "pagoda encode")["results"]
        for number, part in enumerate(results["std_by_guidance"]):
            figures[f"latent_std_{number}"] = part["std"]
        return figures

    return measure


@torch.no_grad()
def teacher_images(denoiser: GuidedDenoiser, seeds: list[int], labels: Tensor) -> Tensor:
    """Samples of the guided teacher (N, 3, SIZE, SIZE) in [-1, 1], DPM-Solver++ at 16 levels."""
    sigmas = torch.cat([karras_sigmas(16, sigma_min=0.04), torch.zeros(1, dtype=torch.float64)])
    made = []
    for rows in torch.arange(len(seeds)).split(250):
        z = noise_of_seeds([seeds[i] for i in rows.tolist()], (3, SIZE, SIZE))
        condition = Condition.of_labels(labels[rows])
        made.append(sample(denoiser, z, sigmas=sigmas, condition=condition, solver=build_solver("dpm2m")))
    return torch.cat(made).clamp(-1, 1)


def gain(name: str, who: str = "") -> Callable[[Results], float]:
    """Median over the seeds of the agreement at the largest weight, less that at weight 1."""

    def value(results: Results) -> float:
        last, first = (results.values(name, f"{who}agreement_{w:g}") for w in (WEIGHTS[-1], WEIGHTS[0]))
        found = sorted(a - b for a, b in zip(last, first, strict=True))
        return found[len(found) // 2]

    return value


def largest_fall(name: str) -> Callable[[Results], float]:
    """The largest fall of the agreement from one weight to the next, in standard errors of the difference of the two shares, each of all
    images of all seeds; 0 where it never falls."""

    def value(results: Results) -> float:
        count = sum(results.values(name, "images"))
        shares = [results.values(name, f"agreement_{weight:g}") for weight in WEIGHTS]
        means = [sum(share) / len(share) for share in shares]
        falls = []
        for lower, upper in itertools.pairwise(means):
            error = ((lower * (1 - lower) + upper * (1 - upper)) / count) ** 0.5
            falls.append((lower - upper) / error if lower > upper else 0.0)
        return max(falls)

    return value


@benchmark(
    "guidance",
    question="Do the classes of a one-step generator become clearer as its guidance weight rises, as its teacher's do?",
    passes=[
        PassLine("the teacher's agreement rises by at least 0.02 from weight 1 to 4", gain("both", "teacher_"), at_least=0.02),
        PassLine("with the teacher's pairs, that of one step rises by at least half as much",
                 lambda r: gain("both")(r) / max(gain("both", "teacher_")(r), 1e-12), at_least=0.5),
        PassLine("from reconstruction alone it rises by at least 0.005", gain("rec"), at_least=0.005),
        PassLine("with the teacher's pairs, agreement falls from no weight to the next by more than two standard errors",
                 largest_fall("both"), at_most=2.0),
        PassLine("nor does it from reconstruction alone", largest_fall("rec"), at_most=2.0),
        PassLine("nor with matching", largest_fall("both, matched"), at_most=2.0),
        PassLine("a discriminator that is told independent weights takes at most half of the rise away",
                 lambda r: gain("both, adversarial")(r) / max(gain("both")(r), 1e-12), at_least=0.5),
        PassLine("one that sees the guided teacher's images takes at most a fifth",
                 lambda r: gain("both, adversarial on the teacher's")(r) / max(gain("both")(r), 1e-12), at_least=0.8),
    ],
)  # fmt: skip
def guidance(budget: float) -> dict[str, Arm]:
    """One run an arm."""
    return {name: arm(settings, budget) for name, settings in ARMS.items()}
