"""Sized configurations by name: tiny (minutes on two cores), small (an hour on two cores or minutes on a GPU), base (ImageNet-64 class);
of the same class, official (what the official scripts do, as closely as it can be said here) and pagoda (our own choices)."""

from __future__ import annotations

import dataclasses
from typing import Any

from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks import backbone_preset
from pagoda.stages.config import (
    DistillConfig,
    EncodeConfig,
    GrowConfig,
    LossConfig,
    MatchingConfig,
    RunConfig,
    TeachConfig,
    TeacherPairsConfig,
)
from pagoda.stages.loss_presets import loss_preset
from pagoda.training import LoopConfig, OptimizerConfig
from pagoda.training.denoising import NoiseLaw

PRESETS = ("tiny", "small", "base", "official", "pagoda")


def preset_config(name: str, data: str, *, base: int, size: int, codec_factor: int = 1) -> RunConfig:
    """A complete configuration.

    Args:
        name: tiny, small, base, official or pagoda.
        data: What to train on (see `RunConfig.data`).
        base: Side of the diffusion model's images, in pixels.
        size: Side of the generator's images: base x 2^k.
        codec_factor: How many times smaller the latents are that the run works on: windows that tiny and small look through in growth
            then show the same part of the picture as on pixels.

    Raises:
        ConfigError: an unknown preset, or sizes or a factor that do not fit.
    """
    if codec_factor < 1:
        raise ConfigError(f"codec_factor must be >= 1, got {codec_factor}: latents are not larger than their images.")
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}. {did_you_mean(name, PRESETS)}")
    network = backbone_preset("base" if name in ("official", "pagoda") else name, base)
    config = RunConfig(data=data, base=base, size=size, backbone=network)
    if name in ("official", "pagoda"):
        return dataclasses.replace(config, **{"official": _official, "pagoda": _pagoda}[name](config))
    if name == "base":
        return dataclasses.replace(config, **_base())
    side = {"tiny": 16, "small": 24}[name]
    return dataclasses.replace(
        config, **{"tiny": _tiny, "small": _small}[name](_window(side, codec_factor, network.stride))
    )


def _window(side: int, codec_factor: int, stride: int) -> int:
    """The smallest window that a network of this stride can look at and that shows `side` pixels of a picture or more."""
    return -(-side // (codec_factor * stride)) * stride


def _tiny(window: int) -> dict[str, Any]:
    """Minutes on two cores: 8 -> 32 px shapes."""
    return {
        "precision": "auto",
        "teach": TeachConfig(
            loop=LoopConfig(steps=1300, batch_size=64, checkpoint_every=200, log_every=50, preview_every=1200),
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=50),
            ema=0.998,
            noise=NoiseLaw(mean=-0.5, std=1.2),
        ),
        "encode": EncodeConfig(solver="dpm2m", num_nodes=20, sigma_min=0.04, share=None, batch_size=256),
        "distill": DistillConfig(
            mode="both",
            # Pairs teach the way from noise to images, matching then makes the images likely: see docs/systems/pagoda-losses.md.
            teacher_pairs=TeacherPairsConfig(count=5000, share=0.7, num_nodes=10),
            matching=MatchingConfig(weight=20.0),
            loop=LoopConfig(steps=640, batch_size=64, checkpoint_every=200, log_every=20, preview_every=450),
            optimizer=OptimizerConfig(lr=4e-3, betas=(0.5, 0.99)),
            # In these minutes no adversarial term was seen to help, and it makes a step two to three times as long; nor did features, which
            # take a third of a step's time (docs/systems/pagoda-losses.md).
            loss=LossConfig(huber=0.01, feature=0.0, adversarial=0.0),
        ),
        "grow": GrowConfig(
            loop=LoopConfig(checkpoint_every=200, log_every=50, preview_every=400),
            steps=(600, 400),
            batch_size=(16,),
            channels=(32, 24),
            optimizer=OptimizerConfig(lr=4e-3, betas=(0.5, 0.99)),
            loss=LossConfig(huber=0.01, feature=20.0, adversarial=0.0, crop=window),
            targets="consistent",
            match_detail=True,
        ),
    }


def _small(window: int) -> dict[str, Any]:
    """Within an hour on two cores, 16 -> 64 px; minutes on a GPU."""
    return {
        "precision": "auto",
        "teach": TeachConfig(
            loop=LoopConfig(steps=2000, batch_size=64, checkpoint_every=200, log_every=20, preview_every=500),
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=50),
            ema=0.998,
            noise=NoiseLaw(mean=-0.6, std=1.3),
        ),
        "encode": EncodeConfig(solver="dpm2m", num_nodes=20, sigma_min=0.04, share=None, batch_size=128),
        "distill": DistillConfig(
            mode="both",
            teacher_pairs=TeacherPairsConfig(count=4000, num_nodes=12, batch_size=128),
            # All at once, matching threw one generator of two off; and it wants many steps: 500 leave emoji above their teacher, 900 below
            # it (docs/systems/pagoda-losses.md).
            matching=MatchingConfig(weight=10.0, start=0.4, ramp=0.1),
            loop=LoopConfig(steps=1500, batch_size=64, checkpoint_every=100, log_every=20, preview_every=250),
            optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.99)),
            loss=LossConfig(huber=0.01, feature=0.3, adversarial=0.0),
        ),
        "grow": GrowConfig(
            loop=LoopConfig(checkpoint_every=100, log_every=20, preview_every=200),
            steps=(1000, 700),
            batch_size=(32, 16),
            channels=(48, 32),
            optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.99)),
            loss=LossConfig(huber=0.01, feature=1.0, adversarial=0.05, adversarial_from=0.7, crop=window),
            fakes=2048,
            match_detail=True,
        ),
    }


