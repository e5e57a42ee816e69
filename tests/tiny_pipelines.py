"""Tiny diffusers pipelines, built offline; prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tests.tiny_diffusers import TOKENS, WIDTH, dit, normal, pixart, randomise, sd3, text_unet
from torch import Tensor

TEXT_PARTS = {"text_encoder": None, "tokenizer": None}
SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def autoencoder(channels: int = 4) -> AutoencoderKL:
    return randomise(AutoencoderKL(block_out_channels=(4,), latent_channels=channels, norm_num_groups=2))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(scheduler: Any = None, **changes: Any) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False) if scheduler is None else scheduler
    unet = changes.pop("unet", None) or text_unet(**changes)
    return quiet(StableDiffusionPipeline(autoencoder(), **TEXT_PARTS, unet=unet, scheduler=scheduler, **SAFETY))


def stable_diffusion_image_to_image(pipeline: StableDiffusionPipeline) -> StableDiffusionImg2ImgPipeline:
    return quiet(StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False))


def stable_diffusion_control(pipeline: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
    control = randomise(
        ControlNetModel(
            in_channels=4,
            block_out_channels=(8, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=2,
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            conditioning_embedding_out_channels=(4,),
        )
    )
    return quiet(
        StableDiffusionControlNetPipeline(**pipeline.components, controlnet=control, requires_safety_checker=False)
    )


def text_inputs(batch: int = 1, guidance: float = 3.0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(batch, TOKENS, WIDTH, seed=5).to(dtype),
        "negative_prompt_embeds": normal(batch, TOKENS, WIDTH, seed=6).to(dtype),
        "guidance_scale": guidance,
    }


def sample_text(
    pipeline: Any, *, steps: int = 10, batch: int = 1, seed: int = 0, size: int = 16, **more: Any
) -> Tensor:
    """Final latents of a Stable Diffusion pipeline."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {**text_inputs(batch), "num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    if not isinstance(pipeline, StableDiffusionImg2ImgPipeline):
        inputs |= {"height": size, "width": size}
    return pipeline(**{**inputs, **more}).images


def stable_diffusion_3(scheduler: Any = None) -> StableDiffusion3Pipeline:
    return quiet(
        StableDiffusion3Pipeline(
            transformer=sd3(sample_size=8).model,
            scheduler=FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler,
            vae=autoencoder(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def sample_3(pipeline: Any, *, steps: int = 10, batch: int = 1, seed: int = 0, **more: Any) -> Tensor:
    inputs = {
        "prompt_embeds": normal(batch, TOKENS, WIDTH, seed=5),
        "negative_prompt_embeds": normal(batch, TOKENS, WIDTH, seed=6),
        "pooled_prompt_embeds": normal(batch, 6, seed=7),
        "negative_pooled_prompt_embeds": normal(batch, 6, seed=8),
        "guidance_scale": 3.0,
        "num_inference_steps": steps,
        "height": 16,
        "width": 16,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipeline(**{**inputs, **more}).images


def pixart_alpha() -> PixArtAlphaPipeline:
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=pixart().model, scheduler=DDIMScheduler()
        )
    )


def sample_pixart(pipeline: Any, *, steps: int = 10, batch: int = 1, seed: int = 0, **more: Any) -> Tensor:
    mask = torch.ones(batch, TOKENS)
    inputs = {
        "negative_prompt": None,
        "prompt_embeds": normal(batch, TOKENS, WIDTH, seed=5),
        "negative_prompt_embeds": normal(batch, TOKENS, WIDTH, seed=6),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "num_inference_steps": steps,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipeline(**{**inputs, **more}).images


def class_dit() -> DiTPipeline:
    model = dit(num_embeds_ada_norm=1000).model  # the pipeline's null class is number 1000
    return quiet(DiTPipeline(transformer=model, vae=autoencoder(), scheduler=DDIMScheduler()))


def sample_dit(pipeline: Any, *, steps: int = 10, batch: int = 1, seed: int = 0, **more: Any) -> Tensor:
    inputs = {
        "class_labels": [k % 5 for k in range(batch)],
        "guidance_scale": 3.0,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    return torch.from_numpy(pipeline(**{**inputs, **more}).images)
