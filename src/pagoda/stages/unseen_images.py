"""Images that no stage was trained on, and their latents: what the prior gap compares training images with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pagoda.data import Downsampler, LatentStore, Part
from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.files import load_tensors, save_tensors
from pagoda.stages.captions import caption_condition
from pagoda.stages.context import StageContext, load_teacher
from pagoda.stages.encode import encode_images
from pagoda.stages.guidance import pair_weights
from pagoda.stages.judging import RealImages, open_real
from pagoda.training import seeded_generator

_KEY = "unseen"


@dataclass(frozen=True)
class Walk:
    """Latents, their conditions, and the real images that belong to them and the classes of these, as a reading of rows (B,)."""

    latents: Callable[[Tensor], Tensor]
    condition: Callable[[Tensor], Condition]
    images: Callable[[Tensor], Tensor]
    classes: Callable[[Tensor], Tensor | None]


def unseen_walk(context: StageContext, real: RealImages, store: LatentStore) -> tuple[str, Walk, int]:
    """Images that no stage was trained on, what they are, and how many.

    Those of `evaluation.data` where it names others; else those that the run holds out (`source.hold_out`); else the mirror images of
    the stand-ins where the run has no use for mirrors; else the stand-ins moved sideways by half a pixel of the base size (by a whole one
    where that is the final size).

    Raises:
        ConfigError: `evaluation.data` has other classes than the run.
    """
    config, data, size, rows = context.config, context.data, real.size, real.stand_in
    classes = data.labels
    base, other = config.base, config.evaluation.data
    named = bool(other) and other != config.data
    if named or config.source.hold_out > 0:
        own_part: Part = "training" if named else "held out"
        opened = other if named else None
        others = {
            s: open_real(context.run, config, opened, s, context.runtime, part=own_part)
            for s in dict.fromkeys((base, size))
        }
        if context.captions is None and others[size].num_classes != data.num_classes:
            raise ConfigError(
                f"evaluation.data={other} has {others[size].num_classes} classes, the run {data.num_classes}; "
                "name images with the same classes, or none."
            )
        chosen = RealImages.whole(others[size], size, count=len(rows), seed=real.seed).stand_in
        classes = others[size].labels
        kind = "images" if named else "held out"
        if context.captions is None:
            shown = Condition.of_labels(others[size].labels(chosen))
        else:
            shown = caption_condition(context.run, others[size], chosen)

        def load(side: int, part: Tensor) -> Tensor:
            return others[side].pictures(chosen[part], side)
    elif not config.mirror:
        kind, chosen, shown = "mirrored", rows, context.condition(rows)

        def load(side: int, part: Tensor) -> Tensor:
            return data.pictures(rows[part], side, torch.ones(len(part), dtype=torch.bool))
    else:
        kind, chosen, shown = "shifted", rows, context.condition(rows)
        reduce, largest = Downsampler(config.downsampler), config.sizes[-1]

        def load(side: int, part: Tensor) -> Tensor:
            moved = shift_sideways(data.pictures(rows[part], largest), max(1, data.picture_size(largest) // base // 2))
            return moved if side == largest else reduce.tensor(moved, data.picture_size(side))

    def condition(part: Tensor) -> Condition:
        told = shown[part]
        return (
            replace(told, guidance=pair_weights(config, chosen[part], torch.zeros_like(part)))
            if config.guidance.active
            else told
        )

    facts = {"kind": kind, "rows": chosen.tolist(), "data": other, "latents": store.provenance}
    z = _unseen_latents(context, facts, len(chosen), lambda part: data.inputs_of(load(base, part)), condition)
    walk = Walk(lambda part: z[part], condition, lambda part: load(size, part), lambda part: classes(chosen[part]))
    return kind, walk, len(chosen)


def shift_sideways(images: Tensor, pixels: int) -> Tensor:
    """Images (B, C, H, W) moved to the right; the column at the left edge is repeated."""
    return torch.cat([images[..., :1].expand(*images.shape[:-1], pixels), images[..., :-pixels]], dim=-1)


def _unseen_latents(
    context: StageContext,
    facts: Mapping[str, Any],
    count: int,
    load: Callable[[Tensor], Tensor],
    condition: Callable[[Tensor], Condition],
) -> Tensor:
    """Latents of unseen images, by the run's own encoder; kept in the run, since all sizes share them."""
    path, said = context.run.path / "prior-gap" / "unseen.safetensors", json.dumps(facts, sort_keys=True)
    if path.is_file():
        tensors, metadata = load_tensors(path)
        if metadata.get(_KEY) == said:
            return tensors["z"]
    denoiser, _ = load_teacher(context.run.teacher)
    denoiser.to(context.runtime.device)
    parts = []
    for rows in torch.arange(count).split(context.config.encode.batch_size):
        images = load(rows)
        noise = None
        if context.config.encode.add_noise:
            draws = [seeded_generator(context.config.seed, "prior-gap", "unseen", i) for i in rows.tolist()]
            noise = torch.stack([torch.randn(images.shape[1:], generator=draw) for draw in draws])
        parts.append(encode_images(context.config, context.runtime, denoiser, images, condition(rows), noise).cpu())
    z = torch.cat(parts)
    path.parent.mkdir(exist_ok=True)
    save_tensors(path, {"z": z}, {_KEY: said})
    return z
