"""Tiny pipelines of texts with encoders of their own, whose networks were trained for a moment on captioned shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from tests.tiny_clip import save_tiny_clip
from tests.tiny_teachers import DATA, SIZE, scaled_linear, sd3, text_unet

from pagoda.data import open_source
from pagoda.data.dataset import prepare_images
from pagoda.data.downsample import Downsampler
from pagoda.diffusion import Condition, per_sample, schedule_from_scheduler
from pagoda.networks import DiffusersNetwork

LENGTH = 40
"""Tokens that an encoder reads of a text."""


def make_text_pipeline(folder: Path, kind: str, *, steps: int = 60) -> Path:
    """Write a pipeline of pixels: "sd" (one encoder, tokens) or "sd3" (two encoders, tokens and pooled; no third one)."""
    torch.manual_seed(5)
    if kind == "sd":
        encoder, tokenizer = _encoder(folder / "clip", width=8)
        scheduler: Any = scaled_linear()
        pipeline: Any = StableDiffusionPipeline(
            vae=None,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=text_unet(cross_attention_dim=8),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        model = pipeline.unet
    else:
        encoder, tokenizer = _encoder(folder / "clip", width=8, projection=3)
        second, _ = _encoder(folder / "clip", width=4, projection=2)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(
            transformer=sd3(joint_attention_dim=16, pooled_projection_dim=5),
            scheduler=scheduler,
            vae=None,
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        model = pipeline.transformer
    pipeline.set_progress_bar_config(disable=True)
    _train(model, scheduler, pipeline, steps)
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def load(folder: Path) -> Any:
    """What `make_text_pipeline` has written."""
    absent = {"vae": None, "safety_checker": None, "feature_extractor": None}
    if (folder / "transformer").is_dir():
        absent = {"vae": None, "text_encoder_3": None, "tokenizer_3": None}
    return DiffusionPipeline.from_pretrained(folder, **absent)


def embed(pipeline: Any, prompts: list[str]) -> Condition:
    """What the pipeline itself tells its network."""
    with torch.no_grad():
        if isinstance(pipeline, StableDiffusion3Pipeline):
            tokens, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
            return Condition(tokens=tokens, pooled=pooled)
        return Condition(tokens=pipeline.encode_prompt(prompts, "cpu", 1, False)[0])


def _encoder(folder: Path, *, width: int, projection: int = 0) -> tuple[Any, Any]:
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(save_tiny_clip(folder))
    tokenizer.model_max_length = LENGTH
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        projection_dim=projection or width,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn, all texts would look alike
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval(), tokenizer


def _train(model: Any, scheduler: Any, pipeline: Any, steps: int) -> None:
    """The plain regression of its own prediction; one text in five is dropped for the empty one."""
    data = prepare_images(open_source(DATA), sizes=(SIZE,), downsampler=Downsampler(), cache_dir=None, progress=False)
    images = data.images(torch.arange(len(data)), SIZE)
    texts = embed(pipeline, [str(caption) for caption in data.captions or []])
    empty = embed(pipeline, [""])
    network = DiffusersNetwork(model)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    schedule, prediction = schedule_from_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pick = torch.randint(len(images), (16,), generator=generator)
        x_0, eps = images[pick], torch.randn(16, 3, SIZE, SIZE, generator=generator)
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.rand(
            16, generator=generator, dtype=torch.float64
        )
        alpha, sigma = schedule.alpha(t).float(), schedule.sigma(t).float()
        noisy = per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * eps
        target = eps if prediction == "eps" else eps - x_0
        told = Condition.cat([texts[pick[:13]], empty[torch.zeros(3, dtype=torch.int64)]])
        loss = (network(noisy, schedule.network_time(t).float(), told) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
