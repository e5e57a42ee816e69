"""PaGoDA beside what else the same compute buys: a diffusion model of the full size, and a cascade of diffusion models.

All three take as many multiply-adds as PaGoDA does in all its stages, inversion and the teacher's pairs included, on the same
images. The cascade starts from PaGoDA's own teacher, whose work counts; the rest is shared equally by its octaves. Distances
of each size are in the features of that size's classifier, against real images of that size. What each took in seconds stands beside it.

Arms of one seed follow each other: the first makes the run, the others read what it is.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cascade import Trained, draw, train_for
from benchmarks.equal_work import work_by_stage
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.harness.runner import load_result
from benchmarks.heart import FIRST_SEED
from benchmarks.metrics import score_images
from benchmarks.shapes import judge as shapes_judge
from benchmarks.shapes import real_images
from pagoda.diffusion import Denoiser
from pagoda.errors import ConfigError
from pagoda.evaluation import ClassifierFeatures, SmallClassifier
from pagoda.files import atomic_path
from pagoda.stages.amortise import STAGE as AMORTISE
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import stages_of, train
from pagoda.training import Runtime

TIMED = 32
"""Images whose making is timed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A data set, and how long PaGoDA is trained on it.

    Attributes:
        steps: Share of the preset's steps and pairs.
        settings: Changes of the preset.
        runs: What PaGoDA's run folders are called in PAGODA_RUNS, before `-seed0`.
        brought: The run of a seed and a budget where another benchmark makes them; preset, steps and settings are then that one's.
        real: Real images by size, uint8 (N, C, s, s), and their labels (N,).
        judge: The classifier of each size.
        count: Samples that are scored.
    """

    preset: str
    data: Callable[[], str]
    sizes: tuple[int, ...]
    steps: float
    settings: dict[str, Any]
    runs: str
    real: Callable[[int], tuple[Tensor, Tensor]]
    judge: Callable[[int], SmallClassifier]
    count: int
    brought: Callable[[int, float], RunFolder] | None = None

    def config(self, seed: int, budget: float) -> RunConfig:
        """Of PaGoDA's run."""
        config = preset_config(self.preset, self.data(), base=self.sizes[0], size=self.sizes[-1])
        share = self.steps * budget
        shorter: dict[str, Any] = {
            "teach.loop.steps": config.teach.loop.steps,
            "distill.loop.steps": config.distill.loop.steps,
            "distill.teacher_pairs.count": config.distill.teacher_pairs.count,
        }
        shorter = {name: max(20, round(share * value)) for name, value in shorter.items()}
        shorter["grow.steps"] = [max(20, round(share * value)) for value in config.grow.steps]
        return override(config, {**shorter, "seed": seed, **self.settings})


SHAPES = Setting(
    preset="tiny",
    data=lambda: "shapes",
    sizes=(8, 16, 32),
    steps=0.5,  # of the demo's: a seed of three ways then takes half an hour of one core
    settings={
        "mirror": False,  # a mirrored crescent is not drawn by the set
        "encode.share": 0.5,  # as the demo
        "device": "cpu",
        "evaluation.gap.count": 0,
        **{f"{stage}.loop.preview_every": 0 for stage in ("teach", "distill", "grow")},
    },
    runs="same_compute",
    real=real_images,
    judge=shapes_judge,
    count=500,
)


@cache
def made_run(setting: Setting, seed: int, budget: float) -> RunFolder:
    """PaGoDA's run of a seed, kept in PAGODA_RUNS."""
    if setting.brought is not None:
        return setting.brought(seed, budget)
    runs = Path(os.environ.get("PAGODA_RUNS", "runs"))
    runs.mkdir(parents=True, exist_ok=True)
    name = f"{setting.runs}-seed{seed}" + ("" if budget >= 1 else f"-budget{budget:g}")
    return train(setting.config(seed, budget), str(runs / name), quiet=True)


def seconds_by_stage(run: RunFolder) -> dict[str, float]:
    """Of every stage, and of the teacher's pairs; not of an encoder in one call that was trained beside them."""
    stages = [path.stem for path in sorted((run.path / "stages").glob("*.json"))]
    beside = {AMORTISE} - set(stages_of(run.config()))
    return {s: float(run.require(s, "pagoda train")["results"]["seconds"]) for s in stages if s not in beside}


def counted(run: RunFolder) -> dict[str, int]:
    """Multiply-adds of every stage, as `pagoda plan` counts them; not of an encoder in one call that was trained beside them."""
    beside = {AMORTISE} - set(stages_of(run.config()))
    return {stage: each for stage, each in work_by_stage(run.config()).items() if stage not in beside}


