"""`evaluate`: scores of a run with their provenance, the same on one process and on several; `compare`: runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.diffusion import Condition, EDMDenoiser, build_solver, karras_sigmas, sample
from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation import (
    METRICS,
    Features,
    Score,
    ScoreOptions,
    collect_features,
    contrast,
    load_scores,
    metric_name,
    nearest_neighbours,
    score_features,
    score_table,
    sharpness,
)
from pagoda.files import write_text_atomic
from pagoda.images import make_grid, save_image
from pagoda.networks import model_hash
from pagoda.stages.captions import caption_condition
from pagoda.stages.context import load_teacher
from pagoda.stages.judging import RealImages, open_judge, open_real
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.training import Runtime, noise_of_seeds

FIRST_SEED = 1_000_000
"""Seeds of scored samples start here, far from those of previews and grids."""
BATCH = 256
"""Images a call; part of what makes two evaluations equal to the last digit."""
DEFAULT_METRICS = ("fd", "fd_inf", "kd", "precision", "recall", "density", "coverage")
SHOWN_PAIRS = 16
"""Generated images that are shown beside their nearest training image."""

MakeImages = Callable[[list[int], list[int] | Condition | None], Tensor]
"""Seeds, and labels or embedded texts -> images in [-1, 1], on the CPU."""


def evaluate_run(
    run: RunFolder,
    runtime: Runtime,
    *,
    data: str | None = None,
    model: str = "generator",
    size: int | None = None,
    count: int | None = 2000,
    metrics: Sequence[str] | None = None,
    features: str = "auto",
    options: ScoreOptions | None = None,
    seed: int = 0,
    allow_download: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Score a run's images and write `evaluation/<model>-<size>.json` into its folder.

    Real images are halved: one half is the reference, the other stands in for generated images in the floors, and its labels are those
    that images are generated with. The same call gives the same scores to the last digit, also on several processes.

    Args:
        data: Real images to compare with; the run's own training images when None.
        model: "generator", or "teacher" (Heun at 18 levels, at base size).
        size: Side in pixels; the largest when None.
        count: Images to score at most; as many as there are stand-ins when None.
        metrics: Names of `METRICS`; those of `DEFAULT_METRICS` that the number of images allows when None.
        features: See `open_judge`.
        options: Settings of the metrics.
        seed: Decides the split and the resampling.
        allow_download: Whether weights of the hub may be fetched.
        say: Receives lines for people.

    Raises:
        ArtifactError: the run has no such model yet, or weights are missing.
        ConfigError: unknown names.
        DataError: too few images.
    """
    if model not in ("generator", "teacher"):
        raise ConfigError(f"model must be generator or teacher, got {model!r}.")
    for metric in metrics or ():
        metric_name(metric, "")  # unknown names are refused before the long work
    config = run.config()
    make, facts, size = _maker(run, model, size, runtime)
    dataset = open_real(run, config, data, size, runtime)
    real = RealImages.split(dataset, size, count=count, seed=seed)
    extractor = open_judge(features, run, dataset, size, runtime, allow_download=allow_download)
    total = len(real.stand_in)
    if metrics is None:
        too_few = total // 2 <= 2 * (extractor.dim + 1)
        metrics = [m for m in DEFAULT_METRICS if not (m == "fd_inf" and too_few)]
    labels = dataset.labels(real.stand_in) if facts["conditional"] else None
    if facts["conditional"] and dataset.num_classes != facts["conditional"]:
        raise ConfigError(
            f"the model knows {facts['conditional']} classes, the images have {dataset.num_classes}; use images with the same classes."
        )
    if facts["texts"]:  # from here on, "labels" are rows of these texts
        make, labels = of_texts(make, caption_condition(run, dataset, real.stand_in)), torch.arange(total)
    kept: dict[int, Tensor] = {}  # batches of this process, by their first row

    def fakes(rows: Tensor) -> Tensor:
        images = make([FIRST_SEED + i for i in rows.tolist()], None if labels is None else labels[rows].tolist())
        return kept.setdefault(int(rows[0]), images)

    say(f"scoring {total} images of {size} px in features of `{extractor.name}`")
    made = collect_features(extractor, fakes, total, batch_size=BATCH, team=runtime)
    reference = _features_of(real, real.reference, extractor, runtime)
    stand_in = _features_of(real, real.stand_in, extractor, runtime)
    made_by = {"model": facts["hash"], "what": model, "first_seed": FIRST_SEED, "sampler": facts["sampler"]}
    scores = score_features(
        metrics, extractor, reference, made, stand_in, image_size=size, seed=seed, options=options, made_by=made_by
    )
    figures = _PixelFigures()
    pixels = [
        collect_features(figures, load, total, batch_size=BATCH, team=runtime).values.double().mean(0)
        for load in (lambda rows: kept[int(rows[0])], lambda rows: real.images(real.stand_in[rows]))
    ]
    if runtime.is_main:
        trained_on = (run.record("teach") or {}).get("inputs", {}).get("data")
        record = {
            "scores": [score.to_dict() for score in scores],
            "data": data or config.data,
            "data_fingerprint": dataset.fingerprint,
            "training_data": dataset.fingerprint == trained_on,
            "pixels": dict(zip(("contrast_ratio", "sharpness_ratio"), (pixels[0] / pixels[1]).tolist(), strict=True)),
        }
        write_text_atomic(run.evaluation / f"{model}-{size}.json", json.dumps(record, indent=1))
        _draw_nearest(run, model, make, labels, made, reference, real)
    runtime.barrier()
    return scores


