"""Captions from an image-to-text model of transformers: every image of a set, resumable, the old captions kept.

Source: recaptioned data as in Kim et al. 2024, PaGoDA, arXiv:2405.14822, where LLaVA wrote the captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pagoda.data import ImageSource
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.evaluation.extractors import hash_weights
from pagoda.files import hash_json, write_text_atomic
from pagoda.text.loading import load_part

_ADVICE = (
    "Give a folder in the Hugging Face layout with safetensors in it, of a BLIP, GIT, LLaVA or an image encoder with a text decoder; a "
    "hub name needs `--allow-download` (allow_download=True in Python)."
)


class Captioner:
    """A model that writes a text for an image: BLIP, GIT, LLaVA and their kin, or an image encoder with a text decoder.

    Args:
        source: Folder in the Hugging Face layout, or a hub name.
        prompt: What the model is asked, or what its text begins with; "" for the model's own way.
        max_tokens: New tokens at most.
        allow_download: Fetch what is not in the hub's cache.
        device: Where to compute.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there is no such model here, or none that writes about images.
        ConfigError: `max_tokens` below 1, or a prompt for a model that takes none.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        prompt: str = "",
        max_tokens: int = 40,
        allow_download: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}.")
        kind = load_part("AutoConfig", source, advice=_ADVICE, allow_download=allow_download).model_type
        pair = kind == "vision-encoder-decoder"
        if pair and prompt:
            raise ConfigError(
                f"`{source}` is an image encoder with a text decoder, which takes no prompt; leave it out."
            )
        wanted = "VisionEncoderDecoderModel" if pair else "AutoModelForImageTextToText"
        self._model = load_part(wanted, source, advice=_ADVICE, allow_download=allow_download)
        self._model.to(device).eval().requires_grad_(False)
        self._processor = load_part(
            "AutoImageProcessor" if pair else "AutoProcessor", source, advice=_ADVICE, allow_download=allow_download
        )
        self._tokenizer = load_part("AutoTokenizer", source, advice=_ADVICE, allow_download=allow_download)
        self._ends_prompt = kind == "git"
        self._chats = bool(getattr(self._processor, "chat_template", None))
        if self._chats and not prompt:
            prompt = "Describe this image in one short sentence."
        self.prompt, self.max_tokens = prompt, max_tokens

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal characters over the weights, the prompt and the length."""
        return hash_json([hash_weights(self._model), self.prompt, self.max_tokens])

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One text an image, greedily chosen: the same image has the same text."""
        arguments: dict[str, Any] = {"images": [image.convert("RGB") for image in images], "return_tensors": "pt"}
        if self._chats:
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]
            asked = self._processor.apply_chat_template(turn, add_generation_prompt=True)
            arguments |= {"text": [asked] * len(images), "padding": True}
        elif self.prompt:
            arguments |= {"text": [self.prompt] * len(images), "padding": True}
        inputs = self._processor(**arguments).to(next(self._model.parameters()).device)
        if (
            self.prompt and self._ends_prompt
        ):  # GIT's tokeniser ends the prompt as if it were a whole caption: take that off
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        written = self._model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        # A chat's answer follows its question in the output; other models give their text alone.
        skip = inputs["input_ids"].shape[1] if self._chats and not self._model.config.is_encoder_decoder else 0
        texts = self._tokenizer.batch_decode(written[:, skip:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def caption_source(
    source: ImageSource,
    captioner: Captioner,
    out: Path,
    *,
    only_missing: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a caption of every image to a JSON-lines file; killed and run again it continues.

    Each line holds the image's own metadata with the new `text`, and the old caption as `original_text`. The file is read by
    `source.captions`, and is a `metadata.jsonl` as well.

    Args:
        out: The file; it appears when it is whole, `<out>.part` grows meanwhile.
        only_missing: Keep captions that are there.
        batch_size: Images at once.
        progress: Called with images done and images in all.

    Returns:
        How many captions the model wrote.

    Raises:
        ArtifactError: the file, or its part, is of other images or another model.
        DataError: an image cannot be read, or the model wrote nothing about it.
        ConfigError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    made_by = hash_json([source.fingerprint, captioner.fingerprint, only_missing])
    if out.is_file():
        _read_rows(out, made_by, torn=False)
        return 0
    part = out.with_name(f"{out.name}.part")
    rows = _read_rows(part, made_by, torn=True) if part.is_file() else []
    part.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(part, "".join(_line(row) for row in rows))  # without a line that was torn
    total, written = len(source), 0
    with part.open("a", encoding="utf-8") as file:
        while len(rows) < total:
            batch = list(range(len(rows), min(total, len(rows) + batch_size)))
            wanted = [i for i in batch if not (only_missing and source.caption(i))]
            texts = dict(zip(wanted, captioner([source.image(i) for i in wanted]) if wanted else [], strict=True))
            for index in batch:
                text = texts.get(index, source.caption(index))
                if not text:
                    raise DataError(
                        f"the model wrote nothing about `{source.sample_id(index)}`; try another --prompt or another model."
                    )
                row = {**source.metadata(index), "file_name": source.sample_id(index), "text": text}
                row |= {"original_text": source.caption(index), "captioned_by": made_by}
                rows.append(row)
                file.write(_line(row))
            file.flush()
            written += len(wanted)
            progress(len(rows), total)
    part.replace(out)
    return written


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _read_rows(path: Path, made_by: str, *, torn: bool) -> list[dict[str, Any]]:
    """Rows of a file of this function's own; with `torn`, a last line that was cut short is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if torn and number == len(lines) - 1 and not line.endswith("\n"):
            break
        try:
            rows.append(dict(json.loads(line)))
        except ValueError as error:
            raise ArtifactError(f"line {number + 1} of `{path}` cannot be read ({error}). Delete the file.") from error
    if any(row.get("captioned_by") != made_by for row in rows):
        raise ArtifactError(
            f"`{path}` holds captions of other images, of another model or with another prompt; choose another --out, or delete it."
        )
    return rows
