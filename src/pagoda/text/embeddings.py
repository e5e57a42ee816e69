"""Texts as a network reads them, and the file that keeps those of a whole data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, DataError, ShapeError
from pagoda.files import hash_json, load_tensors, save_tensors


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of N texts, rounded to half precision: what is kept on disk equals what is computed anew.

    Attributes:
        tokens: (N, T, D) float32; zeros after the end of a text.
        mask: (N, T) bool; True where there is a token.
        pooled: (N, P) float32, one vector a text; P = 0 where the encoder gives none.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2] or len(self.pooled) != len(self.tokens):
            raise ShapeError(
                f"embeddings need tokens (N, T, D), mask (N, T) and pooled (N, P), got {tuple(self.tokens.shape)}, "
                f"{tuple(self.mask.shape)} and {tuple(self.pooled.shape)}."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def condition(self, rows: Tensor | None = None) -> Condition:
        """The condition of some of the texts, or of all of them."""
        chosen = slice(None) if rows is None else rows
        pooled = self.pooled[chosen] if self.pooled.shape[1] else None
        return Condition(tokens=self.tokens[chosen], tokens_mask=self.mask[chosen], pooled=pooled)


class CaptionTable:
    """The captions of a data set and their embeddings, each different caption once.

    Args:
        texts: The different captions.
        rows: (N,) int64: which of them belongs to each image.
        embeddings: One row a caption in `texts`.
        encoder: Fingerprint of the encoder that made them.
    """

    def __init__(self, texts: Sequence[str], rows: Tensor, embeddings: TextEmbeddings, encoder: str) -> None:
        if len(texts) != len(embeddings):
            raise ShapeError(f"{len(texts)} captions have {len(embeddings)} embeddings; they must agree.")
        self.texts = list(texts)
        self.rows = rows
        self.embeddings = embeddings
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.rows)

    def condition(self, indices: Tensor) -> Condition:
        """What images are conditioned on: tokens (B, T, D), their mask, and pooled embeddings (B, P) where there are any."""
        return self.embeddings.condition(self.rows[indices])

    def captions(self, indices: Tensor) -> list[str]:
        """The captions of images."""
        return [self.texts[row] for row in self.rows[indices].tolist()]

    @property
    def token_dim(self) -> int:
        """Width of a token."""
        return self.embeddings.tokens.shape[-1]

    @property
    def pooled_dim(self) -> int:
        """Width of a pooled embedding; 0 where there are none."""
        return self.embeddings.pooled.shape[-1]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal characters over the captions, which image has which, and the embeddings themselves."""
        digest = hashlib.sha256()
        for part in (self.rows, self.embeddings.tokens, self.embeddings.mask, self.embeddings.pooled):
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return hash_json([self.texts, self.encoder, digest.hexdigest()])

    def save(self, path: Path) -> None:
        """Write the table as safetensors. Only tokens that are there are stored, in half precision."""
        kept = self.embeddings
        save_tensors(
            path,
            {
                "rows": self.rows,
                "lengths": kept.mask.sum(1),
                "tokens": kept.tokens[kept.mask].half(),
                "pooled": kept.pooled.half(),
            },
            metadata={"encoder": self.encoder, "texts": json.dumps(self.texts), "fingerprint": self.fingerprint},
        )

    @classmethod
    def load(cls, path: Path) -> CaptionTable:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, truncated, foreign, or not what was written.
        """
        tensors, metadata = load_tensors(path)
        try:
            texts, encoder = json.loads(metadata["texts"]), metadata["encoder"]
            lengths, flat = tensors["lengths"], tensors["tokens"].float()
            mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (N, T)
            tokens = torch.zeros(*mask.shape, flat.shape[-1])
            tokens[mask] = flat
            embeddings = TextEmbeddings(tokens, mask, tensors["pooled"].float())
            table = cls(texts, tensors["rows"], embeddings, encoder)
        except (KeyError, ValueError, RuntimeError) as error:  # ShapeError is a ValueError
            raise ArtifactError(
                f"`{path}` holds no embedded captions ({error}). Delete it and run the same command again."
            ) from error
        if table.fingerprint != metadata.get("fingerprint"):
            raise ArtifactError(
                f"the captions in `{path}` are not those that were written. Delete it and run the same command again."
            )
        return table


def unique_captions(captions: Sequence[str | None] | None, names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The different captions in the order of their first image, and (N,) int64: which one each image has.

    Args:
        captions: One per image; None where there are none at all.
        names: Of the images, for messages.

    Raises:
        DataError: an image has no caption; how many, and the first one's name.
    """
    found = list(captions) if captions is not None else [None] * len(names)
    missing = [name for name, caption in zip(names, found, strict=True) if not (caption or "").strip()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images have no caption, or an empty one, first `{missing[0]}`; a run with "
            "condition=text needs one for each. Write them in the `text` column of the metadata, name another "
            "source.caption_column, make them with `pagoda data caption`, or train with condition=label."
        )
    order: dict[str, int] = {}
    rows = [order.setdefault(str(caption), len(order)) for caption in found]
    return list(order), torch.tensor(rows, dtype=torch.int64)
