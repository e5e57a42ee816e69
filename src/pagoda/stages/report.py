"""`report.html`: one static file that shows a run, with its pictures inside and nothing fetched from anywhere."""

from __future__ import annotations

import html
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from pagoda.evaluation import Score
from pagoda.evaluation.charts import short
from pagoda.evaluation.page import data_uri, picture, render_page, tiles
from pagoda.files import write_text_atomic
from pagoda.images import read_metadata
from pagoda.stages.comparison import run_scores
from pagoda.stages.config import RunConfig, to_yaml
from pagoda.stages.report_cost import cost_table
from pagoda.stages.report_curves import curves, read_log
from pagoda.stages.report_gap import gap_cards
from pagoda.stages.report_parts import encoder_card, film_strips, latent_cards, results_of, score_cards, size_of
from pagoda.stages.report_probes import probe_lines
from pagoda.stages.run_codec import codec_factor
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.teacher_pairs import RECORD as PAIRS
from pagoda.training import clock
from pagoda.version import __version__

_MARK = (
    '<svg viewBox="0 0 48 48" role="img" aria-label="pagoda"><g fill="none" stroke="var(--accent)" stroke-width="2.6" '
    'stroke-linejoin="round" stroke-linecap="round"><path d="M24 3v5M15 15q6-2 9-7 3 5 9 7M11 26q9-2.500 13-8 4 5.500 13 8'
    'M6 39q13-3 18-10 5 7 18 10"/><path d="M19 15v4M29 15v4M17 26.500v4M31 26.500v4M14 39v6h20v-6"/></g></svg>'
)


def write_report(run: RunFolder, config: RunConfig | None = None) -> Path:
    """Write the report of a run as far as it has come; returns its path.

    Args:
        config: The run's configuration; read from its folder when None.

    Raises:
        ArtifactError: a record or a file of scores in the folder is damaged.
    """
    config = run.config() if config is None else config
    stages = stage_names(config)
    stages += ["amortise"] if run.record("amortise") and "amortise" not in stages else []
    if run.record(PAIRS) is not None:
        stages.insert(stages.index("distill"), PAIRS)
    records = {stage: run.record(stage) for stage in stages}
    log = read_log(run.metrics)
    scores = run_scores(run)
    sections = [
        ("summary", "", "", _summary(records, scores, log)),
        ("samples", "Samples", "One network call each, from fresh noise. Not picked.", _samples(run)),
        (
            "octaves",
            "Octaves",
            "The same seeds at every size, enlarged to the same width: each level adds to what the one above it shows.",
            _octaves(run, config),
        ),
        (
            "scores",
            "Scores",
            "Dots are scores with their 95 % interval, ticks are real images in place of the generated ones at the same counts.",
            score_cards(run, scores),
        ),
        (
            "gap",
            "Prior gap",
            "Distance to real images on the way from encoded images to fresh noise, which samples are made of.",
            gap_cards(run),
        ),
        (
            "reconstructions",
            "Reconstructions",
            "Training images above, below what the generator makes of their own latents. Samples from fresh noise are harder.",
            _pictures(run, "reconstructions-*.png", "{} px: original above, reconstruction below"),
        ),
        (
            "latents",
            "Latents",
            "Encoded images should look like unit Gaussian noise.",
            latent_cards(run, records["encode"]) + encoder_card(records.get("amortise")),
        ),
        (
            "probes",
            "What the diffusion model knows",
            "A head on its features, and how many directions it keeps of an image in noise.",
            probe_lines(run),
        ),
        ("curves", "Curves", "Steps go on where a stopped run was taken up again.", curves(log, stages)),
        (
            "training",
            "While training",
            "The same noise at several moments: raw weights above, their average below.",
            film_strips(run, stages),
        ),
        (
            "cost",
            "Cost",
            "Planned is what pagoda plan foretold, promised what the first measured steps of a stage did.",
            cost_table(run, config, stages, records, log),
        ),
        ("continue", "Continue", "", _commands(run, config, records)),
        ("configuration", "Configuration", "", _configuration(run, config)),
    ]
    factor = codec_factor(run)
    sizes = " → ".join(str(size * factor) for size in config.sizes)
    latents = f" (on latents of a codec, {factor} x smaller)" if config.codec else ""
    grown = " and grown" if len(config.sizes) > 1 else ""
    head = (
        f"{_MARK}<div><h1>{html.escape(run.path.resolve().name)}</h1><p>{html.escape(_data_name(config))}, {sizes} px: "
        f"a diffusion model of {config.base * factor} px{latents}, distilled to one step{grown}</p></div>"
    )
    foot = f"Written by pagoda {html.escape(__version__)}. This page is one file and asks for nothing from anywhere."
    target = run.path / "report.html"
    write_text_atomic(target, render_page(f"{run.path.resolve().name} · pagoda", head, sections, foot))
    return target