def of_texts(make: MakeImages, texts: Condition) -> MakeImages:
    """`make` as a function of seeds and rows of `texts`."""

    def told(seeds: list[int], rows: list[int] | Condition | None) -> Tensor:
        assert isinstance(rows, list), "rows stand in for labels"
        return make(seeds, texts[torch.tensor(rows)])

    return told


def _features_of(real: RealImages, rows: Tensor, extractor: Any, runtime: Runtime) -> Features:
    return collect_features(extractor, lambda part: real.images(rows[part]), len(rows), batch_size=BATCH, team=runtime)


def _maker(run: RunFolder, model: str, size: int | None, runtime: Runtime) -> tuple[MakeImages, dict[str, Any], int]:
    """What makes images, facts about it, and their size."""
    if model == "generator":
        generator = load_generator(run, device=runtime.device)
        if size is not None and size not in generator.sizes:
            raise ConfigError(f"this generator makes images of {list(generator.sizes)} pixels, not {size}.")
        side = size or generator.size

        def one_step(seeds: list[int], told: list[int] | Condition | None) -> Tensor:
            if isinstance(told, Condition):
                return sample_images(generator, seeds, condition=told, resolution=side)
            return sample_images(generator, seeds, labels=told, resolution=side)

        facts = {"hash": model_hash(generator), "conditional": generator.num_classes, "sampler": "one step"}
        return one_step, {**facts, "texts": generator.token_dim > 0}, side
    denoiser, taught = load_teacher(run.teacher)
    denoiser.to(runtime.device)
    side, channels = int(str(taught["image_size"])), int(str(taught["channels"]))
    if size not in (None, side):
        raise ConfigError(f"this run's teacher makes images of {side} pixels, not {size}.")

    def many_steps(seeds: list[int], told: list[int] | Condition | None) -> Tensor:
        return teacher_images(denoiser, seeds, told, (channels, side, side))

    facts = {"hash": taught["hash"], "conditional": taught["num_classes"], "sampler": "heun, 18 levels"}
    return many_steps, {**facts, "texts": "text_encoder" in taught}, side


@torch.no_grad()
def teacher_images(
    denoiser: EDMDenoiser,
    seeds: list[int],
    told: list[int] | Condition | None,
    shape: tuple[int, ...],
    *,
    solver: str = "heun",
    levels: int = 18,
) -> Tensor:
    """Samples of a diffusion model, (N, C, b, b) in [-1, 1], on the CPU; a seed belongs to an image as in `sample_images`.

    `told` are labels, or embedded texts, one a seed.
    """
    device = next(denoiser.parameters()).device
    z = noise_of_seeds(seeds, shape).to(device)
    condition = (told if isinstance(told, Condition) else Condition.of_labels(told)).to(device)
    images = sample(denoiser, z, sigmas=karras_sigmas(levels), condition=condition, solver=build_solver(solver))
    return images.float().clamp(-1, 1).cpu()


class _PixelFigures:
    """Contrast and sharpness of single images as features, so that several processes share them like any others."""

    name, dim, input_size, resize, fingerprint = "pixels", 2, 0, "none", ""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tensor([[contrast(image[None]).per_image, sharpness(image[None])] for image in images])


