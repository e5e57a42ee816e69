"""What a diffusers user loads and calls: `PagodaPipeline.from_pretrained(RUN)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.images import to_pil
from pagoda.networks import AutoencoderCodec, OneStepGenerator, wrap_autoencoder
from pagoda.stages.captions import prompt_condition
from pagoda.stages.context import teacher_facts
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.text_export import fetch_exported, open_exported
from pagoda.stages.watermark import mark_images

_FETCHED = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options that say how a repository of the hub is fetched."""


@dataclass
class PagodaPipelineOutput(BaseOutput):
    """Images: PIL images, an array (N, H, W, C) in [0, 1], or a tensor (N, C, H, W) in [-1, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor


class PagodaPipeline(DiffusionPipeline):
    """One-step generation: labels or a prompt in, images out, one network call.

    Args:
        generator: The one-step generator.
        class_names: Names of its classes, in the order of the labels; None for a generator without labels.
        vae: The autoencoder whose latents the generator makes; None for pixels, or where the generator has its codec already.
        codec_scale: (z - codec_shift) * codec_scale are the latents that the generator makes, z the autoencoder's own.
        codec_shift: See above.
        codec_tile: Side in pixels of the tiles in which the autoencoder decodes larger images; 0: whole images.
        codec_overlap: Pixels that neighbouring tiles share.
        read_prompts: Prompts -> their condition, for a generator that reads texts; a run folder brings its own.
    """

    _optional_components: ClassVar[list[str]] = ["vae"]
    generator: OneStepGenerator
    config: Any
    register_modules: Any
    register_to_config: Any

    def __init__(
        self,
        generator: OneStepGenerator,
        class_names: list[str] | None = None,
        read_prompts: Callable[[Sequence[str]], Condition] | None = None,
        vae: Any = None,
        codec_scale: float = 1.0,
        codec_shift: float = 0.0,
        codec_tile: int = 0,
        codec_overlap: int = 0,
    ) -> None:
        super().__init__()
        self._read_prompts = read_prompts
        if vae is not None:
            wrapped = wrap_autoencoder(vae, scale=codec_scale, shift=codec_shift)
            if codec_tile:
                wrapped.use_tiles(codec_tile, codec_overlap)
            generator.use_codec(wrapped)
        elif isinstance(generator.codec, AutoencoderCodec):
            codec = generator.codec
            vae, codec_scale, codec_shift = codec.model, codec.scale, codec.shift
            codec_tile, codec_overlap = codec.tile or 0, codec.overlap
        self.register_modules(generator=generator, vae=vae)
        tiles = {"codec_tile": codec_tile, "codec_overlap": codec_overlap} if codec_tile else {}
        self.register_to_config(class_names=class_names, codec_scale=codec_scale, codec_shift=codec_shift, **tiles)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> PagodaPipeline:
        """Load a run folder, or anything that `save_pretrained` wrote (a folder, or a hub name).

        Args:
            pretrained_model_name_or_path: Where.
            **kwargs: As for `diffusers.DiffusionPipeline.from_pretrained`; a run folder takes none but `torch_dtype`.

        Raises:
            ArtifactError: a run folder without a generator, or a damaged text encoder.
            ConfigError: options that a run folder does not take.
            ResourceError: the text encoder of a repository cannot be fetched.
        """
        path = Path(pretrained_model_name_or_path)
        if not (path / "config.yaml").is_file():
            fetched = {k: v for k, v in kwargs.items() if k in _FETCHED}
            # diffusers' own lookup knows only the classes of diffusers and transformers: the generator is handed to it loaded.
            if "generator" not in kwargs:
                options = {k: v for k, v in kwargs.items() if k in (*_FETCHED, "proxies", "torch_dtype", "variant")}
                kwargs["generator"] = OneStepGenerator.from_pretrained(
                    pretrained_model_name_or_path, subfolder="generator", use_safetensors=True, **options
                )
            if not kwargs.setdefault("use_safetensors", True):  # of the autoencoder too, where there is one
                raise ConfigError(
                    "only safetensors are read, because loading a pickle can run any code; leave use_safetensors out."
                )
            pipeline: PagodaPipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if pipeline.generator.token_dim:
                # No part of the index, which may name classes of diffusers and transformers alone.
                place = path if path.is_dir() else fetch_exported(str(pretrained_model_name_or_path), **fetched)
                pipeline._read_prompts = open_exported(place)
            return pipeline
        dtype = kwargs.pop("torch_dtype", None)
        if kwargs:
            raise ConfigError(
                f"a run folder is loaded without {', '.join(sorted(kwargs))}; only torch_dtype is accepted."
            )
        run = RunFolder.open(path)
        generator = load_generator(run)
        if dtype is not None:
            generator = generator.to(dtype)
        names = teacher_facts(run.teacher).get("class_names")
        read = partial(prompt_condition, run) if generator.token_dim else None
        return cls(generator, list(names) if isinstance(names, list) else None, read)

    @property
    def resolutions(self) -> list[int]:
        """What can be asked for: sides of the images, or of their latents where the generator makes these."""
        return list(self.generator.sizes)

    @property
    def guidance_scale_max(self) -> float:
        """Largest `guidance_scale` that can be asked for; 1 for a generator that was trained without guidance."""
        return self.generator.guidance_max or 1.0

    def label_of(self, name: str) -> int:
        """The label of a class name.

        Raises:
            ConfigError: no such class.
        """
        names = self.config.class_names or []
        if name not in names:
            raise ConfigError(f"no class {name!r}; classes are {names}.")
        return int(names.index(name))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        num_images: int | None = None,
        seed: int | Sequence[int] = 0,
        resolution: int | None = None,
        batch_size: int = 64,
        guidance_scale: float | None = None,
        watermark: str | None = None,
        num_inference_steps: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PagodaPipelineOutput | tuple[Any]:
        """Make images.

        Args:
            class_labels: A class (number or name) for all images, or one per image; in turn when None.
            prompt: A text for all images, or one per image; for a generator that reads texts, and then needed.
            num_images: How many images; as many as `class_labels`, `prompt` or `seed` list, else 1, when None.
            seed: Seed of the first image (the next ones count up), or one seed per image.
            resolution: One of `resolutions`; the largest when None.
            batch_size: Images a network call.
            guidance_scale: Guidance weight, from 1 (none) to `guidance_scale_max`; 1 when None. Still one call.
            watermark: Key of an invisible mark that every image gets; `pagoda.stages.watermark.read_mark` finds it.
            num_inference_steps: 1; anything else is refused.
            output_type: "pil", "np" ((N, H, W, C) in [0, 1]) or "pt" ((N, C, H, W) in [-1, 1]).
            return_dict: Whether to return `PagodaPipelineOutput` or a tuple.

        Raises:
            ConfigError: more than one step, a guidance weight outside of the trained range, labels, prompts or counts that do not
                fit, an unknown output type.
            ShapeError: a resolution that the generator does not have.
        """
        if num_inference_steps != 1:
            raise ConfigError(f"a one-step generator takes num_inference_steps=1, got {num_inference_steps}.")
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type must be pil, np or pt, got {output_type!r}.")
        asked = {
            "num_images": num_images,
            "class_labels": None if class_labels is None or isinstance(class_labels, int | str) else len(class_labels),
            "prompt": None if prompt is None or isinstance(prompt, str) else len(prompt),
            "seed": None if isinstance(seed, int) else len(seed),
        }
        counts = {name: count for name, count in asked.items() if count is not None} or {"num_images": 1}
        count = next(iter(counts.values()))
        if count < 1 or len(set(counts.values())) > 1:
            said = ", ".join(f"{name} asks for {number}" for name, number in counts.items())
            raise ConfigError(f"one number of images is needed, 1 or more: {said}.")
        seeds = list(range(seed, seed + count)) if isinstance(seed, int) else [int(s) for s in seed]
        labels: list[int] | None = None
        if class_labels is not None:
            given = [class_labels] * count if isinstance(class_labels, int | str) else list(class_labels)
            labels = [self.label_of(label) if isinstance(label, str) else int(label) for label in given]
        condition = None
        if prompt is not None:
            if self._read_prompts is None:
                raise ConfigError(
                    "this pipeline has nothing that reads prompts: its generator takes labels, or it came without a text encoder. "
                    "Load the run folder or an export of it, or leave the prompt out."
                )
            condition = self._read_prompts([prompt] * count if isinstance(prompt, str) else list(prompt))
        images = sample_images(
            self.generator,
            seeds,
            labels=labels,
            condition=condition,
            resolution=resolution,
            batch_size=batch_size,
            guidance=guidance_scale,
        )
        if watermark is not None:
            images = mark_images(images, watermark)
        made: Any = images
        if output_type == "pil":
            made = to_pil(images)
        elif output_type == "np":
            made = ((images.float() + 1) / 2).permute(0, 2, 3, 1).numpy()
        return PagodaPipelineOutput(images=made) if return_dict else (made,)