def _base() -> dict[str, Any]:
    """The ImageNet-64 class of network; days on GPUs. Numbers follow the official scripts where they give one."""
    radam = OptimizerConfig(name="radam", lr=8e-6, rate="constant", clip=0.0)
    judge = OptimizerConfig(name="radam", lr=2e-3, rate="constant", clip=0.0)
    loop = LoopConfig(steps=180_000, batch_size=96, checkpoint_every=1000, log_every=50, preview_every=2000)
    return {
        "noise_scale": 250.0,
        "teach": TeachConfig(
            loop=LoopConfig(steps=600_000, batch_size=4096, checkpoint_every=1000, log_every=50, preview_every=5000),
            optimizer=OptimizerConfig(lr=1e-4, rate="constant", warmup_steps=10_000),
            ema=0.9999,
        ),
        "encode": EncodeConfig(num_nodes=40, sigma_min=0.002, add_noise=False, batch_size=1300, shard_size=8192),
        "distill": DistillConfig(
            loop=loop, optimizer=radam, discriminator=judge, ema=0.999, loss=LossConfig(adversarial=0.2, feature=1.0)
        ),
        "grow": GrowConfig(
            loop=loop,
            steps=(100_000,),
            batch_size=(256,),
            channels=(192, 192, 96),
            optimizer=radam,
            discriminator=judge,
            ema=0.999,
            loss=LossConfig(adversarial=1.0, feature=1.0),
            cache_gib=0.0,
        ),
    }


def _official(config: RunConfig) -> dict[str, Any]:
    """The official scripts (see docs/systems/pagoda.md for what differs all the same)."""
    values, octaves = _base(), config.sizes[1:] or [2 * config.base]
    # Three blocks: the one that enlarges, and two plain ones. The head is copied while the width stays.
    widths = tuple(96 if size >= 512 else 192 for size in octaves)
    below = (config.backbone.channels[0], *widths)
    heads = tuple("copy" if width == lower else "zero" for width, lower in zip(widths, below, strict=False))
    batches = {128: 256, 256: 360}
    return {
        **values,
        "sigma_data": 0.5,
        "encode": dataclasses.replace(values["encode"], clip_denoised=True),
        "distill": dataclasses.replace(
            values["distill"], output="raw", loss=loss_preset("official", config.base, grown=False)
        ),
        "grow": dataclasses.replace(
            values["grow"],
            batch_size=tuple(batches.get(size, 256 if size < 128 else 512) for size in octaves),
            channels=widths,
            num_blocks=3,
            head_init=heads[0],
            heads=heads,
            use_rgb=False,
            train_from="decoder.9",
            loss=loss_preset("official", octaves[0], grown=True),
            octave_losses=tuple(loss_preset("official", size, grown=True) for size in octaves),
        ),
    }


def _pagoda(config: RunConfig) -> dict[str, Any]:
    """Our own choices for the same class of network: what helped in small runs, not yet tried at this size."""
    values = _base()
    adam = OptimizerConfig(lr=1e-4, betas=(0.5, 0.99), warmup_steps=500)
    judge = OptimizerConfig(lr=2e-4, betas=(0.5, 0.99), rate="constant")
    octaves = config.sizes[1:] or [2 * config.base]
    return {
        "teach": values["teach"],
        "encode": EncodeConfig(
            solver="dpm2m", num_nodes=40, sigma_min=0.01, share=None, batch_size=1300, shard_size=8192
        ),
        "distill": dataclasses.replace(
            values["distill"],
            mode="both",
            teacher_pairs=TeacherPairsConfig(count=50_000, share=0.25, num_nodes=24),
            matching=MatchingConfig(weight=5.0, ramp=0.1, optimizer=adam),
            optimizer=adam,
            discriminator=judge,
            loss=loss_preset("pagoda", config.base, grown=False),
        ),
        "grow": dataclasses.replace(
            values["grow"],
            channels=tuple(192 if size <= 128 else 96 for size in octaves),
            match_detail=True,
            optimizer=adam,
            discriminator=judge,
            loss=loss_preset("pagoda", octaves[0], grown=True),
            octave_losses=tuple(loss_preset("pagoda", size, grown=True) for size in octaves),
        ),
    }
