"""`evaluate`: scores of a run with their provenance, the same on one process and on several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.data import ImageDataset
from pagoda.errors import ConfigError, did_you_mean
from pagoda.evaluation import (
    METRICS,
    PAIR_METRICS,
    FeatureExtractor,
    FeatureMoments,
    Features,
    Score,
    ScoreOptions,
    collect_features,
    contrast,
    load_stats,
    nearest_neighbours,
    score_features,
    sharpness,
)
from pagoda.files import write_text_atomic
from pagoda.images import make_grid, save_image
from pagoda.networks.batches import images_at_once
from pagoda.stages.judging import RealImages, open_judge, open_real
from pagoda.stages.making import MakeImages, Maker, open_maker
from pagoda.stages.pair_scores import PairOptions, fixed_order, open_pair_networks, score_pairs
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime

DEFAULT_METRICS = ("fd", "fd_inf", "kd", "precision", "recall", "density", "coverage")
SHOWN_PAIRS = 16
"""Generated images that are shown beside their nearest training image."""


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
    pairs: PairOptions | None = None,
    reference: str | None = None,
    reference_count: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    allow_download: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Score a run's images and write `evaluation/<model>-<size>.json` into its folder.

    Real images are halved: one half is the reference, the other stands in for generated images in the floors, and its labels are those
    that images are generated with. The same call gives the same scores to the last digit, also on several processes.

    Args:
        data: Real images to compare with; the run's own training images when None.
        model: "generator", "teacher" (Heun at 18 levels, at base size), or "reconstructions" (the generator from the stand-ins' own
            latents, encoded by the teacher with the run's settings).
        size: Side in pixels; the largest when None.
        count: Images to score at most; as many as there are stand-ins when None.
        metrics: Names of `METRICS` and of `PAIR_METRICS`; when None those of `DEFAULT_METRICS` that the number of images allows, and
            psnr and ssim for reconstructions.
        features: See `open_judge`.
        options: Settings of the metrics.
        pairs: Networks and texts of the metrics of pairs.
        reference: File of statistics to compare with (`load_stats`); then no image is set aside as reference, and only `fd` and
            `fd_inf` can be measured in features.
        reference_count: Number of images behind that file, where it does not say.
        seed: Decides the split and the resampling.
        guidance: Guidance weight of the images; the scores are then those of `<model>-w<weight>`.
        allow_download: Whether weights of the hub may be fetched.
        say: Receives lines for people.

    Raises:
        ArtifactError: the run has no such model yet, weights are missing or others, or statistics of other features or another size.
        ConfigError: unknown names, or metrics that do not go with the model.
        DataError: too few images, or no texts for `clip_score`.
        MissingExtraError: a package is missing.
    """
    for metric in metrics or ():  # unknown names are refused before the long work
        if metric not in METRICS and metric not in PAIR_METRICS:
            raise ConfigError(f"unknown metric {metric!r}. {did_you_mean(metric, [*METRICS, *PAIR_METRICS])}")
    config, options, pairs = run.config(), options or ScoreOptions(), pairs or PairOptions()
    maker = open_maker(run, model, size, runtime, guidance)
    if metrics is None and model == "reconstructions":
        metrics = ("psnr", "ssim") if maker.picture_size >= 11 else ("psnr",)
    networks = open_pair_networks(metrics or (), pairs, maker, runtime, allow_download=allow_download)
    dataset = open_real(run, config, data, maker.size, runtime)
    halve = RealImages.split if reference is None else RealImages.whole
    real = halve(dataset, maker.size, count=count, seed=seed)
    make = fixed_order({}, maker.bind(real))
    trained_on = (run.record("teach") or {}).get("inputs", {}).get("data")
    judged = None
    if metrics is None or any(metric in METRICS for metric in metrics):
        extractor = open_judge(features, run, dataset, maker.size, runtime, allow_download=allow_download)
        statistics = None
        if reference is not None:
            statistics, _ = load_stats(
                reference, count=reference_count, extractor=extractor, image_size=maker.picture_size
            )
        if metrics is None:
            metrics = _default_metrics(len(real.stand_in), extractor, statistics, say)
        judged = _Judged(extractor, statistics, [metric for metric in metrics if metric in METRICS])
    elif reference is not None:
        raise ConfigError(
            f"the reference {reference} is for fd and fd_inf, and none of them is among {', '.join(metrics)}."
        )
    total, at_once = len(real.stand_in), images_at_once(maker.picture_size)
    say(
        f"scoring {total} images of {maker.picture_size} px"
        + (f" in features of `{judged.extractor.name}`" if judged else "")
    )
    found: dict[str, Score] = {}
    if judged is not None:
        own = dataset.fingerprint == trained_on
        scores, sides = _score_features(run, maker, judged, real, make, runtime, options=options, own=own)
        found |= dict(zip(judged.metrics, scores, strict=True))
    found |= dict(
        zip(
            networks.metrics,
            score_pairs(
                networks,
                pairs,
                maker,
                real,
                make,
                runtime,
                base=config.base,
                batch_size=at_once,
                seed=seed,
                intervals=options.resamples != 0,
            ),
            strict=True,
        )
    )
    ordered = [found[metric] for metric in metrics]
    figures = _PixelFigures()
    pixels = [
        collect_features(figures, load, total, batch_size=at_once, team=runtime).values.double().mean(0)
        for load in (make, lambda rows: real.images(real.stand_in[rows]))
    ]
    if runtime.is_main:
        record = {
            "scores": [score.to_dict() for score in ordered],
            "data": data or config.data,
            "data_fingerprint": dataset.fingerprint,
            "training_data": dataset.fingerprint == trained_on,
            "reference": reference,
            "pixels": dict(zip(("contrast_ratio", "sharpness_ratio"), (pixels[0] / pixels[1]).tolist(), strict=True)),
        }
        write_text_atomic(run.evaluation / f"{maker.name}-{maker.size}.json", json.dumps(record, indent=1))
        if judged is not None and model != "reconstructions":  # those lie near to their own images by design
            _draw_nearest(run, maker, maker.bind(real), sides)
    runtime.barrier()
    return ordered


