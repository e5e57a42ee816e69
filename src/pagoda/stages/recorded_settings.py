"""Which settings a stage's record holds: those that decide what it makes, and none that change nothing.

A setting that came after the first runs is absent where it has its neutral value, so that those runs are still continued.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import ConfigError
from pagoda.stages.config import EncodeConfig, GrowConfig, LossConfig, RunConfig, to_dict

LATER_SWITCHES = ("renormalise", "soft_routing")
"""Of `encode`, off by default: they came after the first runs and stores of latents, which do not name them."""


def stage_settings(config: RunConfig, stage: str) -> dict[str, Any]:
    """The part of the configuration that decides what a stage makes, apart from what it reads from earlier stages.

    Raises:
        ConfigError: an unknown stage.
    """
    values = to_dict(config)
    if stage not in ("teach", "encode", "distill", "grow", "amortise"):
        raise ConfigError(f"unknown stage {stage!r}; stages are teach, encode, distill, grow, amortise.")
    if stage == "teach" and config.teacher.path:  # what is in that folder is an input of the stage, its path is nothing
        return {"teacher": "brought", "base": values["base"], "labels": values["teacher"]["labels"]}
    shared = ["seed", "mirror", "precision"]
    shared += ["base", "sigma_data", "noise_scale", "backbone"] if stage == "teach" else ["sigma_max"]
    settings = {stage: values[stage], **{key: values[key] for key in shared}}
    if stage == "teach":
        # Absent where they change nothing: runs of earlier versions have no such keys.
        neutral = {"wrong_labels": 0.0, "weighting": "edm"}
        settings["teach"] = {k: v for k, v in values["teach"].items() if k not in neutral or v != neutral[k]}
        if config.condition != "label":
            settings["condition"] = config.condition
        if config.techniques:  # by name, so that a message says which differ, whatever their order
            settings["techniques"] = {
                name: options for entry in values["techniques"] for name, options in entry.items()
            }
    if stage == "distill" and config.distill.mode == "rec":  # absent where they change nothing, as in earlier versions
        settings["distill"] = {k: v for k, v in settings["distill"].items() if k not in ("mode", "teacher_pairs")}
    if stage == "distill" and config.distill.matching.weight == 0:  # nothing reads its other settings
        settings["distill"] = {k: v for k, v in settings["distill"].items() if k != "matching"}
    elif stage == "distill" and config.distill.matching.ramp == 0:
        matching = {k: v for k, v in settings["distill"]["matching"].items() if k != "ramp"}
        settings["distill"] = {**settings["distill"], "matching": matching}
    if stage == "distill" and config.distill.mode != "rec" and config.distill.teacher_pairs.latents == "noise":
        pairs = {k: v for k, v in settings["distill"]["teacher_pairs"].items() if k != "latents"}
        settings["distill"] = {**settings["distill"], "teacher_pairs": pairs}
    if stage == "distill" and config.distill.latents == "stored":
        settings["distill"] = {k: v for k, v in settings["distill"].items() if k != "latents"}
    if stage == "encode":  # absent where they are off, as in earlier versions
        off = [name for name in LATER_SWITCHES if not values["encode"][name]]
        off += ["share"] if config.encode.share == 1 else []
        off += ["rho"] if config.encode.rho == EncodeConfig.rho else []
        settings["encode"] = {k: v for k, v in values["encode"].items() if k not in off}
    if stage != "teach" and config.guidance.active:
        decides = ("scale_max",) if stage in ("encode", "amortise") else ("scale_max", "assignment")
        settings["guidance"] = {key: values["guidance"][key] for key in decides}
    if stage in ("distill", "grow"):
        settings[stage] = without_neutral(settings[stage])
    return settings


def without_neutral(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a stage without those that came later and change nothing: runs of earlier versions have no such keys."""
    loss = {
        "pixel",
        "lpips",
        "lpips_size",
        "stack",
        "judge",
        "feature_augment",
        "updates",
        "reconstruction_judge",
        "pairs",
        "adversarial_every",
        "judge_warmup",
        "judge_width",
        "heads",
        "image_text",
    }
    growth = {
        "blocks",
        "heads",
        "octave_losses",
        "use_rgb",
        "attention",
        "at_once",
        "train_from",
        "targets",
        "match_detail",
    }
    names, neutral = (growth, to_dict(GrowConfig())) if "loss" in values else (loss, to_dict(LossConfig()))
    # The encoder of images and texts is an input of the stage, by its hash.
    kept = {k: v for k, v in values.items() if k != "image_text_encoder" and (k not in names or v != neutral[k])}
    return {k: without_neutral(v) if k == "loss" else v for k, v in kept.items()}
