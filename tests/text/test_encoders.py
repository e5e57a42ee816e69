"""Text encoders of every family: masks, cutting, rounding, fingerprints, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.text.tiny import WORDS

from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.text import TransformersTextEncoder

FAMILIES = ("vit", "convnext", "t5", "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_embedded_alike_alone_and_in_a_batch_of_longer_ones(
    encoder_folders: dict[str, Path], family: str
) -> None:
    encoder = TransformersTextEncoder(encoder_folders[family])
    together, alone = encoder.embed(WORDS, batch_size=3), encoder.embed(WORDS[2:3])
    length = int(alone.mask.sum())
    assert int(together.mask[2].sum()) == length < together.mask.shape[1]
    torch.testing.assert_close(together.tokens[2, :length], alone.tokens[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(together.pooled[2], alone.pooled[0], atol=2e-3, rtol=0)
    assert together.tokens[2, length:].abs().sum() == 0
    assert alone.tokens.shape[-1] == encoder.token_dim
    assert alone.pooled.shape == (1, encoder.pooled_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_half_precision_and_differ_between_texts(
    encoder_folders: dict[str, Path], family: str
) -> None:
    found = TransformersTextEncoder(encoder_folders[family]).embed(WORDS)
    assert torch.equal(found.tokens.half().float(), found.tokens)
    assert torch.equal(found.pooled.half().float(), found.pooled)
    assert len(torch.unique(found.pooled, dim=0)) == len(WORDS)


def test_long_texts_are_cut_with_one_warning_that_counts_them(
    encoder_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TransformersTextEncoder(encoder_folders["t5"], max_tokens=6)
    with caplog.at_level(logging.WARNING):
        found = encoder.embed(["dog", "a dog " * 20, "a tree " * 9])
    assert found.tokens.shape[1] == 6
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "2 of 3 texts are longer than 6 tokens" in warnings[0]


def test_nothing_is_said_where_nothing_is_cut(
    encoder_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        TransformersTextEncoder(encoder_folders["vit"]).embed(WORDS)
    assert not caplog.records


def test_the_models_own_limit_holds_below_the_asked_one(encoder_folders: dict[str, Path]) -> None:
    assert TransformersTextEncoder(encoder_folders["vit"], max_tokens=500).max_tokens == 32


def test_a_sentence_encoder_pools_as_its_own_file_says(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(encoder_folders["bert"], folder)
    mean = TransformersTextEncoder(folder)
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    first = TransformersTextEncoder(folder)
    a, b = mean.embed(WORDS), first.embed(WORDS)
    torch.testing.assert_close(b.pooled, a.tokens[:, 0], atol=2e-3, rtol=0)
    expected = a.tokens.sum(1) / a.mask.sum(1, keepdim=True)
    torch.testing.assert_close(a.pooled, expected, atol=2e-3, rtol=0)
    assert mean.fingerprint != first.fingerprint
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        TransformersTextEncoder(folder)


def test_the_fingerprint_is_of_the_weights_and_the_cut_not_of_the_place(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(encoder_folders["vit"], folder)
    original = TransformersTextEncoder(encoder_folders["vit"]).fingerprint
    assert TransformersTextEncoder(folder).fingerprint == original
    assert TransformersTextEncoder(folder, max_tokens=8).fingerprint != original
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert TransformersTextEncoder(folder).fingerprint != original


def test_a_missing_encoder_is_named_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="two-tower"):
        TransformersTextEncoder(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="no-such/encoder"):
        TransformersTextEncoder("no-such/encoder")


def test_weights_as_a_pickle_are_not_read(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(encoder_folders["bert"], folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="safetensors"):
        TransformersTextEncoder(folder)


def test_empty_texts_are_refused(encoder_folders: dict[str, Path]) -> None:
    encoder = TransformersTextEncoder(encoder_folders["vit"])
    with pytest.raises(DataError, match="1 of 2 texts are empty, first number 1"):
        encoder.embed(["dog", "  "])
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        TransformersTextEncoder(encoder_folders["vit"], max_tokens=1)
