"""The prior gap in a report: a card for each size, with the walk from training latents to fresh noise as a chart."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from pagoda.evaluation.charts import Line, legend, line_chart, short
from pagoda.evaluation.page import card, table
from pagoda.stages.prior_gap import load_gaps, washed_out
from pagoda.stages.run_codec import codec_factor
from pagoda.stages.run_folder import RunFolder

_NAMES = {"fd": "Fréchet distance", "kd": "kernel distance"}
_UNSEEN = {
    "images": "images that were not trained on",
    "held out": "images that the run holds out",
    "mirrored": "mirror images, which the run has no use for",
    "shifted": "training images moved by a part of a pixel",
}


def gap_cards(run: RunFolder) -> str:
    """A card for each size that was measured.

    Raises:
        ArtifactError: a file cannot be read.
    """
    factor = codec_factor(run)
    cards = [card(f"{size * factor} px", _content(facts)) for size, facts in load_gaps(run).items()]
    return f'<div class="cards roomy">{"".join(cards)}</div>' if cards else ""


def _content(facts: Mapping[str, Any]) -> str:
    shown, points = facts["shown"], facts["points"]
    walk = [point for point in points if point["name"] != "unseen"]
    lines = [
        Line("generated", [(p["fraction"], p[shown]) for p in walk]),
        Line("real images", [(p["fraction"], p[f"floor_{shown}"]) for p in walk], style=5, flat=True),
    ]
    lines[1:1] = [Line("unseen images", [(0.0, p[shown])], style=1) for p in points if p["name"] == "unseen"]
    chart = legend(lines) + line_chart(
        lines, label=f"{_NAMES[shown]} from training latents to fresh noise", x_label="0 latents of images, 1 noise"
    )
    rows = [
        [
            p["name"] if p["name"] != "mixture" else f"mixture, {p['fraction']:g}",
            short(p[shown]),
            short(p[f"floor_{shown}"]),
            f"{p['contrast_ratio']:.2f}",
            f"{p['sharpness_ratio']:.2f}",
        ]
        for p in points
    ]
    heads = ["latents of", f">{shown.upper()}", ">real", ">contrast", ">~sharpness"]
    unseen = facts["unseen"]
    note = (
        f"{facts['count']} images a point against {facts['reference']} training images, in features "
        f"{facts['features']['name']}. The chart shows the {_NAMES[shown]}. Unseen: {unseen['count']} "
        f"{_UNSEEN[unseen['kind']]}. Contrast and sharpness are shares of the real images'."
    )
    washed = washed_out(facts)
    told = (
        "" if washed is None else f'<p class="note"><strong>{html.escape(washed[0].upper() + washed[1:])}</strong></p>'
    )
    return f'{chart}{table(heads, rows)}{told}<p class="note">{note}</p>'
