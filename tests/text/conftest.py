"""Tiny encoders that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tests.text.tiny import WORDS, tiny_towers

from pagoda.data import Downsampler, ImageDataset, open_source, prepare_images
from pagoda.text.tokenizer import train_tokenizer
from pagoda.text.two_tower import new_two_tower, save_two_tower


@pytest.fixture(scope="session")
def shapes() -> ImageDataset:
    """Forty captioned shapes."""
    return prepare_images(
        open_source("shapes:count=40"), sizes=(16,), downsampler=Downsampler(), cache_dir=None, progress=False
    )


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each family, in the Hugging Face layout."""
    torch.manual_seed(0)
    folders = {}
    for name in ("vit", "convnext"):
        folders[name] = tmp_path_factory.mktemp(name)
        model, tokenizer = new_two_tower(tiny_towers(vision=name), WORDS)
        save_two_tower(folders[name], model, tokenizer)
    size = len(tokenizer)
    t5 = transformers.T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    bert = transformers.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    narrow = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    siglip = transformers.SiglipConfig(
        text_config={**narrow, "vocab_size": size, "max_position_embeddings": 40, "projection_size": 20},
        vision_config={**narrow, "image_size": 16, "patch_size": 8},
    )
    models = (
        ("t5", t5, transformers.T5EncoderModel),
        ("bert", bert, transformers.BertModel),
        ("siglip", siglip, transformers.SiglipModel),
    )
    for name, config, kind in models:
        folders[name] = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(folders[name])
        train_tokenizer(WORDS, vocab_size=400, max_tokens=48).save_pretrained(folders[name])
    return folders
