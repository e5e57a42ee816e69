"""The prior gap on real images: Fashion-MNIST with few and many images at 16 px, and the emoji at 16 and 64 px.

Distances are those of the walk that every run measures, from latents to fresh noise, in the features of a classifier of real images that no
training uses. `unseen` are latents of images that were held out of everything: test images of Fashion-MNIST, and the symbols that the runs
of `emoji_text` leave out (159 of them: each point is then measured on as many images).

A Fréchet distance of so few images has a floor, which pulls ratios towards 1. So they are asked for twice: as they are, and after the
distance of as many real images (other ones of the same kind) is taken off both, each where it stands.

`one_step` and `teacher` are distances of 1,000 samples to the test images of Fashion-MNIST: the paper's student comes below its teacher.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.emoji_text import archives, made_run, real_images
from benchmarks.fashion_mnist import test_images, training_images
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.heart import FIRST_SEED, fit_classifier, teacher_samples
from benchmarks.metrics import score_images
from benchmarks.real_sets import data_file
from pagoda.evaluation import ClassifierFeatures, SmallClassifier
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.prior_gap import load_gaps
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

COUNTS = (2000, 20_000)
SIZE, CLASSES, TEST = 16, 10, 2000
POINT = 500
"""Images a point of the walk of Fashion-MNIST."""
ENCODED = {2000: 1.0, 20_000: 0.3}
"""Share of the images that have latents: 0.3 as in `fashion_mnist`, where inverting all would take as long as all training."""
SCORED = 1000
"""Samples of the generator and of its teacher that are compared with the test images."""


def cut(folder: Path, prefix: str, count: int, out: Path) -> Path:
    """A folder of IDX files with the first images of others, under the name of a training set."""
    out.mkdir(parents=True, exist_ok=True)
    for kind, side in (("images-idx3", 28 * 28), ("labels-idx1", 1)):
        content = gzip.decompress((folder / f"{prefix}-{kind}-ubyte.gz").read_bytes())
        header = 16 if side > 1 else 8
        kept = content[:4] + count.to_bytes(4, "big") + content[8:header]
        packed = gzip.compress(kept + content[header : header + count * side], mtime=0)
        (out / f"train-{kind}-ubyte.gz").write_bytes(packed)
    return out


@cache
def fashion_judge(budget: float) -> SmallClassifier:
    """A classifier of 20,000 training images at the size of the runs."""
    return fit_classifier(training_images(SIZE), num_classes=CLASSES, steps=max(20, round(1000 * budget)))


@cache
def emoji_judge(size: int, budget: float) -> SmallClassifier:
    """A classifier of the training emoji."""
    images, labels = real_images(size)
    return fit_classifier((images, labels), num_classes=9, steps=max(20, round(600 * budget)))


def figures_of(run: RunFolder, size: int) -> dict[str, float]:
    """Of every point; and the last one's over those of unseen and of training latents."""
    facts = load_gaps(run)[size]
    points = {p["name"] if p["name"] != "mixture" else f"mixture_{p['fraction']:g}": p for p in facts["points"]}
    found = {f"{key}_{name}": float(point[key]) for name, point in points.items() for key in ("fd", "kd")}
    floors = {name: float(points[name]["floor_fd"]) for name in ("noise", "unseen")}
    found |= {"floor": floors["noise"], "floor_unseen": floors["unseen"]}
    found |= {"contrast": float(points["noise"]["contrast_ratio"])}
    above = {name: found[f"fd_{name}"] - floor for name, floor in floors.items()}
    return found | {
        "noise_over_unseen": found["fd_noise"] / found["fd_unseen"],
        "noise_over_unseen_above_floors": above["noise"] / max(above["unseen"], 1e-3 * floors["unseen"]),
        "noise_over_training": found["fd_noise"] / found["fd_training"],
    }


def fashion_config(data: str, share: float, unseen: str, judge: Path, budget: float, seed: int) -> RunConfig:
    """The preset `small` at base size; a share of the images has latents."""
    config = preset_config("small", data, base=SIZE, size=SIZE)
    steps = {"teach.loop.steps": config.teach.loop.steps, "distill.loop.steps": config.distill.loop.steps}
    steps["distill.teacher_pairs.count"] = config.distill.teacher_pairs.count
    settings = {name: max(20, round(budget * value)) for name, value in steps.items()}
    return override(
        config,
        {
            **settings,
            "seed": seed,
            "device": "cpu",
            "mirror": False,
            "encode.share": share,
            "source.pad": 32,
            "evaluation.data": unseen,
            "evaluation.gap.count": POINT,
            "evaluation.gap.features": f"classifier:{judge}",
        },
    )


