"""A tiny CLIP in the Hugging Face layout, with a tokenizer that reads single letters; made offline."""

from __future__ import annotations

from pathlib import Path

import torch

END = "</w>"


def save_tiny_clip(folder: Path, *, seed: int = 0, length: int = 24) -> Path:
    """Write model and tokenizer into `folder`; texts are read up to `length` tokens, two of them for begin and end."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + END for letter in letters)]
    torch.manual_seed(seed)
    both = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={
            **both,
            "vocab_size": len(tokens),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "max_position_embeddings": length,
        },
        vision_config={**both, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder
