"""Calls of a network that answer several requests at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pagoda.app.jobs import ImageRequest, Job
from pagoda.app.models import LoadedModel
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks.guidance import check_guidance_range
from pagoda.stages.exploring import LatentPoint, render_points
from pagoda.stages.sampling import check_labels


def check_request(model: LoadedModel, job: Job) -> None:
    """Refuse what this model cannot make.

    Raises:
        ConfigError: labels that it does not have.
        ShapeError: sizes that it does not have.
        ArtifactError: the run has gone on since the first images of this request.
    """
    request, generator = job.request, model.generator
    assert isinstance(request, ImageRequest)
    if request.guidance != 1 and not generator.num_classes and model.texts is None:
        raise ConfigError(f"{model.run} has no classes to guide towards; leave guidance at 1, got {request.guidance}.")
    if generator.guidance_max is not None:
        check_guidance_range(request.guidance, request.guidance, generator.guidance_max)
    if request.prompts is not None and model.texts is None:
        raise ConfigError(f"{model.run} was trained without texts; leave the prompt out.")
    if any(not prompt.strip() for prompt in request.prompts or ()):
        raise ConfigError("a prompt needs words; leave it empty altogether for captions of the data.")
    check_labels(request.labels, [point.seeds[0] for point in request.points], generator.num_classes)
    missing = [size for size in request.sizes if size not in generator.sizes]
    if missing:
        raise ShapeError(f"{model.run} makes images of {generator.sizes} px, none of {missing[0]}.")
    if job.model not in ("", model.hash):
        raise ArtifactError(f"{model.run} got a new generator while your images were being made. Ask again.")


def prompt_of(model: LoadedModel, request: ImageRequest, index: int) -> str | None:
    """The text of an image: asked for, or by its first seed; None where the model reads none."""
    if model.texts is None:
        return None
    return model.texts.caption(request.points[index].seeds[0]) if request.prompts is None else request.prompts[index]


def render_rows(model: LoadedModel, rows: list[tuple[Job, int]], request: ImageRequest) -> dict[int, Tensor]:
    """Images of the rows, by a call of a size that gives them the bits of the smallest one."""
    size = model.rows.choose(len(rows))
    sides = request.sizes or (model.generator.size,)
    if not model.rows.is_trial(size):
        started = time.perf_counter()
        images = _call(model, rows, request, size, sides)
        model.rows.took(size, time.perf_counter() - started)
        return images
    every, least = model.generator.sizes, model.rows.least
    parts = [_call(model, rows[i : i + least], request, least, every) for i in range(0, size, least)]
    trusted = {side: torch.cat([part[side] for part in parts]) for side in every}
    tried = _call(model, rows, request, size, every)
    model.rows.settle(size, equal=all(torch.equal(tried[side], made) for side, made in trusted.items()))
    return {side: trusted[side] for side in sides}


def _call(
    model: LoadedModel, rows: list[tuple[Job, int]], request: ImageRequest, size: int, sides: Sequence[int]
) -> dict[int, Tensor]:
    """Images of the rows, of these sides, by one call of the network with `size` rows."""
    points: list[LatentPoint] = []
    labels: list[int] = []
    for job, i in rows:
        assert isinstance(job.request, ImageRequest)
        points.append(job.request.points[i])
        if job.request.labels is not None:
            labels.append(job.request.labels[i])
    job, i = rows[0]
    assert isinstance(job.request, ImageRequest)
    prompt = prompt_of(model, job.request, i)
    # Calls of a model that reads texts have one row (see `ModelStore`).
    condition = None if model.texts is None or prompt is None else model.texts.condition(prompt)
    missing = size - len(points)
    points += points[-1:] * missing
    labels += labels[-1:] * missing
    made = render_points(
        model.generator, points, labels or None, condition=condition, sizes=sides, guidance=request.guidance
    )
    return {side: images[: len(rows)] for side, images in made.items()}
