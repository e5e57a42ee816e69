"""The page: a menu of runs above the tabs."""

from __future__ import annotations

from typing import Any

from pagoda.app import tab_about, tab_data, tab_edit, tab_explore, tab_generate, tab_watch
from pagoda.app.context import PageContext, client_of
from pagoda.app.editing import can_edit
from pagoda.app.page_style import FONT

TABS = (
    ("Generate", "generate", tab_generate.build),
    ("Explore", "explore", tab_explore.build),
    ("Edit", "edit", tab_edit.build),
    ("Watch", "watch", tab_watch.build),
    ("Data", "data", tab_data.build),
    ("About", "about", tab_about.build),
)
"""Name, anchor and builder of each tab."""


def build_page(context: PageContext) -> Any:
    """The page as Gradio's blocks."""
    gr, server = context.gr, context.server
    names = [entry.name for entry in server.catalog.entries()]
    with gr.Blocks(title="pagoda", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        with gr.Row(elem_classes="pagoda-title"):
            gr.HTML('<div class="pagoda pagoda-ready"><h1>pagoda</h1></div>', scale=1, min_width=120)
            run = gr.Dropdown(
                names, value=default_run(context), label="Run", scale=3, min_width=240, elem_id="run", filterable=True
            )
        opened = gr.State(TABS[0][0])
        with gr.Tabs() as tabs:
            for title, anchor, build in TABS:
                # Gradio cannot hide a tab that was never opened, unless what is in it is rendered beforehand.
                with gr.Tab(title, id=anchor, elem_id=f"tab-{anchor}", render_children=anchor == "edit") as tab:
                    build(context, page, tab, run)

        def list_runs(chosen: Any) -> Any:
            found = [entry.name for entry in server.catalog.entries()]
            # One that is there is left alone: by now the visitor may have chosen another.
            return gr.update(choices=found) if chosen in found else gr.update(choices=found, value=default_run(context))

        def remember(event: Any) -> str:
            return str(event.value)

        def leave_edit(name: Any, title: Any) -> tuple[Any, Any]:
            if title != "Edit" or can_edit(server.catalog, name):
                return gr.skip(), gr.skip()
            return gr.update(selected=TABS[0][1]), TABS[0][0]  # a hidden tab that stays open is an empty page

        def leave(request: Any) -> None:
            server.cancel_client(client_of(request))

        remember.__annotations__ = {"event": gr.SelectData}
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(list_runs, run, run, **quiet)
        tabs.select(remember, None, opened, trigger_mode="multiple", **quiet)
        run.change(leave_edit, [run, opened], [tabs, opened], **quiet)
        page.unload(context.with_request(leave))
    # Each handler only waits for the model server, whose own queue decides who is next.
    page.queue(api_open=False, default_concurrency_limit=None)
    return page


def default_run(context: PageContext) -> str | None:
    """The run that is shown first: one that can make images, the newest; else any that can be opened; None without."""
    catalog = context.server.catalog
    entries = [entry for entry in catalog.entries() if not entry.problem]

    def changed(name: str) -> float:
        return (catalog.open(name).path / "config.yaml").stat().st_mtime

    able = [entry.name for entry in entries if entry.sizes] or [entry.name for entry in entries]
    return max(able, key=changed, default=None)


def theme(gr: Any) -> Any:
    """Gradio's plain theme in the fonts of the reader's system and the report's colours."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.red,
        neutral_hue=gr.themes.colors.stone,
        font=list(FONT),
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="var(--paper)",
        body_background_fill_dark="var(--paper)",
        color_accent="var(--accent)",
        slider_color="var(--accent)",
        slider_color_dark="var(--accent)",
        button_primary_background_fill="#a3341f",
        button_primary_background_fill_hover="#8a2a18",
        button_primary_background_fill_dark="#a3341f",
        button_primary_background_fill_hover_dark="#8a2a18",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )
