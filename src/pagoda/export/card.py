"""A model card, filled from what the run knows: data, recipe, scores with their provenance, cost, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pagoda.networks import OneStepGenerator, PixelCodec, model_hash
from pagoda.stages.comparison import describe_scores, run_scores
from pagoda.stages.config import RunConfig
from pagoda.stages.run_folder import RunFolder
from pagoda.training import clock
from pagoda.version import __version__


def model_card(
    run: RunFolder, generator: OneStepGenerator, *, licence: str | None = None, place: str | None = None
) -> str:
    """The card of a run's generator, as Markdown with the head that hubs read.

    Args:
        run: Where it comes from.
        generator: The one that is handed on.
        licence: SPDX name of the licence of the weights; None says that nobody has said so yet.
        place: Repository or folder that readers load it from; FOLDER when None.

    Raises:
        ArtifactError: a record or a file of scores in the run is damaged.
    """
    config = run.config()
    task = "text-to-image" if generator.token_dim else "unconditional-image-generation"  # hubs have no task of classes
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    head["tags"] = ["pagoda", "one-step"]
    if licence is not None:
        head = {"license": licence.lower(), **head}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.path.resolve().name}",
        f"A one-step image generator: images of {_and(_picture_sizes(generator))} px from noise of {generator.base_size} px, "
        f"one network call each. Made by pagoda {__version__} by the method of Kim et al. 2024 (PaGoDA, arXiv:2405.14822).",
        "```python\nfrom pagoda import PagodaPipeline\n\n"
        f'images = PagodaPipeline.from_pretrained("{place or "FOLDER"}")({_call(generator)}num_images=4, seed=0).images\n```',
        f"## Model\n\n{_table(_model_rows(generator))}",
        f"## Data\n\n{_table(_data_rows(config, generator))}",
        f"## Recipe and cost\n\n{_recipe(run, config)}",
        f"## Scores\n\n{_scores(run)}",
        "## Limits\n\n"
        "- The generator shows what its data shows, and what they lack or overstate it lacks or overstates.\n"
        "- With few training images, samples may come close to them: `pagoda evaluate --metrics memorised` searches for copies.\n"
        "- One step has no quality setting: more steps are not to be had.",
        "## Licence\n\n"
        + (
            "Nobody has said under which licence these weights may be used: export again with `--licence`."
            if licence is None
            else f"{licence}. The licence of the training data is not known here."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    clean = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in clean)])


def _model_rows(generator: OneStepGenerator) -> list[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in generator.parameters())
    return [
        ("hash", f"`{model_hash(generator)}`"),
        ("parameters", f"{count:,}"),
        ("sizes", ", ".join(f"{size} px" for size in _picture_sizes(generator))),
        ("channels", str(generator.codec.image_channels)),
        *_codec_rows(generator),
        ("told", _told(generator)),
    ]


def _picture_sizes(generator: OneStepGenerator) -> list[int]:
    return [generator.picture_shape(size)[-1] for size in generator.sizes]


def _and(sizes: list[int]) -> str:
    return " and ".join(map(str, sizes))


def _codec_rows(generator: OneStepGenerator) -> list[tuple[str, str]]:
    codec = generator.codec
    if isinstance(codec, PixelCodec):
        return []
    sides = ", ".join(map(str, generator.sizes))
    return [
        ("made in", f"latents of {codec.latent_channels} channels, sides {sides}; decoded by the autoencoder in `vae/`")
    ]


def _call(generator: OneStepGenerator) -> str:
    return 'prompt="a red heart", ' if generator.token_dim else ""


def _told(generator: OneStepGenerator) -> str:
    if generator.token_dim:
        return "texts, read by the encoder in `text_encoder/`"
    return f"{generator.num_classes} classes" if generator.num_classes else "nothing: unconditional"


def _data_rows(config: RunConfig, generator: OneStepGenerator) -> list[tuple[str, str]]:
    # The name alone: where it lay on the disk of whoever trained is nobody's business.
    name = config.data if config.data.startswith(("shapes", "hub:")) else Path(config.data).name
    rows = [("source", f"`{name}`"), ("mirrored", "yes" if config.mirror else "no")]
    if config.source.filter:
        rows.append(("filter", f"`{config.source.filter}`"))
    return rows


def _recipe(run: RunFolder, config: RunConfig) -> str:
    lines = ["| stage | steps | time | data | made |", "|---|---|---|---|---|"]
    for stage in ("teach", "encode", "distill", *(f"grow-{size}" for size in config.growth)):
        record = run.record(stage)
        if record is None or not record["done"]:
            lines.append(f"| {stage} | | not finished | | |")
            continue
        found = record["results"]
        steps = f"{found['steps']:,}" if "steps" in found else ""
        seconds = clock(found["seconds"]) if "seconds" in found else "not measured"
        made = f"`{str(found['hash'])[:12]}`" if "hash" in found else ""
        lines.append(f"| {stage} | {steps} | {seconds} | `{str(record['inputs'].get('data', ''))[:12]}` | {made} |")
    return "\n".join([*lines, "", f"Seed {config.seed}, precision {config.precision}."])


def _scores(run: RunFolder) -> str:
    found = {key: scores for key, scores in run_scores(run).items() if key.startswith("generator")}
    if not any(found.values()):
        return "None were measured: `pagoda evaluate RUN --data DATA` does it."
    parts = []
    for key, scores in found.items():
        first = scores[0]
        parts.append(
            f"`{key}`: {first.count_fake} images against {first.count_real} real ones, features {first.extractor} "
            f"({first.extractor_fingerprint}).\n\n```\n{describe_scores(scores)}\n```"
        )
    return "\n\n".join(parts)