def drawn_labels(setting: Setting) -> tuple[list[int], list[int]]:
    """Seeds of the scored samples, and their labels, as often as among the real images."""
    labels = setting.real(setting.sizes[0])[1].sort().values
    rows = torch.linspace(0, len(labels) - 1, setting.count).long()
    return list(range(FIRST_SEED, FIRST_SEED + setting.count)), labels[rows].tolist()


def score(setting: Setting, images: Tensor, seed: int) -> dict[str, float]:
    """Distance, floor and sharpness at the size of the images."""
    size = images.shape[-1]
    found = score_images(ClassifierFeatures(setting.judge(size)), *setting.real(size), images, seed)
    return {
        f"distance_{size}": found["distance"],
        f"floor_{size}": found["floor"],
        f"sharpness_{size}": found["sharpness_ratio"],
    }


def seconds_of(make: Callable[[], object]) -> float:
    """Seconds of a call, after one that warms up."""
    make()
    started = time.perf_counter()
    make()
    return time.perf_counter() - started


def pagoda_arm(setting: Setting, budget: float, seed: int) -> dict[str, float]:
    """One step at every size, and the base size enlarged."""
    run = made_run(setting, seed, budget)
    generator, (seeds, labels) = load_generator(run), drawn_labels(setting)
    figures = {"train_seconds": sum(seconds_by_stage(run).values()), "work_e9": sum(counted(run).values()) / 1e9}
    base, top = setting.sizes[0], setting.sizes[-1]
    for size in setting.sizes:
        made = sample_images(generator, seeds, labels=labels, resolution=size)
        figures |= score(setting, made, seed)
        if size == base:
            enlarged = F.interpolate(made, size=(top, top), mode="bicubic", antialias=False).clamp(-1, 1)
            figures[f"distance_enlarged_{top}"] = score(setting, enlarged, seed)[f"distance_{top}"]
    elapsed = seconds_of(lambda: sample_images(generator, seeds[:TIMED], labels=labels[:TIMED], batch_size=TIMED))
    return figures | {"ms_an_image": 1e3 * elapsed / TIMED}


def context_of(setting: Setting, run: RunFolder) -> StageContext:
    """Images of the run at every size, its settings, and its precision: the others train as fast as it did."""
    return open_context(run, run.config(), Runtime("cpu", run.config().precision), quiet=True)


def direct_arm(setting: Setting, budget: float, seed: int) -> dict[str, float]:
    """A diffusion model of the full size, from scratch."""
    run, top = made_run(setting, seed, budget), setting.sizes[-1]
    work, (seeds, labels) = sum(counted(run).values()), drawn_labels(setting)
    context = context_of(setting, run)
    with tempfile.TemporaryDirectory() as folder:
        model = train_for(context, top, preset=setting.preset, multiply_adds=work, lower=None, folder=Path(folder))
    shape = (context.data.channels, top, top)
    figures = score(setting, draw(model.denoiser, seeds, labels, shape, None), seed)
    elapsed = seconds_of(lambda: draw(model.denoiser, seeds[:TIMED], labels[:TIMED], shape, None))
    spent = {"train_seconds": model.seconds, "work_e9": model.multiply_adds / 1e9, "steps": float(model.steps)}
    return figures | spent | {"ms_an_image": 1e3 * elapsed / TIMED}


