"""The tab *About*: the model card, the configuration, where everything came from, and which model made a picture."""

from __future__ import annotations

import html
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pagoda.app.context import PageContext, client_of, follow
from pagoda.app.jobs import Job, TaskRequest
from pagoda.app.page_style import told
from pagoda.app.uploads import clean_name, read_upload, uploaded_bytes
from pagoda.errors import ArtifactError, PagodaError
from pagoda.evaluation.page import table
from pagoda.export.card import model_card
from pagoda.images import read_metadata
from pagoda.stages.config import to_yaml
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.run_folder import RunFolder


def show_stages(run: RunFolder) -> str:
    """What each stage was made from and by, as HTML.

    Raises:
        ArtifactError: a damaged record.
    """
    rows = []
    for path in sorted((run.path / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime):
        record = run.record(path.stem) or {}
        found = record.get("results", {})
        inputs = ", ".join(f"{name} {str(value)[:12]}" for name, value in record.get("inputs", {}).items())
        made = str(found.get("hash", ""))[:12]
        state = "done" if record.get("done") else "under way"
        cells = [path.stem, state, f"pagoda {record.get('version', '?')}", inputs, made]
        rows.append([html.escape(cell) for cell in cells])
    if not rows:
        return told("No stage was begun.")
    return f'<div class="pagoda">{table(["stage", "state", "by", "from", "made"], rows)}</div>'


def inspect_picture(path: Path, name: str, folder: Path, context: PageContext, run: str) -> str:
    """What a picture says of itself, and whether a run makes it again, as HTML.

    Raises:
        PagodaError: not a picture that can be read.
    """
    content = uploaded_bytes(path, folder, context.limits)
    read_upload(content, name, context.limits)  # with its limits, before anything else opens it
    facts = read_metadata(path)
    shown = clean_name(name)
    if facts is None:
        return told(f"{shown} does not say what made it: it is no image of pagoda, or its metadata was removed.")
    try:
        verdict, bad = str(compare_with_run(path, context.server.catalog.open(run).path)), False
    except ArtifactError as error:
        verdict, bad = str(error).replace(str(path), shown).replace(str(context.server.catalog.root), "RUNS"), True
    rows = [[html.escape(str(key)), html.escape(json.dumps(value)[:300])] for key, value in facts.items()]
    return told(f"{shown}: {verdict}", bad=bad) + f'<div class="pagoda">{table(["fact", ""], rows)}</div>'


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr, server = context.gr, context.server
    status = gr.HTML(elem_id="about-status")
    card = gr.Markdown(elem_id="about-card")
    with gr.Accordion("Configuration", open=False):
        settings = gr.Code(language="yaml", interactive=False, show_label=False, wrap_lines=True)
    with gr.Accordion("Provenance", open=True):
        stages = gr.HTML(elem_id="about-stages")
    with gr.Accordion("Which model made this picture?", open=False):
        upload = gr.File(
            label="A picture that pagoda made", file_count="single", type="filepath", elem_id="about-upload"
        )
        verdict = gr.HTML(elem_id="about-verdict")

    def look(name: Any) -> tuple[Any, ...]:
        try:
            opened = server.catalog.open(name)
            text, words = to_yaml(opened.config()), told("")
            records = show_stages(opened)
        except (PagodaError, OSError) as error:
            return told(str(error), bad=True), "", "", ""
        try:
            written = model_card(opened, server.model(str(name)).generator).split("---\n", 2)[2]
        except PagodaError as error:
            written, words = "", told(str(error))
        return words, written, text, records

    async def inspect(path: Any, name: Any, request: Any) -> AsyncIterator[str]:
        if path is None:
            yield ""
            return

        def work(job: Job) -> str:
            return inspect_picture(Path(path), Path(path).name, context.folder, context, str(name))

        async for step in follow(context, TaskRequest(run=str(name), work=work), client_of(request), what="compared"):
            yield step.html if step.outcome is None else step.outcome

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    tab.select(look, run, [status, card, settings, stages], **private)
    run.change(look, run, [status, card, settings, stages], **private)
    upload.change(context.with_request(inspect), [upload, run], verdict, **private)