def fashion(count: int, budget: float, seed: int) -> dict[str, float]:
    """A run on the first `count` images."""
    source = data_file("fashion_mnist")
    runs = Path(os.environ.get("PAGODA_RUNS", "runs"))
    with tempfile.TemporaryDirectory() as name:
        data = cut(source, "train", max(100, round(count * min(1.0, 10 * budget))), Path(name) / "data")
        unseen = cut(source, "t10k", TEST, Path(name) / "unseen")
        fashion_judge(budget).save(Path(name) / "judge")
        out = runs / (f"prior-gap-fashion-{count}-seed{seed}" + ("" if budget >= 1 else f"-budget{budget:g}"))
        config = fashion_config(str(data), ENCODED[count], str(unseen), Path(name) / "judge", budget, seed)
        run = train(config, str(out), until="distill", quiet=True)
        return figures_of(run, SIZE) | beside_teacher(run, budget, seed)


def beside_teacher(run: RunFolder, budget: float, seed: int) -> dict[str, float]:
    """Distances of the generator's and of its teacher's samples, from the same noise, to the test images."""
    real, count = test_images(SIZE), max(100, round(SCORED * min(1.0, budget)))
    labels, seeds = [CLASSES * i // count for i in range(count)], list(range(FIRST_SEED, FIRST_SEED + count))
    made = {
        "one_step": sample_images(load_generator(run), seeds, labels=labels),
        "teacher": teacher_samples(load_teacher(run.teacher)[0], seeds, labels, (1, SIZE, SIZE)),
    }
    extractor = ClassifierFeatures(fashion_judge(budget))
    return {name: score_images(extractor, *real, images, seed)["distance"] for name, images in made.items()}


def emoji(size: int, budget: float, seed: int) -> dict[str, float]:
    """The label run of `emoji_text`, measured anew against the symbols that it was not trained on."""
    run, _ = made_run("label", seed, budget)
    with tempfile.TemporaryDirectory() as name:
        emoji_judge(size, budget).save(Path(name) / "judge")
        changes = {
            "evaluation.data": str(archives()[1]),
            "evaluation.gap.count": 159,
            "evaluation.gap.features": f"classifier:{Path(name) / 'judge'}",
        }
        torch.manual_seed(seed)
        return figures_of(train(override(run.config(), changes), str(run.path), quiet=True), size)


def worst(arm: str, ratio: str = "noise_over_unseen") -> object:
    """The largest ratio of fresh noise to unseen latents over the seeds."""
    return lambda r: r.max(arm, ratio)


ARMS = (*(f"fashion {count}" for count in COUNTS), "emoji 16 px", "emoji 64 px")


def over_teacher(count: int) -> object:
    """The largest ratio of one step to its teacher over the seeds."""
    arm = f"fashion {count}"
    return lambda r: max(a / b for a, b in zip(r.values(arm, "one_step"), r.values(arm, "teacher"), strict=True))


def narrower(results: Results) -> float:
    """The ratio with many images over that with few, medians."""
    few, many = (results.median(f"fashion {count}", "noise_over_unseen") for count in COUNTS)
    return many / few


@benchmark(
    "prior_gap_real",
    question="On real images, few and many: how much further from the data are samples of fresh noise than of unseen images' latents?",
    passes=[
        *(
            PassLine(f"{arm}: fresh noise at most 1.3 x as far as unseen latents", worst(arm), at_most=1.3)  # type: ignore[arg-type]
            for arm in ARMS
        ),
        *(
            PassLine(
                f"{arm}: the same after the distance of real images is taken off both",
                worst(arm, "noise_over_unseen_above_floors"),
                at_most=1.3,
            )  # type: ignore[arg-type]
            for arm in ARMS
        ),
        *(
            PassLine(f"fashion {count}: one step at most at its teacher's distance", over_teacher(count), at_most=1.0)  # type: ignore[arg-type]
            for count in COUNTS
        ),
        PassLine("Fashion-MNIST: the ratio is no larger with 20,000 images than with 2,000", narrower, at_most=1.0),
    ],
)
def prior_gap_real(budget: float) -> dict[str, Arm]:
    """Two sizes of one set, and two sizes in pixels of another."""
    arms: dict[str, Arm] = {f"fashion {count}": partial(fashion, count, budget) for count in COUNTS}
    return arms | {f"emoji {size} px": partial(emoji, size, budget) for size in (16, 64)}
