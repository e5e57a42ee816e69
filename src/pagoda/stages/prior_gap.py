"""The prior gap: how much worse a generator is at fresh noise than at the latents that it was trained on.

A generator that rebuilds every training image may still draw poorly from the prior: between few latents it has seen nothing.
So its images are compared with real ones all along the walk

    latents of training images -> spherical mixtures -> fresh noise,

and at the latents of images that it was not trained on. Each distance stands beside that of real images to real images.

    prior-gap/<size>.json                what was measured of the generator of that size
    prior-gap/unseen.safetensors         latents of the unseen images, encoded once for all sizes
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import LatentStore
from pagoda.diffusion import spherical_mixture
from pagoda.errors import ArtifactError
from pagoda.evaluation import (
    FeatureMoments,
    collect_features,
    contrast,
    frechet_distance,
    kernel_distance,
    sharpness,
)
from pagoda.files import write_text_atomic
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.networks.batches import images_at_once
from pagoda.stages.context import StageContext
from pagoda.stages.guidance import stored_condition
from pagoda.stages.judging import RealImages, open_judge, some_of
from pagoda.stages.latent_inputs import open_latents
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.unseen_images import Walk, unseen_walk
from pagoda.training import seeded_generator

LEAST = 8
"""Images a point below which nothing is measured."""
LEAST_CONTRAST = 0.8
"""Share of the data's contrast below which samples are called washed out: finished runs of ours have 0.9 and more, one that matching threw
off had 0.6 (docs/systems/pagoda-losses.md)."""
REFERENCES = 4
"""Real images of the reference for each image of a point, at most."""
ENOUGH = 8
"""Images for each feature from which on the Fréchet distance is shown; with fewer the kernel distance, which is unbiased."""
ESTIMATE = "by class"
"""How the kernel distance is estimated; measurements of another kind are made anew."""


@dataclass(frozen=True, kw_only=True)
class GapPoint:
    """One point of the walk, in the features of the measurement."""

    name: str
    """training, unseen, mixture or noise."""
    fraction: float
    """Of the angle between latent and noise: 0 at latents of images, 1 at fresh noise."""
    fd: float
    """Fréchet distance to the reference."""
    kd: float
    """Kernel distance to the reference, both with so many of each class; unbiased, so it may lie below 0."""
    kd_error: float
    """Its standard error."""
    floor_fd: float
    """The Fréchet distance of as many real images to the same reference."""
    floor_kd: float
    """Their kernel distance."""
    contrast_ratio: float
    """Mean standard deviation within an image, over that of the real ones."""
    sharpness_ratio: float
    """Mean absolute Laplacian, over that of the real ones."""


def gap_path(run: RunFolder, size: int) -> Path:
    """Where the gap of the generator of `size` is written."""
    return run.path / "prior-gap" / f"{size}.json"


def load_gaps(run: RunFolder) -> dict[int, dict[str, Any]]:
    """What was measured, by size, the smallest first.

    Raises:
        ArtifactError: a file cannot be read.
    """
    found = {}
    for path in (run.path / "prior-gap").glob("*.json"):
        try:
            found[int(path.stem)] = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ArtifactError(f"{path} cannot be read ({error}). Delete it; the run measures it again.") from error
    return dict(sorted(found.items()))


@torch.no_grad()
def measure_gap(context: StageContext, size: int) -> dict[str, Any] | None:
    """Measure the generator of `size` and write it down; what is there for the same weights and settings stays.

    Only the main process works. No training reads anything of it, and the global generator is left as it was.

    Returns:
        What the file holds, or None where nothing is measured: no images asked for, too few of them, or the latents are gone.

    Raises:
        ArtifactError: generator or latents are damaged.
        ConfigError: unknown features.
    """
    run, config, settings = context.run, context.config, context.config.evaluation.gap
    if settings.count == 0 or not context.runtime.is_main:
        return None
    context = replace(
        context, runtime=context.runtime.alone()
    )  # the others wait at the end, and for nothing in between
    path = gap_path(run, size)
    generator = load_generator(run, size, device=context.runtime.device)
    made_from = {
        "generator": model_hash(generator),
        "settings": json.loads(json.dumps(asdict(settings))),
        "unseen_data": config.evaluation.data,
        "kernel_distance": ESTIMATE,
    }
    before = load_gaps(run).get(size)
    if before is not None and all(before.get(key) == value for key, value in made_from.items()):
        return before
    if not run.latents.is_dir():
        context.say(f"no prior gap measured: {run.latents} is gone")
        return None
    images = len(context.data) // config.source.views  # further views of them are behind
    split = partial(RealImages.split, context.data, size, seed=0, first=images)
    real = split(count=settings.count) if images > LEAST else None
    if real is None or len(real.stand_in) < LEAST:
        context.say(f"no prior gap measured: {images} images are too few for two sets of {LEAST}")
        return None
    started, store = time.monotonic(), open_latents(context)
    if store.layout.of is not None:  # the walk begins at latents, which not all images have
        whole = split(count=None)
        encoded = whole.stand_in[torch.isin(whole.stand_in, store.images)]
        stand_in = some_of(encoded, context.data.labels(torch.arange(images)), settings.count)
        real = replace(whole, stand_in=stand_in)
        if len(stand_in) < LEAST:
            context.say(f"no prior gap measured: {len(stand_in)} encoded images are fewer than {LEAST}")
            return None
    with torch.random.fork_rng(devices=[]):
        facts = _measure(context, generator, real, store)
    facts = {"size": size, **made_from, **facts, "seconds": time.monotonic() - started}
    write_text_atomic(path, json.dumps(facts, indent=1))
    context.say(f"{context.data.picture_size(size)} px: " + "; ".join(gap_lines(facts)[:1]))
    if (washed := washed_out(facts)) is not None:
        context.say(washed)
    return facts


def _measure(
    context: StageContext, generator: OneStepGenerator, real: RealImages, store: LatentStore
) -> dict[str, Any]:
    """Distances of every point."""
    settings, size, runtime = context.config.evaluation.gap, real.size, context.runtime
    batch = images_at_once(context.data.picture_size(size))
    extractor = open_judge(settings.features, context.run, context.data, size, runtime)
    order = torch.randperm(len(real.reference), generator=torch.Generator().manual_seed(real.seed + 2))
    classes = context.data.labels(torch.arange(len(context.data)))
    reference_rows = some_of(real.reference[order], classes, REFERENCES * len(real.stand_in))
    reference = collect_features(
        extractor, lambda rows: real.images(reference_rows[rows]), len(reference_rows), batch_size=batch
    ).values
    moments = FeatureMoments.from_features(reference)

    def judge(walk: Walk, name: str, fraction: float, count: int) -> GapPoint:
        def made(rows: Tensor) -> Tensor:
            noise = _noise(context.config.seed, rows, store.shape)
            z = spherical_mixture(walk.latents(rows), noise, fraction)
            condition = walk.condition(rows).to(runtime.device)
            images: Tensor = generator(z.to(runtime.device), condition, resolution=size)
            return generator.pictures(images).cpu()

        fakes, originals = ([load(rows) for rows in torch.arange(count).split(batch)] for load in (made, walk.images))
        sets = [torch.cat([extractor(images).float().cpu() for images in parts]) for parts in (fakes, originals)]
        fd, floor_fd = (frechet_distance(moments, FeatureMoments.from_features(values)) for values in sets)
        own = walk.classes(torch.arange(count))
        strata = None if classes is None or own is None else (classes[reference_rows], own)
        kd, floor_kd = (kernel_distance(reference, values, strata=strata) for values in sets)
        pixels = [(contrast(images).per_image, sharpness(images)) for images in map(torch.cat, (fakes, originals))]
        ratios = [a / max(b, 1e-12) for a, b in zip(*pixels, strict=True)]
        return GapPoint(
            name=name,
            fraction=fraction,
            fd=fd,
            kd=kd.value,
            kd_error=kd.standard_error,
            floor_fd=floor_fd,
            floor_kd=floor_kd.value,
            contrast_ratio=ratios[0],
            sharpness_ratio=ratios[1],
        )

    count = len(real.stand_in)
    training = _training_walk(context, real, store)
    points = [judge(training, "training", 0.0, count)]
    kind, unseen, unseen_count = unseen_walk(context, real, store)
    if unseen_count >= LEAST:
        points.append(judge(unseen, "unseen", 0.0, unseen_count))
    points += [judge(training, "mixture", fraction, count) for fraction in settings.fractions]
    points.append(judge(training, "noise", 1.0, count))
    return {
        "count": count,
        "reference": len(reference_rows),
        "unseen": {"kind": kind, "count": unseen_count},
        "features": {"name": extractor.name, "dim": extractor.dim, "fingerprint": extractor.fingerprint},
        "shown": "fd" if count >= ENOUGH * extractor.dim else "kd",
        "points": [asdict(point) for point in points],
    }


def _noise(seed: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, "prior-gap", i)) for i in rows.tolist()])


def _training_walk(context: StageContext, real: RealImages, store: LatentStore) -> Walk:
    """The walk from the latents of the stand-ins, which the generator was trained on."""
    rows = real.stand_in
    return Walk(
        latents=lambda part: store.get(rows[part]),
        condition=lambda part: stored_condition(store, context.condition, rows[part]),
        images=lambda part: real.images(rows[part]),
        classes=lambda part: context.data.labels(rows[part]),
    )


def washed_out(facts: Mapping[str, Any]) -> str | None:
    """What to do where samples of fresh noise have lost their contrast; None where they have it.

    A generator that matching has thrown off makes one blur of everything, and its losses are small and steady again.

    Args:
        facts: What `measure_gap` wrote.
    """
    share = facts["points"][-1]["contrast_ratio"]
    if share >= LEAST_CONTRAST:
        return None
    return (
        f"samples of fresh noise have {share:.2f} of the data's contrast: they are washed out. With distill.matching, look at "
        "`generator/reconstruction` in metrics.jsonl: if it jumped as matching began and stayed up, lower distill.matching.weight "
        "or lengthen distill.matching.ramp, and distil again. Else give teach and distill more steps."
    )


def gap_lines(facts: Mapping[str, Any]) -> list[str]:
    """Lines for people: the two ends, then every point.

    Args:
        facts: What `measure_gap` wrote.
    """
    shown, points = facts["shown"], facts["points"]
    name = f"{shown.upper()}[{facts['features']['name']}]"
    first, last = points[0], points[-1]
    lines = [
        f"prior gap: {name} {first[shown]:.4g} at training latents, {last[shown]:.4g} at fresh noise, "
        f"{first[f'floor_{shown}']:.4g} between real images; contrast {last['contrast_ratio']:.3f} of the data's"
    ]
    for point in points:
        what = point["name"] if point["name"] != "unseen" else f"unseen ({facts['unseen']['kind']})"
        error = f" +- {point['kd_error']:.2g}" if shown == "kd" else ""
        lines.append(
            f"  {point['fraction']:<5g} {what:<18} {point[shown]:.4g}{error}   real {point[f'floor_{shown}']:.4g}   "
            f"contrast {point['contrast_ratio']:.3f}   sharpness {point['sharpness_ratio']:.3f}"
        )
    return lines
