"""Every metric of features by its name: what it measures, which way is better, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pagoda.errors import ConfigError, did_you_mean
from pagoda.evaluation.collect import Features
from pagoda.evaluation.extractors import FeatureExtractor
from pagoda.evaluation.extrapolation import extrapolate_frechet
from pagoda.evaluation.frechet import FeatureMoments, frechet_bias, frechet_distance
from pagoda.evaluation.inception_score import inception_score
from pagoda.evaluation.intervals import half_sample_error, mean_error
from pagoda.evaluation.kernel import kernel_distance
from pagoda.evaluation.neighbours import NeighbourScores, memorisation, neighbour_scores


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Settings of the metrics."""

    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    points: int = 15
    """Sample sizes that fd_inf is extrapolated from."""
    splits: int = 10
    """Parts that the Inception Score is averaged over."""
    quantile: float = 0.01
    """Share of the real images that counts as too near in `memorised`."""
    resamples: int | None = None
    """Random halves behind an interval; None: 100 up to 256 features, 20 up to 1,024, 10 above; 0 estimates none."""

    def resamples_for(self, dim: int) -> int:
        """Number of random halves for features of `dim` values."""
        if self.resamples is not None:
            return self.resamples
        return 100 if dim <= 256 else 20 if dim <= 1024 else 10


@dataclass(frozen=True)
class Sides:
    """What a metric sees: reference and generated images, the real ones that stand in for them, and the settings."""

    extractor: FeatureExtractor
    reference: Features
    fake: Features
    stand_in: Features
    options: ScoreOptions
    seed: int
    training: Features | None = None
    """Images that the model was trained on; None where the reference is all that is known of them."""
    held_out: bool = True
    """Whether the stand-ins are none of the training images."""
    statistics: FeatureMoments | None = None
    """Moments of the reference from a file; `reference` is empty then."""

    @property
    def reference_moments(self) -> FeatureMoments:
        """Count, mean and scatter of the reference."""
        return FeatureMoments.from_features(self.reference.values) if self.statistics is None else self.statistics


@dataclass(frozen=True)
class Finding:
    """What a metric returns."""

    value: float
    floor: float
    error: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric by its short name."""

    symbol: str
    """In tables, before the name of the features."""
    better: Literal["lower", "higher"]
    about: str
    """One line for people."""
    measure: Callable[[Sides], Finding]
    needs_logits: bool = False
    of_moments: bool = False
    """Whether mean and covariance are all that it asks of the reference."""


def _fd(sides: Sides) -> Finding:
    reference, fake = sides.reference_moments, sides.fake.values

    def distance(features: Tensor) -> float:
        return frechet_distance(reference, FeatureMoments.from_features(features))

    error = _half_error(sides, lambda rows: distance(fake[rows]))
    return Finding(distance(fake), distance(sides.stand_in.values), error, {})


def _fd_inf(sides: Sides) -> Finding:
    reference = sides.reference_moments
    points, fake = sides.options.points, sides.fake.values

    def extrapolate(features: Tensor) -> float:
        return extrapolate_frechet(reference, features, points=points, seed=sides.seed).value

    # Halves need room for a line of their own, and each takes `points` distances: only where features are few.
    dim, resamples = fake.shape[1], min(20, sides.options.resamples_for(fake.shape[1]))
    room = dim <= 256 and len(fake) // 2 > 4 * (dim + 1) and resamples
    error = half_sample_error(lambda rows: extrapolate(fake[rows]), len(fake), resamples=resamples) if room else None
    return Finding(extrapolate(fake), extrapolate(sides.stand_in.values), error, {"points": points})


def _kd(sides: Sides) -> Finding:
    found = kernel_distance(sides.reference.values, sides.fake.values)
    floor = kernel_distance(sides.reference.values, sides.stand_in.values).value
    error = found.standard_error if sides.options.resamples != 0 else None
    return Finding(found.value, floor, error, {"kernel": "(x.y/d + 1)^3"})


def _neighbour(pick: Callable[[NeighbourScores], Tensor]) -> Callable[[Sides], Finding]:
    def measure(sides: Sides) -> Finding:
        k = sides.options.neighbours
        verdicts = pick(neighbour_scores(sides.reference.values, sides.fake.values, k=k))
        floor = pick(neighbour_scores(sides.reference.values, sides.stand_in.values, k=k))
        error = mean_error(verdicts) if sides.options.resamples != 0 else None
        return Finding(float(verdicts.double().mean()), float(floor.double().mean()), error, {"k": k})

    return measure


def _is(sides: Sides) -> Finding:
    assert sides.fake.logits is not None, "checked before"
    assert sides.stand_in.logits is not None, "checked before"
    logits, splits = sides.fake.logits, sides.options.splits
    value, floor = (inception_score(x, splits=splits).mean for x in (logits, sides.stand_in.logits))
    error = _half_error(sides, lambda rows: inception_score(logits[rows], splits=1).mean)
    return Finding(value, floor, error, {"splits": splits})


def _memorised(sides: Sides) -> Finding:
    quantile = sides.options.quantile
    training = sides.reference if sides.training is None else sides.training
    held_out = sides.stand_in.values if sides.held_out else None
    found = memorisation(sides.fake.values, training.values, held_out, quantile=quantile)
    error = mean_error(found.distances <= found.threshold) if sides.options.resamples != 0 else None
    near = {"quantile": quantile, "training_images": len(training), "held_out": sides.held_out}
    return Finding(found.share, found.floor, error, near)


METRICS: dict[str, Metric] = {
    "fd": Metric("FD", "lower", "Fréchet distance", _fd, of_moments=True),
    "fd_inf": Metric(
        "FD_inf", "lower", "Fréchet distance, extrapolated to infinitely many images", _fd_inf, of_moments=True
    ),
    "kd": Metric("KD", "lower", "kernel distance, unbiased", _kd),
    "precision": Metric(
        "precision", "higher", "share of generated images among real ones", _neighbour(lambda s: s.inside_real)
    ),
    "recall": Metric(
        "recall", "higher", "share of real images among generated ones", _neighbour(lambda s: s.inside_fake)
    ),
    "density": Metric(
        "density", "higher", "real neighbourhoods around generated images", _neighbour(lambda s: s.balls)
    ),
    "coverage": Metric(
        "coverage", "higher", "share of real images with a generated neighbour", _neighbour(lambda s: s.covered)
    ),
    "is": Metric("IS", "higher", "Inception Score", _is, needs_logits=True),
    "memorised": Metric(
        "memorised", "lower", "share of generated images that are suspiciously near to a training image", _memorised
    ),
}
"""Every metric of features, by the name that options use."""

_PUBLISHED_NAMES = {
    ("inception-2015", "fd"): "FID",
    ("inception-2015", "fd_inf"): "FID_inf",
    ("inception-2015", "kd"): "KID",
    ("inception-2015", "is"): "IS",
    ("inception-2015-spatial", "fd"): "sFID",
}


def metric_name(metric: str, extractor: str) -> str:
    """The name in tables: published ones only for the features that they were published with.

    Raises:
        ConfigError: an unknown metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")
    return _PUBLISHED_NAMES.get((extractor, metric), f"{METRICS[metric].symbol}[{extractor}]")


def notes_of(metric: str, sides: Sides) -> tuple[str, ...]:
    """What a reader should know of a score."""
    dim, real, fake = sides.fake.values.shape[1], sides.reference_moments.count, len(sides.fake)
    if metric == "fd" and min(real, fake) <= dim:
        return (
            f"{real} real and {fake} generated images are few for {dim} features: the distance is "
            f"biased upwards by about {frechet_bias(dim, fake):.2g} feature variances; read it beside the floor.",
        )
    if metric == "memorised":
        notes = ["Nearness is that of the features: copies that look different to them are not found."]
        if not sides.held_out:
            notes.append("No real image was held out: the training images' distances to each other say what is near.")
        return tuple(notes)
    return ()


def _half_error(sides: Sides, statistic: Callable[[Tensor], float]) -> float | None:
    resamples = sides.options.resamples_for(sides.fake.values.shape[1])
    if resamples == 0:
        return None
    return half_sample_error(statistic, len(sides.fake), resamples=resamples, seed=sides.seed)
