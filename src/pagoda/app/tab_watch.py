"""The tab *Watch*: how far a training is, its curves, its grids, what wants looking at, and several runs over each other."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.app.context import PageContext
from pagoda.app.page_style import told
from pagoda.errors import PagodaError
from pagoda.evaluation.charts import Line, legend, line_chart
from pagoda.evaluation.page import card, table, tiles
from pagoda.stages.progress import RunProgress, read_progress
from pagoda.stages.report_curves import curves, read_log
from pagoda.stages.report_parts import film_strips
from pagoda.stages.run_folder import RunFolder
from pagoda.training import clock

SECONDS = 3.0
"""Between two looks at the folder."""
_MOST_COMPARED = 6
Log = Mapping[str, Sequence[Mapping[str, Any]]]


def show_run(run: RunFolder) -> str:
    """A run as it stands now, as HTML.

    Raises:
        PagodaError: a damaged log or record.
    """
    log = read_log(run.metrics)
    progress = read_progress(run, log)
    stages = list(progress.stages)
    parts = [_head(progress), *(f'<p class="warning">{html.escape(text)}</p>' for text in progress.warnings)]
    parts.append(tiles(_facts(progress)))
    shown = stages if progress.stage is None else [progress.stage, *(s for s in stages if s != progress.stage)]
    parts.append(curves(log, shown) or '<p class="quiet">Nothing was logged yet.</p>')
    parts.append(film_strips(run, shown))
    return f'<div class="pagoda">{"".join(parts)}</div>'


def _head(progress: RunProgress) -> str:
    if progress.stage is None:
        what = "All stages are done." if len(progress.done) == len(progress.stages) else "Nothing is under way."
        return f'<p class="told">{what}</p>'
    of = f" of {progress.steps:,}" if progress.steps else ""
    return (
        f'<p class="told">Stage <b>{html.escape(progress.stage)}</b>, step {progress.step:,}{of}</p>'
        f'<progress value="{progress.share:.4f}" max="1">{progress.share:.0%}</progress>'
    )


def _facts(progress: RunProgress) -> list[tuple[str, str]]:
    facts = [(f"{len(progress.done)} of {len(progress.stages)}", "stages done")]
    if progress.seconds_left is not None:
        facts.append((clock(progress.seconds_left), "left of this stage"))
    if progress.images_per_second is not None:
        facts.append((f"{progress.images_per_second:.0f}", "images a second"))
    if progress.seconds_since is not None:
        facts.append((clock(progress.seconds_since), "since the last line of the log"))
    return facts


def compare(runs: Sequence[tuple[str, RunFolder]]) -> str:
    """Losses and scores of several runs over each other, a card a figure, as HTML.

    Raises:
        PagodaError: a damaged log or record.
    """
    logs: dict[str, Log] = {name: read_log(run.metrics) for name, run in runs}
    rows = []
    for name, run in runs:
        progress = read_progress(run, logs[name])
        left = "" if progress.seconds_left is None else clock(progress.seconds_left)
        where = "done" if progress.stage is None else f"{progress.stage}, {progress.share:.0%}"
        rows.append([html.escape(name), html.escape(where), left, str(len(progress.warnings) or "")])
    parts = [table(["run", "stage", ">left", ">warnings"], rows)]
    stages = dict.fromkeys(stage for log in logs.values() for stage in log)
    for stage in stages:
        figures = dict.fromkeys(
            figure
            for log in logs.values()
            for line in log.get(stage, [])
            for figure in line
            if figure.endswith("/loss") or figure.startswith("evaluation/")
        )
        cards = []
        for figure in figures:
            lines = [
                Line(name, _points(log.get(stage, []), figure), style=index % 6)
                for index, (name, log) in enumerate(logs.items())
            ]
            log_scale = all(y > 0 for line in lines for _, y in line.points)
            chart = line_chart(lines, label=f"{figure} of each run by step", x_label="step", log=log_scale)
            cards.append(card(figure.replace("/", " "), legend(lines) + chart))
        if cards:
            parts.append(f'<h3>{html.escape(stage)}</h3><div class="cards">{"".join(cards)}</div>')
    return f'<div class="pagoda">{"".join(parts)}</div>'


def _points(lines: Sequence[Mapping[str, Any]], figure: str) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line[figure]))
        for line in lines
        if figure in line and line["step"] > 0 and math.isfinite(float(line[figure]))
    ]


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr, catalog = context.gr, context.server.catalog
    others = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        max_choices=_MOST_COMPARED - 1,
        label="Compare with",
        elem_id="watch-others",
    )
    seen = gr.State("")
    content = gr.HTML(elem_id="watch-content")
    timer = gr.Timer(SECONDS, active=False)

    def stamp(names: Sequence[str]) -> str:
        """Changes when one of the runs has written something."""
        found = []
        for name in names:
            folder = catalog.open(name)
            times = [path.stat().st_mtime_ns for path in (folder.metrics, folder.path / "stages") if path.exists()]
            found.append(f"{name}:{times}")
        return "|".join(found)

    def show(name: Any, more: Any) -> str:
        names = [str(name), *(str(other) for other in (more or [])[: _MOST_COMPARED - 1] if other != name)]
        runs = [(n, catalog.open(n)) for n in names]
        return show_run(runs[0][1]) if len(runs) == 1 else compare(runs)

    def look(name: Any, more: Any) -> tuple[Any, ...]:
        if not name:
            return "", told(context.problem(name), bad=True)
        try:
            return stamp([name, *(more or [])]), show(name, more)
        except (PagodaError, OSError) as error:  # a run may be removed or written while it is read
            return "", told(_words(error), bad=True)

    def look_again(name: Any, more: Any, before: str) -> tuple[Any, ...]:
        try:
            now = stamp([name, *(more or [])]) if name else ""
        except (PagodaError, OSError) as error:
            return "", told(_words(error), bad=True)
        return (gr.skip(), gr.skip()) if now == before else look(name, more)

    def opened(name: Any, more: Any) -> tuple[Any, ...]:
        names = [entry.name for entry in catalog.entries() if not entry.problem and entry.name != name]
        return *look(name, more), gr.update(choices=names), gr.Timer(active=True)

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    tab.select(opened, [run, others], [seen, content, others, timer], **private)
    others.change(look, [run, others], [seen, content], **private)
    run.change(look, [run, others], [seen, content], **private)
    timer.tick(look_again, [run, others, seen], [seen, content], **private)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"the run is being written or was removed ({error.strerror}); looking again."
    return str(error)
