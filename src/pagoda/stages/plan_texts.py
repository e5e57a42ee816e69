"""What the texts of a run take before its first image: training an encoder of one's own, and embedding every caption once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pagoda.data import ImageSource
from pagoda.errors import DataError
from pagoda.networks import MultiplyAdds
from pagoda.stages.captions import encoder_folder, open_encoder
from pagoda.stages.plan_probe import Prober, StageProbe
from pagoda.stages.plan_standin import ROWS, stand_in
from pagoda.text import TEACHERS, TWO_TOWER, CaptionTable, contrastive_objective, save_two_tower, unique_captions

_HALF, _FLOAT = 2, 4
"""Bytes of a number on disk and in memory."""


@dataclass(frozen=True)
class TextProbe:
    """The stage `text`, and the captions that the others are probed with.

    Attributes:
        table: Captions of the stand-in's images: the longest of the data, since all are padded to the longest.
        count: Different captions of the data.
        parameters: Of the encoder.
        multiply_adds: Of one caption.
        seconds: Of embedding all captions; 0 where nothing was timed.
        disk_bytes: Of the embedded captions, and of an encoder that is copied from a teacher.
        table_bytes: Memory of the embedded captions, which every stage holds.
        training: Of the run's own encoder; None where it comes from elsewhere.
    """

    table: CaptionTable
    count: int
    parameters: int
    multiply_adds: int
    seconds: float
    disk_bytes: int
    table_bytes: int
    training: StageProbe | None


def captions_of(source: ImageSource) -> list[str]:
    """The different captions of a data set, the longest first.

    Raises:
        DataError: images without captions.
    """
    rows = range(len(source))
    texts, _ = unique_captions([source.caption(row) for row in rows], [source.sample_id(row) for row in rows])
    return sorted(texts, key=len, reverse=True)


def probe_texts(prober: Prober, texts: list[str]) -> TextProbe:
    """Train a few steps of the run's own encoder, if it has one, and embed the longest captions.

    Args:
        texts: As `captions_of` gives them.

    Raises:
        ArtifactError: the encoder is missing.
        DataError: there is no caption.
    """
    if not texts:
        raise DataError("there are no captions; a run with condition=text needs some.")
    context, config = prober.context, prober.context.config
    training = _probe_training(prober, texts) if config.text.encoder == TWO_TOWER else None
    encoder = open_encoder(context.run, config, device=prober.runtime.device)
    shown = texts[:ROWS]
    with MultiplyAdds() as counter:
        encoder.embed(shown[:1])
    embeddings = encoder.embed(shown)
    seconds = 0.0
    if prober.budget > 0:
        started = time.perf_counter()
        encoder.embed(shown)
        seconds = (time.perf_counter() - started) / len(shown) * len(texts)
    rows = torch.arange(len(context.data)) % len(shown)
    table = CaptionTable(shown, rows, embeddings, encoder.fingerprint)
    kept = sum(min(length, encoder.max_tokens) for length in encoder.lengths(texts))
    width, whole = embeddings.tokens.shape[1:], embeddings.pooled.shape[1]
    copied = _FLOAT * encoder.num_parameters if training is None and config.text.encoder == TEACHERS else 0
    return TextProbe(
        table=table,
        count=len(texts),
        parameters=encoder.num_parameters,
        multiply_adds=counter.total,
        seconds=seconds,
        disk_bytes=_HALF * (kept * table.token_dim + len(texts) * whole) + copied,
        table_bytes=_FLOAT * len(texts) * (width.numel() + whole),
        training=training,
    )


def _probe_training(prober: Prober, texts: list[str]) -> StageProbe:
    """Also writes the encoder, barely trained, into the folder of the stand-in: other stages read it there."""
    config, runtime, codec = prober.context.config, prober.runtime, prober.codec
    factor = 1 if codec is None else codec.factor
    # Pictures, also in a run on latents.
    context = stand_in(
        config,
        prober.source,
        prober.folder / "texts",
        runtime,
        sizes=[size * factor for size in config.sizes],
        captions=texts[:ROWS],
    )
    settings, data = config.text.two_tower, context.data
    rows = torch.arange(len(data)) % min(len(texts), ROWS)
    objective, tokenizer, _ = contrastive_objective(
        data, settings, texts, rows, seed=config.seed, mirror=config.mirror, runtime=runtime
    )
    steps = settings.loop.steps
    probe = prober.stage(context, objective, settings.loop, [objective.model], ((steps, steps // 2),))
    save_two_tower(encoder_folder(prober.context.run), objective.model.eval(), tokenizer)
    return probe
