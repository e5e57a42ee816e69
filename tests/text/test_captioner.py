"""Captions from a model: resumable, the old ones kept, and read by a run's source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tests.text.tiny import WORDS

from pagoda.cli.main import main
from pagoda.data import SourceConfig, open_source
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.text import Captioner, caption_source, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image encoder with a text decoder, fresh: its captions are nonsense, and always the same."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("captioner")
    tokenizer = train_tokenizer(WORDS, vocab_size=300, max_tokens=32)
    narrow = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(image_size=16, patch_size=8, **narrow),
        transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **narrow),
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    network = transformers.VisionEncoderDecoderModel(config)
    network.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for index in range(7):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "" if index == 3 else f"old {index}", "label": index % 2})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_image_gets_a_caption_and_keeps_its_old_one(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    assert main(["data", "caption", str(photos), "--model", str(model), "--out", str(out), "--max-tokens", "6"]) == 0
    rows = read(out)
    assert [row["original_text"] for row in rows] == [None if i == 3 else f"old {i}" for i in range(7)]
    assert all(row["text"] and row["text"] != row["original_text"] for row in rows)
    assert [row["label"] for row in rows] == [i % 2 for i in range(7)]
    source = open_source(photos, options=SourceConfig(captions=str(out)))
    assert [source.caption(i) for i in range(7)] == [row["text"] for row in rows]
    assert source.fingerprint != open_source(photos).fingerprint


def test_killed_in_the_middle_of_a_line_it_continues_and_ends_alike(model: Path, photos: Path, tmp_path: Path) -> None:
    source, captioner = open_source(photos), Captioner(model, max_tokens=6)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert caption_source(source, captioner, whole, batch_size=2) == 7
    assert caption_source(source, captioner, whole, batch_size=2) == 0

    def killing(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_source(source, captioner, parts, batch_size=2, progress=killing)
    assert not parts.exists()
    part = tmp_path / "parts.jsonl.part"
    part.write_text(part.read_text() + '{"file_name": "4.p')
    assert caption_source(source, captioner, parts, batch_size=2) == 3
    assert parts.read_text() == whole.read_text()
    assert not part.exists()


def test_only_missing_captions_are_written_when_asked(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled.jsonl"
    assert caption_source(open_source(photos), Captioner(model, max_tokens=6), out, only_missing=True) == 1
    texts = [row["text"] for row in read(out)]
    assert [text for i, text in enumerate(texts) if i != 3] == [f"old {i}" for i in range(7) if i != 3]
    assert texts[3]


def test_a_file_of_another_model_or_prompt_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    caption_source(open_source(photos), Captioner(model, max_tokens=6), out)
    with pytest.raises(ArtifactError, match="another model or with another prompt"):
        caption_source(open_source(photos), Captioner(model, max_tokens=7), out)
    with pytest.raises(ConfigError, match="takes no prompt"):
        Captioner(model, prompt="a photo of")
    with pytest.raises(ArtifactError, match="nothing-here"):
        Captioner(tmp_path / "nothing-here")


def test_a_model_that_writes_nothing_stops_with_the_image(model: Path, photos: Path, tmp_path: Path) -> None:
    class Silent(Captioner):
        def __call__(self, images: Sequence[Image.Image]) -> list[str]:
            return [""] * len(images)

    with pytest.raises(DataError, match=r"wrote nothing about `0.png`"):
        caption_source(open_source(photos), Silent(model), tmp_path / "captions.jsonl")


def test_files_of_captions_that_do_not_fit_are_refused(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    for content, message in (
        ('{"file_name": "other.png", "text": "x"}', "none of which is here"),
        ('{"file_name": "0.png"}', "line 1"),
        ('{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png", "text": "b"}', "more than one caption"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            open_source(photos, options=SourceConfig(captions=str(path)))
    with pytest.raises(DataError, match="cannot be read"):
        open_source(photos, options=SourceConfig(captions=str(tmp_path / "none.jsonl")))
    path.write_text('{"file_name": "0.png", "text": "only this one"}')
    source = open_source(photos, options=SourceConfig(captions=str(path)))
    assert [source.caption(i) for i in range(3)] == ["only this one", None, None]
