"""What is measured of a finished run, the same for every data set: distances with floors, contrast, inversion, speed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.metrics import score_images
from pagoda.diffusion import Condition, EDMDenoiser, sample
from pagoda.evaluation import ClassifierFeatures, SmallClassifier, train_classifier
from pagoda.images import make_grid, save_image
from pagoda.networks import OneStepGenerator
from pagoda.stages.context import load_teacher
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teacher_pairs import RECORD as TEACHER_PAIRS
from pagoda.training import noise_of_seeds

Real = Callable[[int], tuple[Tensor, Tensor]]
"""Real images the run was not trained on where there are enough, by size: uint8 (N, C, s, s) and labels (N,)."""

BATCH = 256
"""Images a network call, of the teacher and of the generator alike."""

TIMED = 512
"""Images whose making is timed."""

FIRST_SEED = 1_000_000
"""Seeds of scored samples start here: none of them was looked at while settings were chosen."""


def fit_classifier(train: tuple[Tensor, Tensor], *, num_classes: int, steps: int) -> SmallClassifier:
    """The independent judge of one size: trained on real images alone, never used in training a generator."""
    images, labels = train
    return train_classifier(
        images, labels, num_classes=num_classes, input_size=images.shape[-1], steps=steps, seed=0
    ).eval()


def teacher_samples(denoiser: EDMDenoiser, seeds: list[int], labels: list[int], shape: tuple[int, ...]) -> Tensor:
    """Samples of the teacher with Heun at 18 levels, (N, C, b, b) in [-1, 1]."""
    made = []
    with torch.no_grad():
        for part in torch.arange(len(seeds)).split(BATCH):
            z = noise_of_seeds([seeds[i] for i in part.tolist()], shape)
            made.append(sample(denoiser, z, condition=Condition.of_labels([labels[i] for i in part.tolist()])))
    return torch.cat(made).clamp(-1, 1)


def seconds_per_image(makers: dict[str, Callable[[int], object]], count: int, rounds: int = 3) -> dict[str, float]:
    """Seconds an image of each maker: the median over rounds in which they take turns, after a warm-up call."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for make in makers.values():
        make(64)
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.perf_counter()
            make(count)
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def score_run(
    path: Path,
    real: Real,
    judges: dict[int, SmallClassifier],
    *,
    count: int,
    split_seed: int,
    grids: Path | None = None,
) -> dict[str, float]:
    """Every figure of a finished run.

    Args:
        path: The run folder.
        real: Real images by size.
        judges: A classifier for each size of the run.
        count: Samples that are scored, with labels as often as among the real images.
        split_seed: Halves the real images.
        grids: Folder for the pictures of this run; none when None.

    Returns:
        By name: `distance_<arm>_<size>` and `floor_<size>`, `contrast_<size>`, `sharpness_<size>`, `psnr`, `latent_std`,
        `ms_one_step_<size>`, `ms_teacher`, `speedup`, and the minutes of each stage and of the teacher's pairs.
    """
    run = RunFolder(path)
    sizes = run.generator_sizes()
    base = sizes[0]
    generator = load_generator(run)
    denoiser, _ = load_teacher(run.teacher)
    # Sorted first: of labels in a cycle, every second one would miss half of the classes.
    labels = real(base)[1].sort().values[torch.linspace(0, len(real(base)[1]) - 1, count).long()].tolist()
    seeds = list(range(FIRST_SEED, FIRST_SEED + count))
    shape = (generator.channels, base, base)
    figures: dict[str, float] = {}

    def score(arm: str, size: int, fakes: Tensor) -> None:
        found = score_images(ClassifierFeatures(judges[size]), *real(size), fakes, split_seed)
        figures[f"distance_{arm}_{size}"] = found["distance"]
        figures[f"floor_{size}"] = found["floor"]
        if arm == "one_step":
            figures[f"contrast_{size}"] = found["contrast_ratio"]
            figures[f"sharpness_{size}"] = found["sharpness_ratio"]

    taught = teacher_samples(denoiser, seeds, labels, shape)
    score("teacher", base, taught)
    made = {size: sample_images(generator, seeds, labels=labels, resolution=size) for size in sizes}
    for size in sizes:
        score("one_step", size, made[size])
        if size > base:
            enlarged = F.interpolate(made[base], size=(size, size), mode="bicubic", antialias=False).clamp(-1, 1)
            score("enlarged", size, enlarged)
    results = {stage: run.require(stage, "pagoda train")["results"] for stage in ("teach", "encode", "distill")}
    figures["psnr"] = results["encode"]["round_trip_psnr"]
    figures["latent_std"] = results["encode"]["std"]
    makers: dict[str, Callable[[int], object]] = {f"one_step_{size}": _one_step(generator, size) for size in sizes}
    makers["teacher"] = lambda n: teacher_samples(denoiser, seeds[:n], labels[:n], shape)
    for name, seconds in seconds_per_image(makers, TIMED).items():
        figures[f"ms_{name}"] = 1e3 * seconds
    figures["speedup"] = figures["ms_teacher"] / figures[f"ms_one_step_{base}"]
    for stage in [*results, *(f"grow-{size}" for size in sizes[1:])]:
        figures[f"minutes_{stage}"] = run.require(stage, "pagoda train")["results"]["seconds"] / 60
    pairs = run.record(TEACHER_PAIRS)  # made before the first step of `distill`, which does not count them
    if pairs is not None:
        figures["minutes_pairs"] = pairs["results"]["seconds"] / 60
    if grids is not None:
        _draw(grids, path.name, generator, denoiser, shape)
    return figures


