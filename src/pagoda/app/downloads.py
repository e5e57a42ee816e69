"""Images to take home: each says what made it, and `pagoda inspect` can make it again."""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

from pagoda.app.calls import prompt_of
from pagoda.app.jobs import ImageRequest
from pagoda.app.models import LoadedModel
from pagoda.app.server import Answer
from pagoda.files import write_bytes_atomic
from pagoda.images import encode_image, make_grid, to_pil
from pagoda.stages.exploring import LatentPoint
from pagoda.stages.provenance import sample_facts


def image_facts(model: LoadedModel, answer: Answer, request: ImageRequest, index: int, size: int) -> dict[str, Any]:
    """What made one image of an answer.

    An image of a plain seed is of the kind "sample", which `pagoda inspect --run` makes again: its batch is written as copies of
    itself, since the server's batches give every row the bits of its own. Others are of the kind "point".
    """
    point = request.points[index]
    label, prompt = label_of(model, request, index), prompt_of(model, request, index)
    rows = answer.batch_size
    trained_for = model.generator.guidance_max is not None
    if point == LatentPoint(seeds=point.seeds[:1]) and (trained_for or request.guidance == 1):
        return sample_facts(
            model.generator,
            "sample",
            [point.seeds[0]] * rows,
            None if label is None else [label] * rows,
            prompts=None if prompt is None else [prompt] * rows,
            resolution=size,
            batch_size=rows,
            model=answer.model,
            row=0,
            **({"guidance": request.guidance} if trained_for else {}),
        )
    return {
        "kind": "point",
        "model": answer.model,
        "resolution": size,
        "seeds": list(point.seeds),
        "weights": list(point.weights),
        "truncation": point.truncation,
        "label": label,
        **({} if prompt is None else {"prompt": prompt}),
        "guidance": request.guidance,
    }


def label_of(model: LoadedModel, request: ImageRequest, index: int) -> int | None:
    """The class of an image: asked for, or by its first seed."""
    if not model.generator.num_classes:
        return None
    return (
        request.points[index].seeds[0] % model.generator.num_classes
        if request.labels is None
        else request.labels[index]
    )


def write_zip(folder: Path, model: LoadedModel, answer: Answer, request: ImageRequest) -> Path:
    """All images of an answer as PNG with their facts inside, a sheet of them, and `settings.json`; returns the archive's path."""
    buffer = io.BytesIO()
    settings = []
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for size, images in answer.images.items():
            side = images.shape[-1]  # in pixels, also where the generator makes latents
            for index, image in enumerate(to_pil(images)):
                facts = image_facts(model, answer, request, index, size)
                name = f"{side}px/{index:03d}-seed{request.points[index].seeds[0]}.png"
                settings.append({"file": name, **facts})
                archive.writestr(name, encode_image(image, "PNG", metadata=facts))
            sheet = {"kind": "sheet", "model": answer.model, "run": model.run, "resolution": size}
            archive.writestr(f"sheet-{side}px.png", encode_image(make_grid(images), "PNG", metadata=sheet))
        archive.writestr("settings.json", json.dumps(settings, indent=1))
    target = folder / uuid.uuid4().hex / f"{model.run.rpartition('/')[2]}.zip"
    write_bytes_atomic(target, buffer.getvalue())
    return target
