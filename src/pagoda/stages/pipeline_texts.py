"""Prompts as the network of a diffusers pipeline reads them, embedded by the pipeline's own text encoders.

Such networks read every token of a text, the padding too: masks are all True here.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.evaluation.extractors import hash_weights
from pagoda.files import hash_json
from pagoda.networks import num_parameters
from pagoda.networks.loading import StoredWeights, find_weights
from pagoda.networks.null_condition import NullCondition
from pagoda.text import TextEncoder
from pagoda.text.loading import load_part

_PARTS = ("text_encoder", "tokenizer")
_NOT_NEEDED = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder", "controlnet")


def reads_texts(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's `model_index.json` names a text encoder and its tokeniser."""
    return all((index.get(name) or [None])[0] is not None for name in ("text_encoder", "tokenizer"))


class PipelineTexts:
    """Embeds prompts by `encode_prompt` of the pipeline's class. Network and decoder are not loaded again for it.

    Args:
        path: Folder of a pipeline.
        index: What its `model_index.json` says.
        device: Where to compute.

    Raises:
        ConfigError: a class that diffusers does not have, or whose embeddings are not told apart here.
        ArtifactError: text encoders that cannot be read, or have no safetensors.
    """

    def __init__(self, path: Path, index: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        import diffusers

        name = str(index.get("_class_name"))
        kind: Any = getattr(diffusers, name, None)
        if not hasattr(kind, "encode_prompt"):
            raise ConfigError(
                f"{path} is a pipeline of the class {name}, whose prompts cannot be embedded here; read are those that have "
                "`encode_prompt`, such as StableDiffusionPipeline and StableDiffusion3Pipeline."
            )
        absent = [part for part, entry in index.items() if isinstance(entry, list) and entry[:1] == [None]]
        left_out: dict[str, Any] = {part: None for part in (*_NOT_NEEDED, *absent) if part in index}
        halves = {
            part: _load_half(path / part, index[part]) for part in _encoders(index) if _weights(path / part).variant
        }
        try:
            self._pipeline = kind.from_pretrained(
                path, use_safetensors=True, local_files_only=True, **left_out, **halves
            )
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"the text encoders of {path} cannot be read ({error}).") from error
        self._pipeline.to(device)
        self._device = device
        network = path / "transformer" / "config.json"
        if network.is_file():
            # Stable Diffusion 3 without its third encoder asks the network how wide the zeros are that stand for it.
            width = json.loads(network.read_text(encoding="utf-8"))
            self._pipeline.__dict__["transformer"] = SimpleNamespace(config=SimpleNamespace(**width))

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

    @property
    def parts(self) -> dict[str, Any]:
        """The pipeline's text encoders and tokenisers by name, those that it has."""
        found = self._pipeline.components
        return {name: part for name, part in found.items() if name.startswith(_PARTS) and part is not None}

    @property
    def longest_text(self) -> int:
        """Tokens of a text that are read, at most: what `encode_prompt` gives the third encoder where there is one, else the first."""
        if "tokenizer_3" in self.parts and "text_encoder_3" in self.parts:
            return int(inspect.signature(self._pipeline.encode_prompt).parameters["max_sequence_length"].default)
        return int(self._pipeline.tokenizer.model_max_length)

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Condition:
        taken = inspect.signature(self._pipeline.encode_prompt).parameters
        options: dict[str, Any] = {
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "device": self._device,
        }
        options |= {"prompt_2": None, "prompt_3": None}
        found = self._pipeline.encode_prompt(
            prompt=list(prompts), **{name: value for name, value in options.items() if name in taken}
        )
        if len(found) == 2:  # Stable Diffusion: tokens, and those of the negative prompt
            return Condition(tokens=found[0].float().cpu())
        if (
            len(found) == 4 and found[2] is not None and found[2].ndim == 2
        ):  # Stable Diffusion 3: with pooled ones, and both again
            return Condition(tokens=found[0].float().cpu(), pooled=found[2].float().cpu())
        raise ConfigError(
            f"`encode_prompt` of {type(self._pipeline).__name__} gives {len(found)} parts, which are not known here; give the "
            "condition in Python (`Candidates`)."
        )


