"""Tiny real diffusers networks of every kind that has an anatomy, with arguments of their own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import (
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn

BATCH = 2
TOKENS, WIDTH = 5, 8


@dataclass(frozen=True)
class NativeCase:
    """A network with arguments of its own forward, by name."""

    model: nn.Module
    arguments: dict[str, Any]

    @property
    def sample_name(self) -> str:
        return "sample" if "sample" in self.arguments else "hidden_states"

    @property
    def sample(self) -> Tensor:
        return self.arguments[self.sample_name]

    def call(self, **changes: Any) -> Tensor:
        """The model's own forward."""
        return self.model(**{**self.arguments, **changes}, return_dict=False)[0]


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Random non-zero weights everywhere, so that no identity holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
}


def text_unet(**changes: Any) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**{**TEXT_UNET, **changes}))


def text_arguments(size: int = 16, **changes: Any) -> dict[str, Any]:
    return {
        "sample": normal(BATCH, 4, size, size),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": normal(BATCH, TOKENS, WIDTH, seed=2),
        **changes,
    }


def control_residuals(model: UNet2DConditionModel, size: int = 16) -> dict[str, Any]:
    """Residuals of the shapes that a ControlNet gives."""
    shapes = []
    for block, channels in zip(model.down_blocks, model.config.block_out_channels, strict=True):
        if not shapes:
            shapes.append((channels, size))
        shapes += [(channels, size)] * len(block.resnets)
        if block.downsamplers is not None:
            size = (size + 1) // 2
            shapes.append((channels, size))
    down = tuple(0.3 * normal(BATCH, c, s, s, seed=10 + k) for k, (c, s) in enumerate(shapes))
    middle = 0.3 * normal(BATCH, shapes[-1][0], size, size, seed=9)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def unet() -> NativeCase:
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8, 16),
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=6,
    )
    labels = torch.tensor([0, 5])
    return NativeCase(randomise(model), {"sample": normal(BATCH, 3, 16, 16), "timestep": 7, "class_labels": labels})


def text() -> NativeCase:
    return NativeCase(text_unet(), text_arguments())


def text_odd() -> NativeCase:
    return NativeCase(text_unet(), text_arguments(size=14, timestep=torch.tensor([501, 20])))


def text_masked() -> NativeCase:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    model = text_unet(num_class_embeds=3, class_embeddings_concat=True, center_input_sample=True)
    return NativeCase(model, text_arguments(encoder_attention_mask=mask, class_labels=torch.tensor([0, 2])))


def text_sizes() -> NativeCase:
    """SDXL's additional embeddings."""
    model = text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 10
    )
    added = {"text_embeds": normal(BATCH, 10, seed=3), "time_ids": torch.arange(12.0).reshape(BATCH, 6)}
    return NativeCase(model, text_arguments(added_cond_kwargs=added))


def text_control() -> NativeCase:
    model = text_unet()
    return NativeCase(model, text_arguments(**control_residuals(model)))


def text_distilled() -> NativeCase:
    """A guidance weight that is embedded with the time (LCM)."""
    return NativeCase(text_unet(time_cond_proj_dim=6), text_arguments(timestep_cond=normal(BATCH, 6, seed=4)))


def video() -> NativeCase:
    model = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=2,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
    )
    return NativeCase(
        randomise(model), {**text_arguments(), "sample": normal(BATCH, 4, 3, 8, 8), "timestep": torch.tensor(501)}
    )


def motion(**changes: Any) -> NativeCase:
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    }
    model = randomise(UNetMotionModel(**{**settings, **changes}))
    tokens = normal(BATCH * 3, TOKENS, WIDTH, seed=2)
    return NativeCase(model, {**text_arguments(), "sample": normal(BATCH, 4, 3, 8, 8), "encoder_hidden_states": tokens})


def dit(**changes: Any) -> NativeCase:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    }
    model = DiTTransformer2DModel(**{**settings, **changes})
    given = {"timestep": torch.tensor([501, 501]), "class_labels": torch.tensor([1, 5])}
    return NativeCase(randomise(model, scale=0.2), {"hidden_states": normal(BATCH, 4, 16, 16), **given})


def pixart(**changes: Any) -> NativeCase:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 16,
        "patch_size": 2,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }
    model = randomise(PixArtTransformer2DModel(**{**settings, **changes}), scale=0.2)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    given = {"timestep": torch.tensor([501, 501]), "encoder_hidden_states": normal(BATCH, TOKENS, WIDTH, seed=2)}
    added = {"resolution": None, "aspect_ratio": None}
    return NativeCase(
        model,
        {
            "hidden_states": normal(BATCH, 4, 12, 16),
            **given,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": added,
        },
    )


def sd3(**changes: Any) -> NativeCase:
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 6,
        "out_channels": 4,
        "pos_embed_max_size": 12,
    }
    model = randomise(SD3Transformer2DModel(**{**settings, **changes}), scale=0.2)
    return NativeCase(
        model,
        {
            "hidden_states": normal(BATCH, 4, 12, 16),
            "timestep": torch.tensor([501.0, 501.0]),
            "encoder_hidden_states": normal(BATCH, TOKENS, WIDTH, seed=2),
            "pooled_projections": normal(BATCH, 6, seed=3),
        },
    )


def sd3_control() -> NativeCase:
    case = sd3()
    residuals = [0.3 * normal(BATCH, 48, 16, seed=20 + k) for k in range(2)]
    return NativeCase(case.model, {**case.arguments, "block_controlnet_hidden_states": residuals, "skip_layers": [1]})


UNETS: dict[str, Callable[[], NativeCase]] = {
    "unet": unet,
    "text": text,
    "text-odd": text_odd,
    "text-masked": text_masked,
    "text-sizes": text_sizes,
    "text-control": text_control,
    "text-distilled": text_distilled,
    "video": video,
    "motion": motion,
    "motion-without-motion-middle": lambda: motion(use_motion_mid_block=False),
}
TRANSFORMERS: dict[str, Callable[[], NativeCase]] = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd3-dual": lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "sd3-control": sd3_control,
}
NATIVE = {**UNETS, **TRANSFORMERS}
