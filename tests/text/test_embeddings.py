"""The table of captions: each different one once, read back bit for bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagoda.errors import ArtifactError, DataError
from pagoda.text import CaptionTable, TransformersTextEncoder, unique_captions

CAPTIONS = ["a red heart", "dog", "a red heart", "a green tree in the rain"]
NAMES = ["0.png", "1.png", "2.png", "3.png"]


@pytest.fixture(scope="module")
def table(encoder_folders: dict[str, Path]) -> CaptionTable:
    encoder = TransformersTextEncoder(encoder_folders["vit"])
    texts, rows = unique_captions(CAPTIONS, NAMES)
    return CaptionTable(texts, rows, encoder.embed(texts), encoder.fingerprint)


def test_each_caption_is_kept_once_and_every_image_finds_its_own(table: CaptionTable) -> None:
    assert table.texts == ["a red heart", "dog", "a green tree in the rain"]
    assert table.captions(torch.tensor([3, 0, 2])) == [CAPTIONS[i] for i in (3, 0, 2)]
    condition = table.condition(torch.tensor([0, 2, 1]))
    assert condition.tokens is not None
    assert condition.tokens_mask is not None
    assert condition.pooled is not None
    assert torch.equal(condition.tokens[0], condition.tokens[1])
    assert not torch.equal(condition.pooled[0], condition.pooled[2])
    assert condition.tokens.shape == (3, table.embeddings.tokens.shape[1], table.token_dim)


def test_a_table_is_read_back_bit_for_bit_and_its_padding_is_not_stored(table: CaptionTable, tmp_path: Path) -> None:
    table.save(tmp_path / "captions.safetensors")
    again = CaptionTable.load(tmp_path / "captions.safetensors")
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(again.embeddings, name), getattr(table.embeddings, name))
    assert again.texts == table.texts
    assert torch.equal(again.rows, table.rows)
    assert again.fingerprint == table.fingerprint
    assert again.encoder == table.encoder
    stored = load_file(tmp_path / "captions.safetensors")["tokens"]
    assert len(stored) == int(table.embeddings.mask.sum())
    assert stored.dtype == torch.float16


def test_a_table_that_was_changed_or_is_foreign_is_refused(table: CaptionTable, tmp_path: Path) -> None:
    path = tmp_path / "captions.safetensors"
    table.save(path)
    tensors = load_file(path)
    with pytest.raises(ArtifactError, match="holds no embedded captions"):
        save_file(tensors, path)
        CaptionTable.load(path)
    table.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "pooled": tensors["pooled"] + 1}, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="not those that were written"):
        CaptionTable.load(path)


def test_a_sample_without_its_caption_carries_nulls(table: CaptionTable) -> None:
    condition = table.condition(torch.tensor([0, 1])).drop_rows(torch.tensor([True, False]))
    assert condition.tokens is not None
    assert condition.tokens_mask is not None
    assert condition.pooled is not None
    assert condition.tokens[0].abs().sum() == 0
    assert not condition.tokens_mask[0].any()
    assert condition.pooled[0].abs().sum() == 0
    assert condition.pooled[1].abs().sum() > 0


def test_missing_and_empty_captions_are_counted_and_the_first_is_named() -> None:
    with pytest.raises(DataError, match=r"2 of 4 images have no caption, or an empty one, first `1.png`"):
        unique_captions(["a", None, " ", "b"], NAMES)
    with pytest.raises(DataError, match=r"4 of 4 images have no caption"):
        unique_captions(None, NAMES)
