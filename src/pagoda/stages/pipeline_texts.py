"""Prompts as the network of a diffusers pipeline reads them, embedded by the pipeline's own text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks.null_condition import NullCondition

_NOT_NEEDED = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder", "controlnet")


def reads_texts(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's `model_index.json` names a text encoder and its tokeniser."""
    return all((index.get(name) or [None])[0] is not None for name in ("text_encoder", "tokenizer"))


class PipelineTexts:
    """Embeds prompts by `encode_prompt` of the pipeline's class. Network and decoder are not loaded again for it.

    Args:
        path: Folder of a pipeline.
        index: What its `model_index.json` says.

    Raises:
        ConfigError: a class that diffusers does not have, or whose embeddings are not told apart here.
        ArtifactError: text encoders that cannot be read.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        import diffusers

        name = str(index.get("_class_name"))
        kind: Any = getattr(diffusers, name, None)
        if not hasattr(kind, "encode_prompt"):
            raise ConfigError(
                f"{path} is a pipeline of the class {name}, whose prompts cannot be embedded here; read are those that have "
                "`encode_prompt`, such as StableDiffusionPipeline and StableDiffusion3Pipeline."
            )
        left_out: dict[str, Any] = {part: None for part in _NOT_NEEDED if part in index}
        try:
            self._pipeline = kind.from_pretrained(path, use_safetensors=True, local_files_only=True, **left_out)
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"the text encoders of {path} cannot be read ({error}).") from error

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """One row a prompt: tokens (N, T, D), and pooled embeddings (N, P) where the class has them; on the CPU.

        Raises:
            ConfigError: no prompt, an empty one, or embeddings of a kind that is not known here.
        """
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ConfigError(f"a prompt needs words, got {list(prompts)}.")
        return self._embed(prompts)

    def null(self) -> NullCondition:
        """What the network saw when its text was dropped: the embedding of the empty prompt.

        Raises:
            ConfigError: embeddings of a kind that is not known here.
        """
        return NullCondition.of({name: rows[0] for name, rows in self._embed([""]).slots().items()})

    def _embed(self, prompts: Sequence[str]) -> Condition:
        taken = inspect.signature(self._pipeline.encode_prompt).parameters
        options: dict[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "device": "cpu"}
        options |= {"prompt_2": None, "prompt_3": None}
        found = self._pipeline.encode_prompt(
            prompt=list(prompts), **{name: value for name, value in options.items() if name in taken}
        )
        if len(found) == 2:  # Stable Diffusion: tokens, and those of the negative prompt
            return Condition(tokens=found[0].float())
        if (
            len(found) == 4 and found[2] is not None and found[2].ndim == 2
        ):  # Stable Diffusion 3: with pooled ones, and both again
            return Condition(tokens=found[0].float(), pooled=found[2].float())
        raise ConfigError(
            f"`encode_prompt` of {type(self._pipeline).__name__} gives {len(found)} parts, which are not known here; give the "
            "condition in Python (`Candidates`)."
        )
