"""Tiny teachers of every kind as the folders that diffusers writes, each trained for a moment on drawn shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from pagoda.data import open_source
from pagoda.data.dataset import prepare_images
from pagoda.data.downsample import Downsampler
from pagoda.diffusion import Condition, per_sample, schedule_from_scheduler
from pagoda.files import save_tensors
from pagoda.networks import DiffusersNetwork, NullCondition

SIZE, CLASSES, WIDTH, POOLED = 8, 10, 6, 5
DATA = "shapes:count=40"
TEXT = {"tokens": (3, WIDTH), "pooled": (POOLED,)}

UNET: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def ddpm(**changes: Any) -> UNet2DModel:
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{**UNET, **kinds, "attention_head_dim": 8, "num_class_embeds": CLASSES + 1, **changes})


def class_unet(**changes: Any) -> UNet2DConditionModel:
    """Conditional on classes, without any cross-attention."""
    kinds = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    settings = {**UNET, **kinds, "in_channels": 3, "out_channels": 3, "num_class_embeds": CLASSES + 1}
    return UNet2DConditionModel(**{**settings, **changes})


def text_unet(**changes: Any) -> UNet2DConditionModel:
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    settings = {**UNET, **kinds, "in_channels": 3, "out_channels": 3, "attention_head_dim": 4}
    return UNet2DConditionModel(**{**settings, "cross_attention_dim": WIDTH, **changes})


def pixel_text_unet(**changes: Any) -> UNet2DConditionModel:
    """In small what DeepFloyd IF is: it resamples by residual blocks, pools its tokens itself, and has learned a variance."""
    settings = {
        **UNET,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": 64,
        "cross_attention_norm": "group_norm",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def dit(**changes: Any) -> DiTTransformer2DModel:
    """With a learned variance, as the published ones."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": 2,
        "sample_size": SIZE,
        "patch_size": 2,
        "num_embeds_ada_norm": CLASSES,
    }
    return DiTTransformer2DModel(**{**settings, **changes})


def sd3(**changes: Any) -> SD3Transformer2DModel:
    settings = {
        "sample_size": SIZE,
        "patch_size": 2,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**{**settings, **changes})


def linear(**changes: Any) -> DDPMScheduler:
    return DDPMScheduler(**{"clip_sample": False, **changes})


def scaled_linear(**changes: Any) -> DDIMScheduler:
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return DDIMScheduler(**{**settings, **changes})


TEACHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ddpm": (ddpm, linear),
    "ddpm-v": (ddpm, lambda: linear(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")),
    "ddpm-x0": (ddpm, lambda: linear(prediction_type="sample")),
    "class-unet": (class_unet, scaled_linear),
    "text-unet": (text_unet, scaled_linear),
    "if": (
        pixel_text_unet,
        lambda: linear(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True),
    ),
    "dit": (dit, lambda: DDIMScheduler(clip_sample=False)),
    "sd3": (sd3, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "edm": (lambda: ddpm(num_class_embeds=None), lambda: EDMEulerScheduler(sigma_min=0.002, sigma_max=60.0)),
}
"""Name -> (network, scheduler)."""
WITH_TEXT = ("text-unet", "if", "sd3")
WITH_CLASSES = ("ddpm", "ddpm-v", "ddpm-x0", "class-unet", "dit")


def null_rows(kind: str) -> dict[str, Tensor]:
    """What a text-conditional teacher is told of every image."""
    shapes = {name: shape for name, shape in TEXT.items() if kind == "sd3" or name == "tokens"}
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def train_briefly(model: nn.Module, scheduler: Any, null: NullCondition | None, steps: int) -> None:
    """The plain regression of its own prediction, by diffusers' own schedule rather than by ours."""
    data = prepare_images(open_source(DATA), sizes=(SIZE,), downsampler=Downsampler(), cache_dir=None, progress=False)
    rows = torch.arange(len(data))
    images, labels = data.images(rows, SIZE), data.labels(rows)
    network = DiffusersNetwork(model, null)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    schedule, prediction = schedule_from_scheduler(config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pick = torch.randint(len(images), (16,), generator=generator)
        x_0, eps = images[pick], torch.randn(16, 3, SIZE, SIZE, generator=generator)
        u = torch.rand(16, generator=generator, dtype=torch.float64)
        condition = Condition.of_labels(labels[pick] if network.num_classes else None)
        if prediction == "edm":
            sigma = (-0.6 + 1.5 * torch.randn(16, generator=generator)).exp()
            scaled = scheduler.precondition_inputs(x_0 + per_sample(sigma, x_0) * eps, per_sample(sigma, x_0))
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma * (sigma**2 + 0.25).rsqrt()
            noisy, time = scaled, sigma.log() / 4
            target = (x_0 - per_sample(c_skip, x_0) * (x_0 + per_sample(sigma, x_0) * eps)) / per_sample(c_out, x_0)
        else:
            low, high = schedule.t_min, schedule.t_max
            t = low + (high - low) * u
            alpha, sigma = schedule.alpha(t).float(), schedule.sigma(t).float()
            noisy, time = per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * eps, schedule.network_time(t).float()
            target = {
                "eps": eps,
                "x0": x_0,
                "v": per_sample(alpha, x_0) * eps - per_sample(sigma, x_0) * x_0,
                "velocity": eps - x_0,
            }[prediction]
        loss = (network(noisy, time, condition) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_teacher(folder: Path, kind: str, *, steps: int = 0) -> Path:
    """Write a teacher of `kind` as a model folder with its scheduler beside it; with `steps`, trained for as many."""
    build, schedule = TEACHERS[kind]
    torch.manual_seed(3)
    model, scheduler = build(), schedule()
    if steps == 0:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    null = NullCondition.of(null_rows(kind)) if kind in WITH_TEXT else None
    train_briefly(model.train(), scheduler, null, steps)
    model.eval().save_pretrained(folder)
    scheduler.save_pretrained(folder)
    if null is not None:
        save_tensors(folder / "null_condition.safetensors", null.rows())
    return folder
