"""The tab *Data*: what the check of the training images found."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from pagoda.app.context import PageContext
from pagoda.app.page_style import bars, told
from pagoda.errors import PagodaError
from pagoda.evaluation.page import card, table, tiles
from pagoda.stages.data_report import read_data_report
from pagoda.stages.run_codec import codec_factor
from pagoda.stages.run_folder import RunFolder

_LISTED = 50
_CLASSES = 200


def show_data(run: RunFolder) -> str:
    """The report of a run's images, as HTML.

    Raises:
        PagodaError: a damaged report or configuration.
    """
    report = read_data_report(run)
    if report is None:
        size = run.config().size * codec_factor(run)
        return told(
            "This run keeps no report of its images: it was made before runs did, or has not looked at them yet. "
            f"Make one with `pagoda data check DATA --size {size} --json RUN/data/check.json`."
        )
    facts = [
        (f"{report['total']:,}", "images looked at"),
        (f"{report['usable']:,}", "can be used"),
        (str(report["size"]), "px a side are needed"),
        ("grey" if report.get("channels") == 1 else "RGB", "as which they are used"),
    ]
    if report["classes"]:
        facts.append((f"{len(report['classes'])}", "classes"))
    parts = [tiles(facts)]
    cards = []
    if report["classes"]:
        counts = list(report["classes"].items())
        more = f'<p class="note">and {len(counts) - _CLASSES} more</p>' if len(counts) > _CLASSES else ""
        cards.append(card("Images of each class", bars(_counted(dict(counts[:_CLASSES]))) + more))
    cards.append(card("Sizes before reduction", bars(_counted(report["sizes"])[:20])))
    if len(report.get("modes", {})) > 1:
        cards.append(card("Colour", bars(_counted(report["modes"]))))
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    if report["bad"]:
        rows = [
            [html.escape(str(b.get("sample_id", ""))), html.escape(str(b.get("reason", "")))] for b in report["bad"]
        ]
        parts.append(card(f"Cannot be used ({len(rows):,})", table(["image", "why"], rows[:_LISTED]) + _more(rows)))
    if report["duplicates"]:
        rows = [[html.escape(" = ".join(map(str, group)))] for group in report["duplicates"]]
        parts.append(card(f"Exact copies ({len(rows):,} groups)", table(["images"], rows[:_LISTED]) + _more(rows)))
    if report.get("missing_captions"):
        parts.append(f'<p class="warning">{len(report["missing_captions"]):,} images have no caption.</p>')
    if not report["bad"] and not report["duplicates"]:
        parts.append('<p class="note">No image is unusable, and no two are the same.</p>')
    return f'<div class="pagoda">{"".join(parts)}</div>'


def _counted(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(str(name), int(count)) for name, count in found.items()]


def _more(rows: list[list[str]]) -> str:
    return f'<p class="note">and {len(rows) - _LISTED:,} more</p>' if len(rows) > _LISTED else ""


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr = context.gr
    content = gr.HTML(elem_id="data-content")

    def look(name: Any) -> str:
        try:
            return show_data(context.server.catalog.open(name))
        except (PagodaError, OSError) as error:
            return told(str(error), bad=True)

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    tab.select(look, run, content, **private)
    run.change(look, run, content, **private)
