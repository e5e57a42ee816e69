"""Scores of pairs: a reconstruction beside its own image (PSNR, SSIM, LPIPS), an image beside its text (CLIP score).

Pairs are measured one by one and averaged, so a score's interval is that of a mean. Unlike distances between sets they have no bias
of few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.evaluation.collect import Features, Team, collect_features
from pagoda.evaluation.extractors import RESIZE, check_images, resize_images
from pagoda.evaluation.intervals import interval, mean_error
from pagoda.evaluation.pixels import SSIM_WINDOW, psnr_values, ssim_values
from pagoda.evaluation.scores import Score
from pagoda.evaluation.text import clip_scores
from pagoda.evaluation.transformers import CLIPFeatures
from pagoda.files import hash_json
from pagoda.networks import LPIPS

PAIR_METRICS: dict[str, str] = {
    "psnr": "fidelity of reconstructions, dB",
    "ssim": "structural similarity of reconstructions",
    "lpips": "perceptual distance of reconstructions",
    "clip_score": "how well images fit their texts",
}
"""By the name that options use: what it tells."""
LPIPS_SIZE = 64
"""Smaller images are enlarged to this side for LPIPS, whose weights were tuned there; at 8 px nothing is left for the last layers."""


@dataclass(frozen=True, eq=False)
class PairMeasure:
    """One metric of images and their originals, with everything that decides its values."""

    metric: str
    """In tables."""
    better: Literal["lower", "higher"]
    extractor: str
    """What looks at the images."""
    fingerprint: str
    """Hash of its weights and settings."""
    resize: str
    """Kernel that brings images to its size."""
    measure: Callable[[Tensor, Tensor], Tensor]
    """Images and originals (B, C, S, S) in [-1, 1] -> (B,)."""
    settings: Mapping[str, Any] = field(default_factory=dict)


def pair_measure(metric: str, *, image_size: int, lpips: LPIPS | None = None) -> PairMeasure:
    """The metric of reconstructions that a name stands for.

    Args:
        metric: psnr, ssim or lpips.
        image_size: Side of the images in pixels.
        lpips: The network of `lpips`.

    Raises:
        ConfigError: another name, or no network for `lpips`.
        ShapeError: images too small for SSIM's window.
    """
    if metric == "psnr":
        pixels = hash_json(["psnr", 1])
        return PairMeasure("PSNR", "higher", "pixels", pixels, "none", psnr_values, {"peak": 2.0})
    if metric == "ssim":
        if image_size < SSIM_WINDOW:
            raise ShapeError(
                f"SSIM looks at windows of {SSIM_WINDOW} pixels, these images have {image_size} a side. Use psnr or lpips, or a "
                "larger --size."
            )
        pixels = hash_json(["ssim", 1])
        return PairMeasure("SSIM", "higher", "pixels", pixels, "none", ssim_values, {"window": SSIM_WINDOW, "std": 1.5})
    if metric != "lpips" or lpips is None:
        raise ConfigError(f"pairs of images are compared by psnr, ssim or lpips with its network, got {metric!r}.")
    side = max(image_size, LPIPS_SIZE)

    @torch.no_grad()
    def distance(images: Tensor, originals: Tensor) -> Tensor:
        device = next(lpips.parameters()).device
        return lpips(*(resize_images(batch.float(), side).to(device) for batch in (images, originals)))

    name = f"lpips-{lpips.trunk}"
    kernel = "none" if side == image_size else RESIZE
    return PairMeasure(f"LPIPS[{lpips.trunk}]", "lower", name, lpips.fingerprint, kernel, distance, {"side": side})


def score_reconstructions(
    measures: Sequence[PairMeasure],
    load: Callable[[Tensor], Tensor],
    originals: Callable[[Tensor], Tensor],
    count: int,
    *,
    reference: str,
    image_size: int,
    seed: int = 0,
    batch_size: int = 256,
    team: Team | None = None,
    made_by: Mapping[str, Any] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    intervals: bool = True,
) -> list[Score]:
    """Scores of images beside their originals, the mean over pairs.

    A floor would be 0 or infinite: the original in place of its reconstruction. There is none.

    Args:
        measures: From `pair_measure`.
        load, originals: Rows (B,) -> images (B, C, S, S) in [-1, 1], and the images that these were made from.
        count: Number of pairs.
        reference: Fingerprint of the originals.
        image_size: Their side in pixels.
        seed: For the record.
        batch_size: Pairs a call.
        team: The processes that share the work.
        made_by: What made the images, for the record.
        notes: By metric in tables: what a reader should know.
        intervals: Whether 95 % intervals are estimated.

    Raises:
        DataError: no pair, images with NaN, or outside of [-1, 1].
        ShapeError: images and originals of different shapes.
    """

    def both(rows: Tensor) -> Tensor:
        images, real = load(rows), originals(rows)
        if images.shape != real.shape:
            raise ShapeError(f"reconstructions are {tuple(images.shape)}, their originals {tuple(real.shape)}.")
        return torch.cat([images, real], dim=1)

    found = collect_features(_PairFigures(measures), both, count, batch_size=batch_size, team=team)
    scores = []
    for column, measure in enumerate(measures):
        low, high = _interval(found.values[:, column]) if intervals else (None, None)
        scores.append(
            Score(
                metric=measure.metric,
                value=float(found.values[:, column].double().mean()),
                floor=None,
                low=low,
                high=high,
                better=measure.better,
                count_real=count,
                count_fake=count,
                extractor=measure.extractor,
                extractor_fingerprint=measure.fingerprint,
                resize=measure.resize,
                reference_fingerprint=reference,
                image_size=image_size,
                seed=seed,
                settings=measure.settings,
                made_by=made_by or {},
                notes=tuple((notes or {}).get(measure.metric, ())),
            )
        )
    return scores


def score_texts(
    clip: CLIPFeatures,
    images: Features,
    real: Features,
    texts: Sequence[str],
    *,
    image_size: int,
    seed: int = 0,
    batch_size: int = 256,
    team: Team | None = None,
    settings: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Any] | None = None,
    intervals: bool = True,
) -> Score:
    """The CLIP score: 100 max(cos(image, text), 0), mean over pairs; the floor is that of real images beside the same texts.

    Args:
        clip: What made the features.
        images, real: CLIP's features of the scored images, and of real ones, in the order of the texts.
        texts: One an image.
        image_size: Side of the images in pixels.
        seed, team, batch_size, made_by, intervals: As in `score_reconstructions`.
        settings: Where the texts come from, for the record.

    Raises:
        DataError: another number of texts than of images, or an empty text.
        ArtifactError: the tokenizer is missing.

    Source: Hessel et al. 2021, arXiv:2104.08718, eq. 1.
    """
    if not len(images) == len(real) == len(texts):
        raise DataError(f"{len(images)} images and {len(real)} real ones need as many texts, got {len(texts)}.")
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        raise DataError(f"{len(empty)} of {len(texts)} texts are empty, the first is that of image {empty[0]}.")
    distinct = list(dict.fromkeys(texts))
    embedded = collect_features(
        _TextEmbedder(clip, distinct), lambda rows: rows, len(distinct), batch_size=batch_size, team=team
    ).values
    place = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts])
    values, floor = (clip_scores(side.values, embedded[rows]) for side in (images, real))
    low, high = _interval(values) if intervals else (None, None)
    cut = clip.num_cut(distinct)
    note = (
        f"{cut} of {len(distinct)} texts are longer than the {clip.text_length} tokens that CLIP reads, and were cut."
    )
    return Score(
        metric=f"CLIP score[{clip.name}]",
        value=float(values.mean()),
        floor=float(floor.mean()),
        low=low,
        high=high,
        better="higher",
        count_real=len(real),
        count_fake=len(images),
        extractor=clip.name,
        extractor_fingerprint=clip.fingerprint,
        resize=clip.resize,
        reference_fingerprint=hash_json(list(texts)),
        image_size=image_size,
        seed=seed,
        settings=dict(settings or {}),
        made_by=made_by or {},
        notes=(note,) if cut else (),
    )


class _PairFigures:
    """Measures of pairs as features of images with twice the channels, so that several processes share them like any others."""

    name, input_size, resize, fingerprint = "pairs", 0, "none", ""

    def __init__(self, measures: Sequence[PairMeasure]) -> None:
        self.measures = measures
        self.dim = len(measures)

    def __call__(self, images: Tensor) -> Tensor:
        made, originals = images.chunk(2, dim=1)
        for batch in (made, originals):
            check_images(batch)
        return torch.stack([measure.measure(made, originals).double().cpu() for measure in self.measures], dim=1)


class _TextEmbedder:
    """Embeddings of texts as features of their row numbers, shared over processes in the same way."""

    name, input_size, resize, fingerprint = "texts", 0, "none", ""

    def __init__(self, clip: CLIPFeatures, texts: Sequence[str]) -> None:
        self.clip, self.texts, self.dim = clip, texts, clip.dim

    def __call__(self, images: Tensor) -> Tensor:
        return self.clip.embed_texts([self.texts[row] for row in images.tolist()])  # they are rows


def _interval(values: Tensor) -> tuple[float | None, float | None]:
    """95 % about the mean of (N,) values; none where one is infinite."""
    if not bool(torch.isfinite(values).all()):
        return None, None
    return interval(float(values.double().mean()), mean_error(values))