def stage_names(config: RunConfig) -> list[str]:
    """Names of all stages of a run, in order."""
    texts = ["text"] if config.condition == "text" else []
    amortised = ["amortise"] if config.distill.latents == "amortised" else []
    return [*texts, "teach", "encode", *amortised, "distill", *(f"grow-{size}" for size in config.growth)]


def _data_name(config: RunConfig) -> str:
    return config.data if config.data.startswith(("shapes", "hub:")) else Path(config.data).name


def _summary(
    records: Mapping[str, Mapping[str, Any] | None], scores: Mapping[str, Sequence[Score]], log: Mapping[str, Any]
) -> str:
    done = [stage for stage, record in records.items() if record and record["done"]]
    seconds = sum(results_of(records[stage]).get("seconds", 0.0) for stage in done)
    facts = [(f"{len(done)} of {len(records)}", "stages done")]
    if seconds:
        facts.append((clock(seconds), "of work, as the stages measured it"))
    encode = results_of(records["encode"])
    if encode:
        facts.append((f"{encode['std']:.3f}", "std of the latents (1 is ideal)"))
        facts.append((f"{encode['round_trip_psnr']:.1f} dB", "image to latent and back"))
    for key, found in scores.items():
        if key.startswith("generator") and found:
            best = found[0]
            floor = "" if best.floor is None else f" (real: {short(best.floor)})"
            facts.append((short(best.value), f"{best.metric} at {best.image_size} px{floor}"))
    memory = [
        row["memory_mib"] for rows in log.values() for row in rows if math.isfinite(row.get("memory_mib", math.nan))
    ]
    if memory:
        facts.append((f"{max(memory) / 1024:.2f} GiB", "largest memory"))
    return tiles(facts)


def _samples(run: RunFolder) -> str:
    finals = sorted((run.path / "samples").glob("final-*.png"), key=size_of)
    if not finals:
        return ""
    return picture(
        Image.open(finals[-1]), f"{size_of(finals[-1])} px, a column a class where there are classes", kind="hero"
    )


def _octaves(run: RunFolder, config: RunConfig) -> str:
    path = run.path / "samples" / "octaves.png"
    if not path.is_file():
        return ""
    grid = Image.open(path)
    rows = (read_metadata(path) or {}).get("sizes") or config.sizes
    height, factor = (grid.height - 1) // len(rows), codec_factor(run)
    parts = []
    for index, size in enumerate(int(row) * factor for row in rows):
        cut = grid.crop((0, index * height, grid.width, (index + 1) * height + 1))
        parts.append(
            f'<div class="row"><span>{size} px</span><img alt="the seeds at {size} px" src="{data_uri(cut)}"></div>'
        )
    return f'<div class="hero">{"".join(parts)}</div>'


def _pictures(run: RunFolder, pattern: str, caption: str) -> str:
    paths = sorted((run.path / "samples").glob(pattern), key=size_of)
    return "".join(picture(Image.open(path), caption.format(size_of(path)), kind="hero") for path in paths)


def _commands(run: RunFolder, config: RunConfig, records: Mapping[str, Mapping[str, Any] | None]) -> str:
    where, data = shlex.quote(str(run.path)), shlex.quote(config.data)
    unfinished = [stage for stage, record in records.items() if record is None or not record["done"]]
    if unfinished:
        lines = [f"pagoda grow {where}   # goes on with {unfinished[0]}"]
    else:
        lines = [
            f"pagoda sample {where} --n 64",
            f"pagoda evaluate {where} --data {data}",
            f"pagoda grow {where} --size {2 * config.size}   # one octave more",
        ]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _configuration(run: RunFolder, config: RunConfig) -> str:
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("torch", "diffusers", "numpy")}
    made = {
        str(record["version"])
        for record in (run.record(p.stem) for p in (run.path / "stages").glob("*.json"))
        if record
    }
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    by = f"Stages were started with pagoda {', '.join(sorted(made))}. " if made else ""
    return (
        f'<p class="note">{html.escape(by)}Page written with {html.escape(words)} on {html.escape(platform.platform())}.</p>'
        f"<details><summary>All settings</summary><pre>{html.escape(to_yaml(config))}</pre></details>"
    )