def cascade_arm(setting: Setting, budget: float, seed: int) -> dict[str, float]:
    """PaGoDA's teacher, and a diffusion model for each octave on top of it."""
    run, octaves = made_run(setting, seed, budget), setting.sizes[1:]
    by_stage = counted(run)
    each = (sum(by_stage.values()) - by_stage["teach"]) / len(octaves)
    context, base = context_of(setting, run), setting.sizes[0]
    seeds, labels = drawn_labels(setting)
    models: dict[int, tuple[Denoiser, Trained | None]] = {base: (load_teacher(run.teacher)[0], None)}
    with tempfile.TemporaryDirectory() as folder:
        for lower, size in zip(setting.sizes, octaves, strict=False):
            model = train_for(
                context, size, preset=setting.preset, multiply_adds=each, lower=lower, folder=Path(folder) / str(size)
            )
            models[size] = (model.denoiser, model)

    def chain(count: int) -> dict[int, Tensor]:
        made: dict[int, Tensor] = {}
        for size, (denoiser, _) in models.items():
            shape = (context.data.channels, size, size)
            made[size] = draw(denoiser, seeds[:count], labels[:count], shape, made.get(size // 2))
        return made

    figures: dict[str, float] = {}
    for images in chain(setting.count).values():
        figures |= score(setting, images, seed)
    trained = [model for _, model in models.values() if model is not None]
    return figures | {
        "train_seconds": seconds_by_stage(run)["teach"] + sum(model.seconds for model in trained),
        "work_e9": (by_stage["teach"] + sum(model.multiply_adds for model in trained)) / 1e9,
        "ms_an_image": 1e3 * seconds_of(lambda: chain(TIMED)) / TIMED,
        **{f"steps_{size}": float(model.steps) for size, (_, model) in models.items() if model is not None},
    }


ARMS = {"pagoda": pagoda_arm, "direct": direct_arm, "cascade": cascade_arm}


def worst(above: tuple[str, str], below: tuple[str, str]) -> Callable[[Results], float]:
    """The largest ratio of two (arm, metric) over the seeds."""
    return lambda r: max(a / b for a, b in zip(r.values(*above), r.values(*below), strict=True))


def lines(setting: Setting) -> list[PassLine]:
    """The limits, the same for every set."""
    first, top = setting.sizes[1], setting.sizes[-1]
    grown, enlarged = ("pagoda", f"distance_{top}"), ("pagoda", f"distance_enlarged_{top}")
    return [
        PassLine(
            f"{top} px: a smaller distance than the diffusion model of that size, on every seed",
            worst(grown, ("direct", f"distance_{top}")),
            at_most=1.0,
        ),
        PassLine(
            "and at least 30 x faster sampling",
            lambda r: r.median("direct", "ms_an_image") / r.median("pagoda", "ms_an_image"),
            at_least=30,
        ),
        PassLine("at most a third of the distance of enlarged base samples", worst(grown, enlarged), at_most=1 / 3),
        PassLine(
            f"nearly flat over sizes: {top} px at most 1.5 x {first} px",
            worst(grown, ("pagoda", f"distance_{first}")),
            at_most=1.5,
        ),
        PassLine(
            f"{top} px: a smaller distance than the cascade, on every seed",
            worst(grown, ("cascade", f"distance_{top}")),
            at_most=1.0,
        ),
        PassLine("the three take equal work within 5 %", lambda r: r.unequal(ARMS, "work_e9"), at_most=1.05),
    ]


def arms(setting: Setting, budget: float) -> dict[str, Arm]:
    """Of one set."""
    return {name: partial(arm, setting, budget) for name, arm in ARMS.items()}


QUESTION = (
    "From as many multiply-adds as PaGoDA takes in all its stages, does a diffusion model of the full size, or a cascade of diffusion "
    "models, come as near to the data? {}"
)


@benchmark(
    "same_compute",
    question=QUESTION.format("Drawn shapes, 8 to 32 px, half of the demo's steps."),
    passes=lines(SHAPES),
)
def same_compute(budget: float) -> dict[str, Arm]:
    """Drawn shapes."""
    return arms(SHAPES, budget)


def draw_curves(result: Path, target: Path) -> None:
    """Both curves over sizes, medians with the range over seeds, from a finished result file.

    Raises:
        ConfigError: the result is not finished.
    """
    import matplotlib.pyplot as plt

    record = load_result(result)
    if not record["complete"]:
        raise ConfigError(f"{result} is not finished: run the same command again first.")
    looks = {
        "pagoda": ("one step, grown", "#3f6f8f", "o-"),
        "cascade": ("cascade of diffusion models", "#d08a3c", "s--"),
        "direct": ("diffusion model of the full size", "#777777", "D"),
    }
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    all_sizes: set[int] = set()
    for arm, (words, colour, style) in looks.items():
        rows = [row["metrics"] for row in record["arms"][arm]]
        names = {name.removeprefix("distance_"): name for name in rows[0] if name.startswith("distance_")}
        sizes = sorted(int(size) for size in names if size.isdigit())
        values = torch.tensor([[row[f"distance_{size}"] for size in sizes] for row in rows])  # (seeds, sizes)
        middle = values.median(0).values
        spread = torch.stack([middle - values.amin(0), values.amax(0) - middle])
        axes.errorbar(sizes, middle, yerr=spread, fmt=style, color=colour, capsize=3, label=words)
        all_sizes |= set(sizes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(all_sizes), [f"{size} px" for size in sorted(all_sizes)])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Fréchet distance to real images of the size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(target) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["draw"] and len(sys.argv) == 4:
        draw_curves(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit("usage: python -m benchmarks.same_compute draw RESULT.json PICTURE.png")
