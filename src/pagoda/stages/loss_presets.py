"""Losses by name: `official`, as the scripts of sony/pagoda have them, and `pagoda`, our own.

pagoda train ... --set distill.loss=official --set grow.loss=official
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks import FeatureConfig
from pagoda.stages.config import LossConfig, to_dict

LOSSES = ("official", "pagoda")
OFFICIAL_NETWORKS = ("timm:deit_base_distilled_patch16_224.fb_in1k", "timm:tf_efficientnet_lite0.in1k")
"""The two feature networks of the official code."""
AUGMENT = ("colour", "translation", "cutout")


def loss_preset(name: str, size: int, *, grown: bool) -> LossConfig:
    """The loss of one stage.

    Args:
        name: official or pagoda.
        size: Side of the images, in pixels; the official recipe changes at 256 and 512 px.
        grown: Whether the stage grows the generator; False for the distillation.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown loss {name!r}. {did_you_mean(name, LOSSES)}")
    return _official(size, grown) if name == "official" else _pagoda(size, grown)


def _official(size: int, grown: bool) -> LossConfig:
    """Features alone, both networks mixed; separate updates from 256 px, and at 512 px a judge of reconstructions."""
    return LossConfig(
        pixel=0.0,
        feature=1.0,
        feature_augment=AUGMENT,
        stack=FeatureConfig(networks=OFFICIAL_NETWORKS, mixing=True),
        adversarial=1.0 if grown else 0.2,
        augment=AUGMENT,
        raw_pixels=False,
        updates="separate" if grown and size >= 256 else "joint",
        reconstruction_judge=0.5 if grown and size >= 512 else 0.0,
    )


def _pagoda(size: int, grown: bool) -> LossConfig:
    """Pixels and the teacher's features; a judge that looks through mixed features of the same teacher, from a fifth of the way.

    No outside weights. The window keeps the judge affordable above 64 px.
    """
    return LossConfig(
        feature=1.0 if grown else 0.3,
        adversarial=0.1 if grown else 0.05,
        adversarial_from=0.2,
        augment=AUGMENT,
        judge=FeatureConfig(mixing=True),
        crop=64 if size > 64 else 0,
    )


def named_losses(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the names of `distill.loss` and `grow.loss` are replaced by what they stand for, before all others.

    Args:
        settings: Dotted keys.
        values: The configuration that they change, as plain data.

    Raises:
        ConfigError: an unknown name.
    """
    left = dict(settings)
    base, size = (int(left.get(key, values[key])) for key in ("base", "size"))
    found: dict[str, Any] = {}
    if isinstance(left.get("distill.loss"), str):
        found["distill.loss"] = to_dict(loss_preset(left.pop("distill.loss"), base, grown=False))
    if isinstance(left.get("grow.loss"), str):
        name, side, losses = left.pop("grow.loss"), 2 * base, []
        while side <= max(size, 2 * base):
            losses.append(to_dict(loss_preset(name, side, grown=True)))
            side *= 2
        same = all(loss == losses[0] for loss in losses)
        found["grow.loss"], found["grow.octave_losses"] = losses[0], [] if same else losses
    return {**found, **left}