@dataclass(frozen=True)
class _Judged:
    """What images are compared in, with which reference file, by which metrics of features."""

    extractor: FeatureExtractor
    statistics: FeatureMoments | None
    metrics: list[str]


@dataclass(frozen=True)
class _Near:
    """Generated images, and the real ones among which the nearest are looked for."""

    made: Features
    targets: Features
    data: ImageDataset
    rows: Tensor
    size: int


def _default_metrics(
    total: int, extractor: FeatureExtractor, statistics: FeatureMoments | None, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Those of `DEFAULT_METRICS` that can be measured; what is left out is said."""
    chosen = [m for m in DEFAULT_METRICS if statistics is None or METRICS[m].of_moments]
    if total // 2 <= 2 * (extractor.dim + 1):
        chosen.remove("fd_inf")
        say(
            f"fd_inf is left out: {total} images leave no room to extrapolate in {extractor.dim} features; "
            f"{4 * (extractor.dim + 1) + 2} or more do"
        )
    return tuple(chosen)


def _score_features(
    run: RunFolder,
    maker: Maker,
    judged: _Judged,
    real: RealImages,
    make: MakeImages,
    runtime: Runtime,
    *,
    options: ScoreOptions,
    own: bool,
) -> tuple[list[Score], _Near]:
    """Scores of sets of images; `own` says that the real images are those of the training."""
    extractor = judged.extractor
    made = collect_features(
        extractor, make, len(real.stand_in), batch_size=images_at_once(maker.picture_size), team=runtime
    )
    reference = _features_of(real, real.reference, extractor, runtime) if len(real.reference) else _nothing(extractor)
    stand_in = _features_of(real, real.stand_in, extractor, runtime)
    near, training = _Near(made, reference, real.data, real.reference, real.size), None
    if own or not len(real.reference):
        rows, both = torch.cat([real.reference, real.stand_in]), torch.cat([reference.values, stand_in.values])
        near = _Near(made, Features(both), real.data, rows, real.size)
    if "memorised" in judged.metrics:  # every image of the training set may have been copied
        dataset = real.data if own else open_real(run, run.config(), None, real.size, runtime)
        rows = torch.arange(len(dataset))
        training = _features_of(RealImages(dataset, real.size, rows, rows[:0], real.seed), rows, extractor, runtime)
        near = _Near(made, training, dataset, rows, real.size)
    scores = score_features(
        judged.metrics,
        extractor,
        reference,
        made,
        stand_in,
        image_size=maker.picture_size,
        seed=real.seed,
        options=options,
        made_by=maker.facts,
        training=training,
        held_out=not own,
        statistics=judged.statistics,
    )
    return scores, near


def _features_of(real: RealImages, rows: Tensor, extractor: FeatureExtractor, runtime: Runtime) -> Features:
    at_once = images_at_once(real.data.picture_size(real.size))
    return collect_features(
        extractor, lambda part: real.images(rows[part]), len(rows), batch_size=at_once, team=runtime
    )


def _nothing(extractor: FeatureExtractor) -> Features:
    return Features(torch.zeros(0, extractor.dim))


class _PixelFigures:
    """Contrast and sharpness of single images as features, so that several processes share them like any others."""

    name, dim, input_size, resize, fingerprint = "pixels", 2, 0, "none", ""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tensor([[contrast(image[None]).per_image, sharpness(image[None])] for image in images])


def _draw_nearest(run: RunFolder, maker: Maker, make: MakeImages, near: _Near) -> None:
    """A grid of the generated images that come nearest to a real image, above those."""
    distances, nearest = nearest_neighbours(near.made.values, near.targets.values)
    places = distances.argsort(stable=True)[:SHOWN_PAIRS]
    rows = near.rows[nearest[places]]
    first = int(maker.facts["first_seed"])
    facts = {
        "kind": "nearest",
        "seeds": [first + place for place in places.tolist()],
        "rows": rows.tolist(),
        "distances": distances[places].tolist(),
    }
    path = run.evaluation / f"nearest-{maker.what}-{maker.size}.png"
    grid = torch.cat([make(places), near.data.pictures(rows, near.size)])
    save_image(make_grid(grid, columns=len(places)), path, metadata=facts)


assert set(DEFAULT_METRICS) <= set(METRICS)
