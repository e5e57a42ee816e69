"""A tokeniser of the user's own captions: byte-level BPE, so that no text is unknown, kept as one JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagoda.errors import ConfigError, DataError, import_extra

PAD, START, END = "<pad>", "<start>", "<end>"
"""Special tokens, in the order of their numbers 0, 1, 2."""
SMALLEST_VOCABULARY = 3 + 256
"""Special tokens and all bytes."""


def train_tokenizer(captions: Sequence[str], *, vocab_size: int, max_tokens: int) -> Any:
    """A `PreTrainedTokenizerFast` of transformers: lower case, `<start> text <end>`, padded on the right.

    Args:
        captions: What the merges are learnt from.
        vocab_size: Tokens at most; captions of few words need fewer.
        max_tokens: Longest text, special tokens included.

    Raises:
        MissingExtraError: transformers, which brings tokenizers, is not installed.
        ConfigError: a vocabulary that cannot hold every byte.
        DataError: no captions.

    Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE).
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size must be at least {SMALLEST_VOCABULARY} (all bytes), got {vocab_size}.")
    if not captions:
        raise DataError("a tokeniser is trained on captions, and there are none.")
    tokenizers = import_extra("tokenizers", "encoders")
    transformers = import_extra("transformers", "encoders")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    numbers = [(token, model.token_to_id(token)) for token in (START, END)]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=numbers)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        padding_side="right",
        model_max_length=max_tokens,
    )
