"""Before stage 1, `text`: the run's own encoder where it trains one or has one from its teacher, and every caption embedded once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pagoda.stages.captions import STAGE, captions_file, encoder_folder, open_encoder
from pagoda.stages.config import RunConfig, to_dict
from pagoda.stages.context import StageContext
from pagoda.stages.pipeline_texts import copy_texts
from pagoda.text import TEACHERS, TWO_TOWER, CaptionTable, train_two_tower, unique_captions


def text_settings(config: RunConfig) -> dict[str, Any]:
    """What decides the embeddings, apart from the encoder's own weights, which are an input of the stage."""
    own = config.text.encoder == TWO_TOWER
    settings: dict[str, Any] = {"max_tokens": config.text.max_tokens, "own": own}
    if own:
        settings |= {"seed": config.seed, "mirror": config.mirror, "two_tower": to_dict(config.text.two_tower)}
    return settings


def embed_text(context: StageContext) -> None:
    """Fill `text/`: train the two-tower encoder where the run has one of its own, then embed the captions.

    Raises:
        DataError: images without captions.
        ArtifactError: the encoder is missing, or the stage was started with another one.
    """
    run, config, runtime, data = context.run, context.config, context.runtime, context.data
    settings = text_settings(config)
    texts, rows = unique_captions(data.captions, data.sample_ids)
    inputs = {"data": data.fingerprint}
    facts: dict[str, Any] = {}
    own = settings["own"]
    if not own:  # opened first: a missing encoder is known before anything is written
        encoder = open_encoder(run, config, device=runtime.device)
        inputs["encoder"] = encoder.fingerprint
    run.begin(STAGE, settings, inputs, write=runtime.is_main)
    if run.is_done(STAGE):
        context.say("text: done already")
        return
    started = time.monotonic()
    if own:
        facts = train_two_tower(
            data,
            config.text.two_tower,
            encoder_folder(run),
            seed=config.seed,
            mirror=config.mirror,
            runtime=runtime,
            work=run.work(STAGE),
            log=context.log(STAGE),
            status=context.status(),
        )
        encoder = open_encoder(run, config, device=runtime.device)
    if runtime.is_main:
        if config.text.encoder == TEACHERS and not encoder_folder(run).is_dir():
            with run.artifact(encoder_folder(run)) as folder:
                copy_texts(Path(config.teacher.path), folder)
        embeddings = encoder.embed(texts, images=rows.bincount(minlength=len(texts)).tolist())
        table = CaptionTable(texts, rows, embeddings, encoder.fingerprint)
        table.save(captions_file(run, encoder.fingerprint))
        results = {
            "encoder": encoder.fingerprint,
            "captions": table.fingerprint,
            "count": len(texts),
            "longest": table.embeddings.tokens.shape[1],
            "seconds": time.monotonic() - started,
        }
        if facts.get("retrieval") is not None:
            results["retrieval"] = facts["retrieval"]
        run.finish(STAGE, results)
        context.say(f"text: {len(texts)} captions of up to {results['longest']} tokens, encoder {encoder.fingerprint}")
    runtime.barrier()
