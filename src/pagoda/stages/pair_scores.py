"""Scores of pairs of a run: reconstructions beside their images, images beside their captions or their classes' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ConfigError, DataError
from pagoda.evaluation import (
    LPIPS,
    PAIR_METRICS,
    CLIPFeatures,
    PairMeasure,
    Score,
    collect_features,
    pair_measure,
    score_reconstructions,
    score_texts,
)
from pagoda.files import hash_json
from pagoda.stages.judging import RealImages
from pagoda.stages.making import MakeImages, Maker
from pagoda.training import Runtime


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What pairs are measured with."""

    clip: str = "openai/clip-vit-large-patch14"
    """Folder in the Hugging Face layout or hub name of the CLIP of `clip_score`."""
    prompt: str = "a photo of a {}"
    """The text of an image that has a class and no caption of its own; {} is the class's name."""
    lpips: Literal["vgg16", "alexnet"] = "vgg16"
    """Network of `lpips`."""

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise ConfigError(
                f"the prompt must hold {{}} once, where the class's name goes, got {self.prompt!r}. Example: 'a photo of a {{}}'"
            )


@dataclass(frozen=True)
class PairNetworks:
    """Networks of the metrics that were asked for; opened before the long work, so that what is missing is known at once."""

    metrics: tuple[str, ...]
    lpips: LPIPS | None
    clip: CLIPFeatures | None


def open_pair_networks(
    metrics: Sequence[str], options: PairOptions, maker: Maker, runtime: Runtime, *, allow_download: bool
) -> PairNetworks:
    """Load what the pair metrics among `metrics` need.

    Raises:
        ConfigError: a metric of reconstructions for images that are none.
        ShapeError: images too small for the metric.
        ArtifactError: weights that are missing or not the published ones.
        MissingExtraError: transformers is not installed.
    """
    wanted = tuple(metric for metric in metrics if metric in PAIR_METRICS)
    of_originals = [metric for metric in wanted if metric != "clip_score"]
    if of_originals and maker.what != "reconstructions":
        raise ConfigError(
            f"{', '.join(of_originals)} compare an image with its own original, and images of the {maker.what} have none. "
            "Use --model reconstructions."
        )
    lpips = LPIPS(options.lpips).to(runtime.device) if "lpips" in wanted else None
    for metric in of_originals:
        pair_measure(metric, image_size=maker.picture_size, lpips=lpips)  # refuses sizes
    clip = None
    if "clip_score" in wanted:
        clip = CLIPFeatures(options.clip, allow_download=allow_download, device=runtime.device)
        clip.embed_texts(["a"])  # a missing tokenizer is known now
    return PairNetworks(wanted, lpips, clip)


def score_pairs(
    networks: PairNetworks,
    options: PairOptions,
    maker: Maker,
    real: RealImages,
    make: MakeImages,
    runtime: Runtime,
    *,
    base: int,
    batch_size: int,
    seed: int,
    intervals: bool = True,
) -> list[Score]:
    """The pair metrics, in the order in which they were asked for.

    Args:
        make: The images, by their place among the stand-ins; batches come as in `collect_features`.
        base: Side of the images that the encoder sees, in pixels.
        batch_size: Images a call.
        seed: For the record.
        intervals: Whether 95 % intervals are estimated.

    Raises:
        DataError: images without a caption or a class.
    """
    count = len(real.stand_in)
    scores: dict[str, Score] = {}
    measures = {
        metric: pair_measure(metric, image_size=maker.picture_size, lpips=networks.lpips)
        for metric in networks.metrics
        if metric != "clip_score"
    }
    if measures:
        found = score_reconstructions(
            list(measures.values()),
            make,
            lambda rows: real.images(real.stand_in[rows]),
            count,
            reference=hash_json([real.data.fingerprint, real.stand_in.tolist()]),
            image_size=maker.picture_size,
            seed=seed,
            batch_size=batch_size,
            team=runtime,
            made_by=maker.facts,
            notes=_enlarged(list(measures.values()), real, base, batch_size, runtime) if maker.size > base else None,
            intervals=intervals,
        )
        scores |= dict(zip(measures, found, strict=True))
    if networks.clip is not None:
        captioned = maker.texts or maker.what == "reconstructions"
        texts, source = texts_of(real, captioned, options.prompt)
        made, originals = (
            collect_features(networks.clip, load, count, batch_size=batch_size, team=runtime)
            for load in (make, lambda rows: real.images(real.stand_in[rows]))
        )
        scores["clip_score"] = score_texts(
            networks.clip,
            made,
            originals,
            texts,
            image_size=maker.picture_size,
            seed=seed,
            batch_size=batch_size,
            team=runtime,
            settings=source,
            made_by=maker.facts,
            intervals=intervals,
        )
    return [scores[metric] for metric in networks.metrics]


def texts_of(real: RealImages, captioned: bool, prompt: str) -> tuple[list[str], dict[str, Any]]:
    """The text of each stand-in, and where the texts come from.

    Args:
        captioned: Whether an image answers to the caption of its stand-in, where there is one: so does a reconstruction, and a sample
            of a model that was told that caption. A sample that was made from a label alone answers to the prompt of its class, as the
            caption of another image of that class would ask for what nobody told the model.
        prompt: The text of a class.

    Raises:
        DataError: no class names, no captions, or a caption is missing.
    """
    rows = real.stand_in
    if captioned and real.data.captions is not None:
        captions = [real.data.captions[row] for row in rows.tolist()]
        missing = [real.data.sample_ids[row] for row, text in zip(rows.tolist(), captions, strict=True) if not text]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(captions)} images have no caption, first: {', '.join(missing[:3])}. Give them one, or "
                "leave clip_score out."
            )
        return [str(text) for text in captions], {"texts": "captions"}
    labels, names = real.data.labels(rows), real.data.class_names
    if labels is None or names is None:
        raise DataError(
            "clip_score needs texts, and these images have no classes whose names could be put into --prompt"
            + (", nor captions." if captioned else "; samples are made without captions.")
        )
    return [prompt.replace("{}", names[label].replace("_", " ")) for label in labels.tolist()], {"texts": prompt}


def _enlarged(
    measures: Sequence[PairMeasure], real: RealImages, base: int, batch_size: int, runtime: Runtime
) -> dict[str, list[str]]:
    """What the images themselves score, reduced to the encoder's size and enlarged again: all that a latent was made from."""

    def load(rows: Tensor) -> Tensor:
        small = real.data.pictures(real.stand_in[rows], base)
        side = real.picture_size
        return F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)

    plain = score_reconstructions(
        measures,
        load,
        lambda rows: real.images(real.stand_in[rows]),
        len(real.stand_in),
        reference="",
        image_size=real.picture_size,
        batch_size=batch_size,
        team=runtime,
        intervals=False,
    )
    return {
        score.metric: [
            f"{score.metric} of the same images at {real.data.picture_size(base)} px, enlarged to {real.picture_size} px (bicubic): "
            f"{score.value:.4g}."
        ]
        for score in plain
    }


def fixed_order(kept: dict[int, Tensor], make: MakeImages) -> MakeImages:
    """`make`, with every batch kept by its first place, so that several metrics see the same images without making them twice."""

    def load(places: Tensor) -> Tensor:
        first = int(places[0])
        if first not in kept:
            kept[first] = make(places)
        return kept[first]

    return load