def _draw_nearest(
    run: RunFolder,
    model: str,
    make: MakeImages,
    labels: Tensor | None,
    made: Features,
    reference: Features,
    real: RealImages,
) -> None:
    """A grid of the generated images that come nearest to a reference image, above those."""
    distances, nearest = nearest_neighbours(made.values, reference.values)
    rows = distances.argsort(stable=True)[:SHOWN_PAIRS]
    seeds = [FIRST_SEED + i for i in rows.tolist()]
    fakes = make(seeds, None if labels is None else labels[rows].tolist())
    originals = real.images(real.reference[nearest[rows]])
    facts = {
        "kind": "nearest",
        "seeds": seeds,
        "rows": real.reference[nearest[rows]].tolist(),
        "distances": distances[rows].tolist(),
    }
    path = run.evaluation / f"nearest-{model}-{real.size}.png"
    save_image(make_grid(torch.cat([fakes, originals]), columns=len(rows)), path, metadata=facts)


def run_scores(run: RunFolder) -> dict[str, list[Score]]:
    """All scores in a run's folder, by `<model>-<size>`, sizes ascending.

    Raises:
        ArtifactError: a file of scores is damaged.
    """
    found = [path for path in run.evaluation.glob("*.json") if path.stem.rpartition("-")[2].isdigit()]
    found.sort(key=lambda path: (int(path.stem.rpartition("-")[2]), path.stem))
    return {path.stem: load_scores(path) for path in found}


def compare_runs(paths: Sequence[str | Path]) -> str:
    """Markdown: what runs cost, and the scores that all of them have, one table for each model and size.

    Raises:
        ArtifactError: not run folders, or no scores in one of them.
        DataError: scores that do not compare; what differs is named.
        ConfigError: fewer than two runs.
    """
    if len(paths) < 2:
        raise ConfigError(f"a comparison needs two runs or more, got {len(paths)}.")
    runs = {str(path): RunFolder.open(path) for path in paths}
    scores = {name: run_scores(run) for name, run in runs.items()}
    for name, found in scores.items():
        if not found:
            raise ArtifactError(f"{name} has no scores yet. Run `pagoda evaluate {name}` first.")
    shared = [key for key in next(iter(scores.values())) if all(key in found for found in scores.values())]
    if not shared:
        have = "; ".join(f"{name}: {', '.join(found)}" for name, found in scores.items())
        raise ArtifactError(
            f"these runs were not scored at a size that they share ({have}). Use `pagoda evaluate --size`."
        )
    parts = []
    for key in shared:
        model, _, side = key.rpartition("-")
        parts += [f"## {model}, {side} px", score_table({name: found[key] for name, found in scores.items()})]
    parts += ["## Cost", _cost_table(runs)]
    return "\n\n".join(parts) + "\n"


def _cost_table(runs: Mapping[str, RunFolder]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        records = {path.stem: run.record(path.stem) for path in sorted((run.path / "stages").glob("*.json"))}
        results = {stage: record.get("results", {}) for stage, record in records.items() if record}
        rows[name] = {stage: found["seconds"] / 60 for stage, found in results.items() if "seconds" in found}
    stages = list(dict.fromkeys(stage for costs in rows.values() for stage in costs))
    lines = ["| minutes | " + " | ".join(stages) + " | in all |", "|---|" + "---:|" * (len(stages) + 1)]
    for name, costs in rows.items():
        cells = [f"{costs[stage]:.1f}" if stage in costs else "" for stage in stages]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{sum(costs.values()):.1f}"]) + " |")
    return "\n".join(lines)


def describe_scores(scores: Sequence[Score]) -> str:
    """Lines for people: value, interval, floor, and what to know."""
    lines = []
    for score in scores:
        arrow = "↓" if score.better == "lower" else "↑"
        spread = "" if score.low is None or score.high is None else f" [{score.low:.4g}, {score.high:.4g}]"
        floor = "" if score.floor is None else f"   real against real {score.floor:.4g}"
        lines.append(f"{score.metric} {arrow} {score.value:.5g}{spread}{floor}")
        lines += [f"  {note}" for note in score.notes]
    return "\n".join(lines)


assert set(DEFAULT_METRICS) <= set(METRICS)