def _one_step(generator: OneStepGenerator, size: int) -> Callable[[int], object]:
    """What makes n images of a size in one step, in batches as large as the teacher's."""
    classes = generator.num_classes

    def make(count: int) -> Tensor:
        labels = [i % classes for i in range(count)] if classes else None
        return sample_images(generator, range(count), labels=labels, resolution=size, batch_size=BATCH)

    return make


def _draw(folder: Path, name: str, generator: OneStepGenerator, denoiser: EDMDenoiser, shape: tuple[int, ...]) -> None:
    """The grid of the docs: a column a class; and the same seeds at every size."""
    classes = max(1, generator.num_classes)
    seeds = list(range(8 * classes))
    labels = [i % classes for i in seeds] if generator.num_classes else None
    top = sample_images(generator, seeds, labels=labels)
    facts = {"seeds": seeds, "labels": labels}
    save_image(
        make_grid(top, columns=classes if classes > 1 else 8), folder / f"{name}-{generator.size}.png", metadata=facts
    )
    few = slice(0, min(10, len(seeds)))
    rows = [teacher_samples(denoiser, seeds[few], (labels or [0] * 10)[few], shape)] if labels else []
    rows += [
        sample_images(generator, seeds[few], labels=labels[few] if labels else None, resolution=s)
        for s in generator.sizes
    ]
    enlarged = torch.cat([F.interpolate(r, size=(generator.size, generator.size), mode="nearest") for r in rows])
    save_image(make_grid(enlarged, columns=len(rows[0])), folder / f"{name}-octaves.png", metadata=facts)


def stage_log(path: Path) -> list[dict[str, object]]:
    """Lines of a run's metrics."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def win_rates(run: RunFolder, stage: str) -> dict[str, float]:
    """How often a stage's judge ranks a real image above a generated one: at first, when the generator is first told of it, and at the end.

    0.5 is chance. Nothing where no judged step was logged.
    """
    rows = [row for row in stage_log(run.path) if row["stage"] == stage]
    told = [row for row in rows if "generator/adversarial" in row or "adversarial/adversarial" in row]
    if not told:
        return {}
    before = [
        row for row in rows if "discriminator/win_rate" in row and int(str(row["step"])) <= int(str(told[0]["step"]))
    ]
    return {
        "win_rate_first": float(str(before[0]["discriminator/win_rate"])),
        "win_rate_told": float(str(before[-1]["discriminator/win_rate"])),
        "win_rate_last": float(str(told[-1]["discriminator/win_rate"])),
    }


def grown_figures(grown: Mapping[str, float], enlarged: Mapping[str, float]) -> dict[str, float]:
    """What a benchmark of octaves tells of grown images, beside the distance of those of the size below, enlarged.

    Args:
        grown, enlarged: As `score_images` gives them.
    """
    return {
        "distance": grown["distance"],
        "distance_enlarged": enlarged["distance"],
        "floor": grown["floor"],
        "sharpness": grown["sharpness_ratio"],
        "contrast": grown["contrast_ratio"],
    }
