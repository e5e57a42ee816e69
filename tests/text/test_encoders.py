"""Text encoders of every family: masks, cutting, rounding, fingerprints, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.text.tiny import WORDS

from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.text import TransformersTextEncoder

FAMILIES = ("vit", "convnext", "t5", "bert", "siglip")


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
    pooling.write_text(json.dumps({"pooling_mode": "cls"}))  # how newer versions write it
    assert TransformersTextEncoder(folder).fingerprint == first.fingerprint
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        TransformersTextEncoder(folder)


def test_siglip_pools_the_last_of_all_its_positions_as_it_was_trained(encoder_folders: dict[str, Path]) -> None:
    folder = encoder_folders["siglip"]
    tower = transformers.SiglipModel.from_pretrained(folder).text_model.eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        WORDS, padding="max_length", max_length=40, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        expected = tower(input_ids=ids)
    encoder = TransformersTextEncoder(folder, max_tokens=32)
    found = encoder.embed(WORDS)
    torch.testing.assert_close(found.pooled, expected.pooler_output, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.tokens[0, :5], expected.last_hidden_state[0, :5], atol=2e-3, rtol=0)
    assert (encoder.token_dim, encoder.pooled_dim) == (32, 20)


def test_a_model_of_images_alone_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    transformers.ConvNextModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a convnext, which is no text model.*two-tower"):
        TransformersTextEncoder(tmp_path)


def save_sentence_encoder(bert: Path, folder: Path, *kinds: str) -> None:
    """The files of sentence-transformers around a BERT; a Dense has random weights, safetensors and a Tanh."""
    shutil.copytree(bert, folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, kind in enumerate(kinds, start=1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": f"{index}", "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    if "Dense" in kinds:
        activation = "torch.nn.modules.activation.Tanh"
        facts = {"in_features": 32, "out_features": 12, "bias": True, "activation_function": activation}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(facts))
        draws = torch.Generator().manual_seed(0)
        weights = {
            "linear.weight": torch.randn(12, 32, generator=draws),
            "linear.bias": torch.randn(12, generator=draws),
        }
        save_file(weights, folder / "2_Dense" / "model.safetensors")


def test_the_dense_layer_of_a_sentence_encoder_is_applied(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    plain = TransformersTextEncoder(encoder_folders["bert"])
    save_sentence_encoder(encoder_folders["bert"], tmp_path / "plain", "Pooling", "Normalize")
    assert TransformersTextEncoder(tmp_path / "plain").fingerprint == plain.fingerprint
    save_sentence_encoder(encoder_folders["bert"], tmp_path / "dense", "Pooling", "Dense", "Normalize")
    dense = TransformersTextEncoder(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "2_Dense" / "model.safetensors")
    a, b = plain.embed(WORDS), dense.embed(WORDS)
    expected = torch.tanh(a.pooled @ weights["linear.weight"].T + weights["linear.bias"])
    torch.testing.assert_close(b.pooled, expected, atol=5e-3, rtol=0)
    assert torch.equal(a.tokens, b.tokens)
    assert b.pooled.shape[1] == dense.pooled_dim == 12
    assert dense.fingerprint != plain.fingerprint


def test_modules_that_cannot_be_applied_are_named_with_the_next_step(
    encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    save_sentence_encoder(encoder_folders["bert"], tmp_path / "cnn", "Pooling", "CNN")
    with pytest.raises(ConfigError, match=r"a module CNN; accepted are a Transformer"):
        TransformersTextEncoder(tmp_path / "cnn")
    save_sentence_encoder(encoder_folders["bert"], tmp_path / "dense", "Pooling", "Dense")
    dense = tmp_path / "dense" / "2_Dense"
    facts = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**facts, "activation_function": "somewhere.Odd"}))
    with pytest.raises(ConfigError, match="ends with Odd; accepted are Identity"):
        TransformersTextEncoder(tmp_path / "dense")
    (dense / "config.json").write_text(json.dumps({**facts, "in_features": 16}))
    with pytest.raises(ArtifactError, match=r"2_Dense.*is not the one.*size mismatch"):
        TransformersTextEncoder(tmp_path / "dense")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"no model.safetensors, and pickles are not read"):
        TransformersTextEncoder(tmp_path / "dense")


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
