"""Text encoders: texts in, a vector for each token and one for the whole text out.

Any text model of transformers will do: CLIP (its projected embedding is the pooled one), T5 and its kin (the mean over
tokens), BERT and sentence encoders (the mean, or the first token where their pooling file says so), and the text tower of a
two-tower encoder that `pagoda` trained on the user's own captions.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError, DataError
from pagoda.evaluation.extractors import hash_weights
from pagoda.files import hash_json
from pagoda.text.embeddings import TextEmbeddings
from pagoda.text.loading import DUAL_KINDS, load_dual, load_part, read_json_part

_ENCODER_ONLY = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_POSITIONS_LOST = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}  # their positions start at padding + 1
_logger = logging.getLogger(__name__)


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

    @abstractmethod
    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text before anything is cut."""

    @abstractmethod
    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D), mask (B, T) bool and pooled (B, P) of a batch, on any device."""

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch_size: int = 64) -> TextEmbeddings:
        """Embed texts, on the CPU. Longer ones than `max_tokens` are cut, with one warning that says how many.

        Raises:
            DataError: no text, an empty one, or embeddings that are not finite in half precision.
        """
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty or not texts:
            raise DataError(
                f"{len(empty)} of {len(texts)} texts are empty, first number {empty[0] if empty else 0}. Give words, or leave the "
                "text out."
            )
        cut = sum(length > self.max_tokens for length in self.lengths(texts))
        if cut:
            _logger.warning(
                "%d of %d texts are longer than %d tokens and are cut there (text.max_tokens, or the encoder's own limit).",
                cut,
                len(texts),
                self.max_tokens,
            )
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


class TransformersTextEncoder(TextEncoder):
    """A text model of transformers.

    Args:
        source: Folder in the Hugging Face layout, or a hub name.
        max_tokens: Cut longer texts here; the model's own limit where that is lower.
        allow_download: Fetch what is not in the hub's cache.
        device: Where to compute.

    Raises:
        MissingExtraError: transformers is not installed.
        ArtifactError: there is no such model or tokeniser here.
        ConfigError: a pooling that is not known, or `max_tokens` below 2.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        max_tokens: int = 64,
        allow_download: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_tokens < 2:
            raise ConfigError(f"text.max_tokens must be at least 2, got {max_tokens}.")
        config = load_part("AutoConfig", source, allow_download=allow_download)
        kind = config.model_type
        self._projection: nn.Module | None = None
        self._first = False
        if kind in DUAL_KINDS:
            model = load_dual(source, allow_download=allow_download)
            self._model, self._projection = model.text_model, model.text_projection
        else:
            wanted = _ENCODER_ONLY.get(kind, "AutoModel")
            self._model = load_part(wanted, source, allow_download=allow_download)
            self._first = _pools_first_token(source, allow_download)
        self._tokenizer = load_part("AutoTokenizer", source, allow_download=allow_download)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # its places are masked, so that any token will do
        self._model.to(device).eval().requires_grad_(False)
        if self._projection is not None:
            self._projection.to(device)
        text = self._model.config
        self.token_dim = int(text.d_model if kind in _ENCODER_ONLY else text.hidden_size)
        self.pooled_dim = self.token_dim if self._projection is None else int(self._projection.out_features)  # type: ignore[arg-type]
        positions = getattr(text, "max_position_embeddings", None)
        own = [] if not positions else [int(positions) - _POSITIONS_LOST.get(text.model_type, 0)]
        self.max_tokens = min(max_tokens, int(self._tokenizer.model_max_length), *own)

    @property
    def fingerprint(self) -> str:
        projection = None if self._projection is None else hash_weights(self._projection)
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        probe = self._tokenizer("A probe, of 3 words")["input_ids"]  # normalisation and special tokens
        facts = [hash_weights(self._model), projection, self._first, self.max_tokens, vocabulary, probe]
        return hash_json(facts)

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
            return_tensors="pt",
        ).to(next(self._model.parameters()).device)
        mask = tokens["attention_mask"]
        output: Any = self._model(input_ids=tokens["input_ids"], attention_mask=mask)
        hidden = output.last_hidden_state
        if self._projection is not None:
            pooled = self._projection(output.pooler_output)
        elif self._first:
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return hidden, mask.bool(), pooled


def _pools_first_token(source: Path | str, allow_download: bool) -> bool:
    """Whether a sentence encoder's own pooling file asks for the first token; the mean is what is done otherwise.

    Raises:
        ConfigError: it asks for something else.
    """
    pooling = read_json_part(source, "1_Pooling/config.json", allow_download=allow_download)
    asked = [name for name, value in (pooling or {}).items() if name.startswith("pooling_mode_") and value]
    unknown = [name for name in asked if name not in ("pooling_mode_cls_token", "pooling_mode_mean_tokens")]
    if unknown or len(asked) > 1:
        raise ConfigError(
            f"`{source}` pools by {', '.join(asked)}; accepted are pooling_mode_mean_tokens and pooling_mode_cls_token, one of them."
        )
    return asked == ["pooling_mode_cls_token"]
