"""The parts of a report that take some figuring: scores beside floors, latents, grids over time, cost."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pagoda.evaluation import Score
from pagoda.evaluation.charts import histogram, short, strip
from pagoda.evaluation.page import card, film, picture, table, tiles
from pagoda.files import load_tensors
from pagoda.stages.report_curves import throughput
from pagoda.stages.run_folder import RunFolder
from pagoda.training import clock

_FILM = 4
"""Moments of a stage whose grids are shown."""


def score_cards(run: RunFolder, scores: Mapping[str, Sequence[Score]]) -> str:
    """A card for each model and size: every score beside its floor, and where they come from."""
    parts = []
    for key, found in scores.items():
        model, _, side = key.rpartition("-")
        rows = []
        for score in found:
            reach = [score.value, score.high or 0.0, score.floor or 0.0, 1.0 if score.better == "higher" else 0.0]
            spread = "" if score.low is None or score.high is None else f"{short(score.low)} to {short(score.high)}"
            rows.append(
                [
                    f"{html.escape(score.metric.partition('[')[0])} {'↓' if score.better == 'lower' else '↑'}",
                    short(score.value),
                    spread,
                    "" if score.floor is None else short(score.floor),
                    strip(score.value, score.floor, score.low, score.high, top=1.05 * max(reach)),
                ]
            )
        first = found[0]
        record = json.loads((run.evaluation / f"{key}.json").read_text(encoding="utf-8"))
        what = f"{first.count_fake:,} images against {first.count_real:,} real ones" + (
            ", which the model was trained on" if record.get("training_data") else ""
        )
        facts = f"{what}; features {first.extractor}; resized by {first.resize}; sampler: {first.made_by.get('sampler', '?')}"
        notes = dict.fromkeys(note for score in found for note in score.notes)
        more = [
            f"features {first.extractor_fingerprint}",
            f"reference {first.reference_fingerprint}",
            f"data {record.get('data_fingerprint')}",
            f"model {str(first.made_by.get('model'))[:16]}",
            f"seeds from {first.made_by.get('first_seed')}",
            f"split by seed {first.seed}",
        ]
        content = (
            table(["metric", ">value", ">~95 %", ">real", ""], rows) + f'<p class="note">{html.escape(facts)}.</p>'
        )
        content += "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        content += f"<details><summary>Hashes</summary><p class='note'>{html.escape('; '.join(more))}</p></details>"
        parts.append(card(f"{model}, {side} px", content))
    nearest = sorted(run.evaluation.glob("nearest-generator-*.png"), key=size_of)
    shown = [
        picture(
            Image.open(path),
            f"{size_of(path)} px: the generated images that lie nearest to a real one of the reference, above it",
        )
        for path in nearest[-1:]
    ]
    return f'<div class="cards">{"".join(parts)}</div>{"".join(shown)}' if parts else ""


def latent_cards(run: RunFolder, record: Mapping[str, Any] | None) -> str:
    """Moments of the latents and a histogram of some of them."""
    found = results_of(record)
    if not found:
        return ""
    facts = [
        (f"{found['std']:.3f}", "standard deviation (1)"),
        (f"{found['mean']:+.4f}", "mean (0)"),
        (f"{found['kurtosis']:.2f}", "kurtosis (3)"),
        (f"{found['round_trip_psnr']:.1f} dB", "PSNR there and back"),
    ]
    if "gaussian_distance" in found:  # runs of earlier versions have none
        facts.append((f"{found['gaussian_distance']:.3f}", "distance to the nearest Gaussian (0)"))
    for part in found.get("std_by_guidance", []):
        facts.append((f"{part['std']:.3f}", f"std at guidance weights {part['from']:.1f} to {part['to']:.1f}"))
    shards = sorted(run.latents.glob("latents-*.safetensors"))
    if not shards:
        return tiles(facts)
    values = load_tensors(shards[0])[0]["z"].float().flatten()
    edges = torch.linspace(-4, 4, 65)
    density = torch.histogram(values.clamp(-3.999, 3.999), edges).hist / (len(values) * 0.125)
    gaussian = [(x / 20, math.exp(-((x / 20) ** 2) / 2) / math.sqrt(2 * math.pi)) for x in range(-80, 81)]
    chart = histogram(density.tolist(), edges.tolist(), gaussian, label="values of the latents against a unit Gaussian")
    title = "Values of the first shard; the line is a unit Gaussian"
    return f'{tiles(facts)}<div class="half">{card(title, chart)}</div>'


def encoder_card(record: Mapping[str, Any] | None) -> str:
    """How near the encoder of one call comes to the exact one; nothing where there is none."""
    found = results_of(record)
    if not found:
        return ""
    rows = []
    for kind, told in (("training", "training images"), ("held_out", "images held out")):
        facts = found[kind]
        pairs = [("psnr", ".1f"), ("std", ".3f"), ("kurtosis", ".2f"), ("gaussian_distance", ".3f")]
        cells = [f"{facts[name]:{form}} ({facts[f'exact_{name}']:{form}})" for name, form in pairs]
        rows.append([told, f"{facts['latent_rmse']:.3f} ({facts['linear_rmse']:.3f})", *cells])
    heads = ["", ">error", ">rebuilt, dB", ">std", ">~kurtosis", ">~from Gaussian"]
    note = (
        "In brackets the exact latents of the ODE; for the error, that of the linear map which the encoder starts from. "
        f"{found['training']['count']} and {found['held_out']['count']} images, rebuilt by the one-step generator of base size."
    )
    return card("Encoding in one call", f'{table(heads, rows)}<p class="note">{note}</p>')


def film_strips(run: RunFolder, stages: Sequence[str]) -> str:
    """Grids of several moments of each stage, raw above averaged."""
    parts = []
    for stage in stages:
        steps = sorted({int(path.stem.rpartition("-")[2]) for path in run.samples(stage).glob("*-*.png")})
        if not steps:
            continue
        last = len(steps) - 1
        chosen = sorted(
            {steps[round(i * last / max(1, min(_FILM, len(steps)) - 1))] for i in range(min(_FILM, len(steps)))}
        )
        shots = []
        for step in chosen:
            paths = {
                name: run.samples(stage) / f"{kind}-{step:06d}.png"
                for name, kind in (("raw", "raw"), ("averaged", "ema"))
            }
            grids = [
                (f"{stage}, step {step}, {name} weights", Image.open(path))
                for name, path in paths.items()
                if path.is_file()
            ]
            shots.append((f"step {step:,}", grids))
        parts.append(f"<h3>{html.escape(stage)}</h3>{film(shots)}")
    return "".join(parts)


def cost_table(
    run: RunFolder,
    stages: Sequence[str],
    records: Mapping[str, Mapping[str, Any] | None],
    log: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """What each stage took beside what its first measured steps foretold."""
    rows, promised_all, taken_all = [], 0.0, 0.0
    for stage in stages:
        record, found, lines = records[stage], results_of(records[stage]), log.get(stage, [])
        state = "not started" if record is None else "done" if record["done"] else "under way"
        timed = [line for line in lines if "seconds" in line and line["step"] > 0]
        steps = found.get("steps") or _planned_steps(stage, record)
        promised = timed[0]["seconds"] / timed[0]["step"] * steps if timed and steps else None
        taken = found.get("seconds") or (timed[-1]["seconds"] if timed else None)
        if promised is not None and taken is not None and state == "done":
            promised_all, taken_all = promised_all + promised, taken_all + taken
        rates = sorted(line["images_per_second"] for line in lines if "images_per_second" in line)
        memory = [line["memory_mib"] for line in lines if "memory_mib" in line]
        rows.append(
            [
                html.escape(stage),
                f'<span class="state {state.split()[0]}">{state}</span>',
                "" if steps is None else f"{steps:,}",
                "" if promised is None else clock(promised),
                "" if taken is None else clock(taken),
                f"{rates[len(rates) // 2]:.0f}" if rates else "",
                f"{max(memory):.0f}" if memory else "",
            ]
        )
    heads = ["stage", "", ">~steps", ">promised", ">taken", ">~images/s", ">~MiB"]
    disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) / 2**20
    line = f"The folder takes {disk:,.0f} MiB."
    if taken_all:
        line = f"Stages that log steps: promised {clock(promised_all)}, taken {clock(taken_all)}. " + line
    return f'<div class="card">{table(heads, rows)}<p class="note">{line}</p></div>{throughput(log, stages)}'


def _planned_steps(stage: str, record: Mapping[str, Any] | None) -> int | None:
    """Steps that a stage was started for; None for one without steps."""
    settings = (record or {}).get("settings", {}).get(stage.partition("-")[0], {})
    steps = settings.get("steps") or settings.get("loop", {}).get("steps")
    return steps if isinstance(steps, int) else None


def results_of(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a stage has found; empty while it is under way."""
    return dict(record.get("results", {})) if record else {}


def size_of(path: Path) -> int:
    """The number at the end of a file's name: its size in pixels."""
    return int(path.stem.rpartition("-")[2])
