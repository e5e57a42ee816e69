"""Text encoders: texts in, a vector for each token and one for the whole text out.

Any text model of transformers will do: CLIP (its projected embedding is the pooled one), SigLIP (its own head's), T5 and its
kin (the mean over tokens), BERT and sentence encoders (what their own files ask for, the mean otherwise), the text tower of a
model of several parts, and that of a two-tower encoder that `pagoda` trained on the user's own captions.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import ConfigError, DataError
from pagoda.evaluation.extractors import hash_weights
from pagoda.files import hash_json
from pagoda.networks import num_parameters
from pagoda.text.embeddings import TextEmbeddings
from pagoda.text.loading import DUAL_KINDS, ENCODER_ADVICE, load_dual, load_part
from pagoda.text.sentences import open_sentence_head

_ENCODER_ONLY = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_LAST_POSITION = ("siglip", "siglip2")
"""They pool the last position of a text that is padded to all positions, and attend to the padding."""
_POSITIONS_LOST = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}  # their positions start at padding + 1
_logger = logging.getLogger(__name__)
_told: dict[str, set[str]] = {}
"""By the fingerprint of an encoder, the texts that are known to be cut: stages of a run embed the same captions again."""


class TextEncoder(ABC):
    """Texts -> `TextEmbeddings`. Frozen.

    A subclass gives `lengths` and `_embed`; cutting, warning, batches and rounding are done here.
    """

    token_dim: int
    """Width of a token's vector."""
    pooled_dim: int
    """Width of the vector of a whole text; 0 for an encoder that gives none."""
    max_tokens: int
    """Longer texts are cut here, special tokens included."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal characters over weights, tokeniser, pooling and `max_tokens`: embeddings are kept under it."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Of all its networks."""

    @abstractmethod
    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text before anything is cut."""

    @abstractmethod
    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D), mask (B, T) bool and pooled (B, P) of a batch, on any device."""

    @torch.no_grad()
    def embed(
        self, texts: Sequence[str], *, images: Sequence[int] | None = None, batch_size: int = 64
    ) -> TextEmbeddings:
        """Embed texts, on the CPU. Longer ones than `max_tokens` are cut, with one warning a process that says how many.

        Args:
            images: How many images have each text, where the texts are captions: the warning then counts images.

        Raises:
            DataError: no text, an empty one, or embeddings that are not finite in half precision.
        """
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty or not texts:
            raise DataError(
                f"{len(empty)} of {len(texts)} texts are empty, first number {empty[0] if empty else 0}. Give words, or leave the "
                "text out."
            )
        cut = [index for index, length in enumerate(self.lengths(texts)) if length > self.max_tokens]
        if cut:
            self._tell_of_cuts(texts, cut, images)
        parts = [self._embed(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
        longest = max(int(mask.sum(1).max()) for _, mask, _ in parts)
        tokens, mask = torch.zeros(len(texts), longest, self.token_dim), torch.zeros(len(texts), longest).bool()
        for start, (found, kept, _) in zip(range(0, len(texts), batch_size), parts, strict=True):
            rows, width = slice(start, start + len(found)), min(longest, found.shape[1])
            mask[rows, :width] = kept[:, :width].cpu()
            rounded = found[:, :width].float().cpu().half().float()
            tokens[rows, :width] = rounded.masked_fill(~mask[rows, :width, None], 0.0)
        pooled = torch.cat([part.float().cpu() for _, _, part in parts]).half().float()
        if not (tokens.isfinite().all() and pooled.isfinite().all()):
            raise DataError("the encoder's embeddings do not fit into half precision; use another encoder.")
        return TextEmbeddings(tokens, mask, pooled)

    def _tell_of_cuts(self, texts: Sequence[str], cut: list[int], images: Sequence[int] | None) -> None:
        """Warn of texts that are cut, unless all of them are known."""
        known = _told.setdefault(self.fingerprint, set())
        fresh = {texts[index] for index in cut} - known
        if not fresh:
            return
        known |= fresh
        if images is None:
            counted = f"{len(cut):,} of {len(texts):,} texts are"
        else:
            counted = f"{sum(images[index] for index in cut):,} of {sum(images):,} images have captions that are"
        _logger.warning(
            "%s longer than %d tokens and are cut there (text.max_tokens, or the encoder's own limit).",
            counted,
            self.max_tokens,
        )


class TransformersTextEncoder(TextEncoder):
    """A text model of transformers.

    Args:
        source: Folder in the Hugging Face layout, or a hub name.
        max_tokens: Cut longer texts here; the model's own limit where that is lower.
        allow_download: Fetch what is not in the hub's cache.
        device: Where to compute.
        advice: The next step where there is no such model, for the error.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there is no such model or tokeniser here.
        ConfigError: a model that reads no texts, modules of a sentence encoder that are not known, or `max_tokens` below 2.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        max_tokens: int = 64,
        allow_download: bool = False,
        device: torch.device | str = "cpu",
        advice: str = ENCODER_ADVICE,
    ) -> None:
        if max_tokens < 2:
            raise ConfigError(f"text.max_tokens must be at least 2, got {max_tokens}.")
        config = load_part("AutoConfig", source, advice=advice, allow_download=allow_download)
        kind = config.model_type
        self._projection: nn.Module | None = None
        self._first, self._dense = False, nn.Sequential()
        self._own_pooling = kind in _LAST_POSITION
        if kind in DUAL_KINDS:
            model = load_dual(source, advice=advice, allow_download=allow_download)
            self._model, self._projection = model.text_model, model.text_projection
        else:
            wanted = _ENCODER_ONLY.get(kind, "AutoModel")
            model = load_part(wanted, source, advice=advice, allow_download=allow_download)
            towers = getattr(config, "text_config", None) is not None
            self._model = getattr(model, "text_model", model) if towers else model
            self._first, self._dense = open_sentence_head(source, allow_download=allow_download)
        text = self._model.config.get_text_config()
        self.token_dim = self.pooled_dim = _width(text, kind, source)
        self._tokenizer = load_part("AutoTokenizer", source, advice=advice, allow_download=allow_download)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # its places are masked, so that any token will do
        self._model.to(device).eval().requires_grad_(False)
        self._dense.to(device).eval().requires_grad_(False)
        if self._projection is not None:
            self._projection.to(device)
        if self._projection is not None:
            self.pooled_dim = int(self._projection.out_features)  # type: ignore[arg-type]
        elif self._own_pooling:
            self.pooled_dim = int(text.projection_size)
        elif len(self._dense):
            self.pooled_dim = cast(nn.Linear, self._dense[-2]).out_features
        positions = getattr(text, "max_position_embeddings", None)
        own = [] if not positions else [int(positions) - _POSITIONS_LOST.get(text.model_type, 0)]
        self._padded_to = int(positions or 0)
        self.max_tokens = min(max_tokens, int(self._tokenizer.model_max_length), *own)

    @property
    def num_parameters(self) -> int:
        projection = [] if self._projection is None else [self._projection]
        return num_parameters([self._model, self._dense, *projection])

    @property
    def fingerprint(self) -> str:
        projection = None if self._projection is None else hash_weights(self._projection)
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        probe = self._tokenizer("A probe, of 3 words")["input_ids"]  # normalisation and special tokens
        facts = [hash_weights(self._model), projection, self._first, self.max_tokens, vocabulary, probe]
        return hash_json([*facts, hash_weights(self._dense), str(self._dense)] if len(self._dense) else facts)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        # `verbose=False`: the tokeniser has a warning of its own for each long text.
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]

    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        ).to(next(self._model.parameters()).device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if self._own_pooling:
            missing = (0, self._padded_to - ids.shape[1])
            output: Any = self._model(input_ids=F.pad(ids, missing, value=self._tokenizer.pad_token_id))
            return output.last_hidden_state, F.pad(mask, missing).bool(), output.pooler_output
        output = self._model(input_ids=ids, attention_mask=mask)
        hidden = output.last_hidden_state
        if self._projection is not None:
            pooled = self._projection(output.pooler_output)
        elif self._first:
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return hidden, mask.bool(), self._dense(pooled)


def _width(config: Any, kind: str, source: Path | str) -> int:
    """Width of the vectors of tokens, by the configuration of a text model.

    Raises:
        ConfigError: it tells of none.
    """
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ConfigError(
            f"`{source}` holds a {kind}, which is no text model: neither its configuration nor a text_config in it tells a hidden_size. "
            "Give a CLIP, SigLIP, T5, BERT or sentence encoder, or `two-tower`."
        )
    return int(width)