class PipelineTextEncoder(TextEncoder):
    """The text encoders of a pipeline, as an encoder of captions: what its network was trained on, told in the same words.

    Args:
        path: Folder of a pipeline, or of what `copy_texts` has taken from one.
        device: Where to compute.

    Raises:
        ArtifactError: no such folder, or one without text encoders.
        ConfigError: as `PipelineTexts`.
    """

    def __init__(self, path: Path | str, *, device: torch.device | str = "cpu") -> None:
        path = Path(path)
        self._texts = PipelineTexts(path, _index_of(path), device)
        rows = self._texts.null().rows()
        # Rounded as captions are.
        self.null = NullCondition.of({name: row.half().float() for name, row in rows.items()})
        self.token_dim = rows["tokens"].shape[-1]
        self.pooled_dim = rows["pooled"].shape[-1] if "pooled" in rows else 0
        self.max_tokens = self._texts.longest_text

    @property
    def fingerprint(self) -> str:
        facts: list[Any] = [type(self._texts._pipeline).__name__]
        for name, part in sorted(self._texts.parts.items()):
            if name.startswith("text_encoder"):
                facts.append([name, hash_weights(part)])
            else:
                facts.append([name, sorted(part.get_vocab().items()), part("A probe, of 3 words")["input_ids"]])
        return hash_json(facts)

    @property
    def num_parameters(self) -> int:
        return num_parameters([part for part in self._texts.parts.values() if isinstance(part, nn.Module)])

    def lengths(self, texts: Sequence[str]) -> list[int]:
        parts = self._texts.parts
        third = "tokenizer_3" in parts and "text_encoder_3" in parts
        tokenizer = parts["tokenizer_3" if third else "tokenizer"]
        return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]

    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        # diffusers and transformers have warnings of their own for long texts; `embed` has one for all.
        names = (type(self._texts._pipeline).__module__, "transformers.tokenization_utils_base")
        loud = {logger: logger.level for logger in map(logging.getLogger, names)}
        for logger in loud:
            logger.setLevel(logging.ERROR)
        try:
            found = self._texts(texts)
        finally:
            for logger, level in loud.items():
                logger.setLevel(level)
        tokens = found.tokens
        assert tokens is not None
        pooled = torch.zeros(len(texts), 0) if found.pooled is None else found.pooled
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), pooled


def copy_texts(path: Path, target: Path) -> None:
    """Copy the text encoders of a pipeline, its tokenisers and its scheduler into an empty folder; of weights, those that are read.

    Raises:
        ArtifactError: no pipeline, or one without text encoders, or without safetensors of them.
    """
    index = _index_of(path)
    weights = ("*.safetensors", "*.safetensors.index*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
    unwanted = shutil.ignore_patterns(*weights)
    for name, part in index.items():
        if name.startswith((*_PARTS, "scheduler")) and isinstance(part, list) and part[0] is not None:
            shutil.copytree(path / name, target / name, ignore=unwanted)
    for name in _encoders(index):
        found = _weights(path / name)
        for file in (*found.files, *([] if found.index is None else [found.index])):
            shutil.copyfile(file, target / name / file.name)
    network = Path("transformer") / "config.json"
    if (path / network).is_file():
        (target / network).parent.mkdir()
        shutil.copyfile(path / network, target / network)
    (target / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def has_texts(path: Path) -> bool:
    """Whether a folder is that of a pipeline with a text encoder and its tokeniser."""
    return (path / "model_index.json").is_file() and reads_texts(_read_index(path))


def _encoders(index: Mapping[str, Any]) -> list[str]:
    """The names of the text encoders that a pipeline has."""
    return [
        name
        for name, part in index.items()
        if name.startswith("text_encoder") and isinstance(part, list) and part[0] is not None
    ]


def _weights(folder: Path) -> StoredWeights:
    return find_weights(folder, stem="model")


def _load_half(folder: Path, entry: Sequence[str]) -> nn.Module:
    """A text encoder that is there in half precision alone; diffusers has one variant for all parts, where some may be there in full.

    Raises:
        ArtifactError: it cannot be read.
        ConfigError: a class that is not one of transformers.
    """
    library, kind = entry
    if library != "transformers":
        raise ConfigError(
            f"{folder} is a {kind} of {library} in half precision; read are text encoders of transformers. Save it in full precision."
        )
    model: nn.Module = load_part(kind, folder, advice="Copy the pipeline again.", variant=_weights(folder).variant)
    return model.float()


def _index_of(path: Path) -> dict[str, Any]:
    index = _read_index(path)
    if not reads_texts(index):
        raise ArtifactError(
            f"{path}/model_index.json names no `text_encoder` with a `tokenizer`, so that nothing can read captions as the teacher does."
        )
    return index


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is not the folder of a pipeline ({error}); the teacher's own text encoder lies in one, beside its network."
        ) from error
