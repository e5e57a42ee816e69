"""The parts of a report that take some figuring: scores beside floors, latents, grids over time."""

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
from pagoda.stages.run_folder import RunFolder

_FILM = 4
"""Moments of a stage whose grids are shown."""


def score_cards(run: RunFolder, scores: Mapping[str, Sequence[Score]]) -> str:
    """A card for each model and size: every score beside its floor, and where they come from."""
    parts = []
    for key, found in scores.items():
        model, _, _ = key.rpartition("-")
        rows = []
        for score in found:
            reach = [score.value, score.high or 0.0, score.floor or 0.0, 1.0 if score.better == "higher" else 0.0]
            named = score.metric.partition("[")[0]
            spread = "" if score.low is None or score.high is None else f"{short(score.low)} to {short(score.high)}"
            rows.append(
                [
                    f"{html.escape(named)} {'↓' if score.better == 'lower' else '↑'}",
                    short(score.value),
                    spread,
                    "" if score.floor is None else short(score.floor),
                    strip(score.value, score.floor, score.low, score.high, top=1.05 * max(reach))
                    if math.isfinite(score.value)
                    else "",
                ]
            )
        first = found[0]
        record = json.loads((run.evaluation / f"{key}.json").read_text(encoding="utf-8"))
        what = f"{first.count_fake:,} images against {first.count_real:,} real ones" + (
            ", which the model was trained on" if record.get("training_data") else ""
        )
        seen = dict.fromkeys(f"{score.extractor}, resized by {score.resize}" for score in found)
        facts = f"{what}; features {'; '.join(seen)}; sampler: {first.made_by.get('sampler', '?')}"
        notes = dict.fromkeys(note for score in found for note in score.notes)
        more = [
            *dict.fromkeys(f"{score.extractor} {score.extractor_fingerprint}" for score in found),
            *dict.fromkeys(f"reference {score.reference_fingerprint}" for score in found),
            f"data {record.get('data_fingerprint')}",
            f"model {str(first.made_by.get('model'))[:16]}",
            *(
                f"{name} {first.made_by[name]}"
                for name in ("first_seed", "teacher", "noise_seed")
                if name in first.made_by
            ),
            f"split by seed {first.seed}",
        ]
        content = (
            table(["metric", ">value", ">~95 %", ">real", ""], rows) + f'<p class="note">{html.escape(facts)}.</p>'
        )
        content += "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        content += f"<details><summary>Hashes</summary><p class='note'>{html.escape('; '.join(more))}</p></details>"
        parts.append(card(f"{model}, {first.image_size} px", content))
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
        cells = [
            f"{facts[name]:{form}} ({facts[f'exact_{name}']:{form}})" if name in facts else "" for name, form in pairs
        ]
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


def results_of(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a stage has found; empty while it is under way."""
    return dict(record.get("results", {})) if record else {}


def size_of(path: Path) -> int:
    """The number at the end of a file's name: its size in pixels."""
    return int(path.stem.rpartition("-")[2])
