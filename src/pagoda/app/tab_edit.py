"""The tab *Edit*: an uploaded image rebuilt, filled in where it was painted over, enlarged, or carried over to another class or text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from pagoda.app.context import PageContext, client_of, follow, number, whole_number
from pagoda.app.editing import KINDS, EditDesk, EditRequest, can_edit, can_encode_in_one_call, parse_mask
from pagoda.app.jobs import Job, TaskRequest
from pagoda.app.models import LoadedModel
from pagoda.app.page_style import shots, told
from pagoda.app.painting import FIELD, painter
from pagoda.app.tab_generate import LONGEST_PROMPT, class_choices, prompt_from
from pagoda.app.uploads import read_uploaded_file
from pagoda.errors import ConfigError, PagodaError
from pagoda.stages.editing import Edited
from pagoda.stages.exploring import MAX_SEED

GUESS = "guess it"
_ENCODERS: dict[str, Literal["teacher", "amortised"]] = {"exactly": "teacher", "in one call": "amortised"}
_TITLES = {
    "Rebuild": "reconstruct",
    "Fill the painted hole": "inpaint",
    "Enlarge": "upscale",
    "Carry over": "transfer",
}


def label_from(choice: Any, model: LoadedModel, *, what: str) -> int | None:
    """The label of a choice such as "3: star"; None for a guess, or without classes.

    Raises:
        ConfigError: not one of the choices.
    """
    names = class_choices(model)[1:]
    if not names or choice in (None, "", GUESS):
        return None
    if choice not in names:
        raise ConfigError(f"{what}: no class {str(choice)[:40]!r} in this run; choose one of the list.")
    return names.index(choice)


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs. It shows where the run has what edits need."""
    gr, server = context.gr, context.server
    desk = EditDesk(server.catalog, server.config.device)
    model = context.model(run.value)
    names, reads = class_choices(model)[1:], model is not None and model.texts is not None
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            upload = gr.File(label="Image", file_count="single", type="filepath", elem_id="edit-upload")
            kind = gr.Radio(list(_TITLES), value="Rebuild", label="Edit", elem_id="edit-kind")
            shows = gr.Dropdown([GUESS, *names], value=GUESS, label="The image shows", visible=bool(names))
            to = gr.Dropdown(names, value=names[0] if names else None, label="It shall show", visible=bool(names))
            words = gr.Textbox(
                label="The image shows",
                info="In words; left empty: nothing in particular.",
                max_length=LONGEST_PROMPT,
                visible=reads,
                elem_id="edit-shows",
            )
            to_words = gr.Textbox(
                label="It shall show", max_length=LONGEST_PROMPT, visible=reads, elem_id="edit-shall-show"
            )
            strength = gr.Slider(
                0, 1, value=0.3, step=0.05, label="Freedom", info="0 stays with the image, 1 starts from fresh noise."
            )
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
            encoder = gr.Radio(
                list(_ENCODERS),
                value="exactly",
                label="The image is read",
                visible=can_encode_in_one_call(server.catalog, run.value),
                elem_id="edit-encoder",
            )
            with gr.Row():
                go = gr.Button("Edit", variant="primary", elem_id="edit-go")
                stop = gr.Button("Cancel", variant="stop", elem_id="edit-stop")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(told(""), elem_id="edit-status")
            easel = gr.HTML(elem_id="edit-easel")
            boxes = gr.Textbox(
                label="Holes as boxes",
                info="left, top, width, height in pixels; several with ; between them",
                elem_id="edit-boxes",
            )
            mask = gr.Textbox(elem_id=FIELD, visible="hidden", show_label=False, container=False)
            result = gr.HTML(elem_id="edit-result")
            download = gr.DownloadButton("Download with settings (png)", visible=False, elem_id="edit-download")

    def opened(path: Any) -> tuple[Any, ...]:
        hidden = gr.update(visible=False)
        if not path:
            return told(""), "", "", "", hidden
        try:
            read = read_uploaded_file(path, context.folder, context.limits)
        except PagodaError as error:
            return told(str(error), bad=True), "", "", "", hidden
        return told(f"{read.name}: {read.image.width} x {read.image.height} px."), painter(read.image), "", "", hidden

    def read_request(
        name: Any,
        path: Any,
        title: Any,
        seen: Any,
        wanted: Any,
        said: Any,
        wished: Any,
        free: Any,
        start: Any,
        reader: Any,
        painted: Any,
        typed: Any,
    ) -> EditRequest:
        if not path:
            raise ConfigError("there is no image yet. Upload one.")
        if title not in _TITLES:
            raise ConfigError(f"no edit {str(title)[:40]!r}; choose one of {', '.join(_TITLES)}.")
        if reader not in _ENCODERS:
            raise ConfigError(f"an image is not read {str(reader)[:40]!r}; choose one of {', '.join(_ENCODERS)}.")
        chosen = KINDS[KINDS.index(_TITLES[title])]  # type: ignore[arg-type]
        model = server.model(str(name))
        image = read_uploaded_file(path, context.folder, context.limits).image
        keep = (
            parse_mask(str(painted or ""), str(typed or ""), image.size, context.limits)
            if chosen == "inpaint"
            else None
        )
        to: int | str | None = None
        if chosen == "transfer":
            to = label_from(wanted, model, what="it shall show") if model.texts is None else prompt_from(wished, model)
        return EditRequest(
            run=str(name),
            kind=chosen,
            image=image,
            keep=keep,
            label=label_from(seen, model, what="the image shows"),
            prompt=prompt_from(said, model),
            to=to,
            strength=number(free, "freedom", 0, 1),
            seed=whole_number(start, "the seed", 0, MAX_SEED),
            encoder=_ENCODERS[reader],
        )

    def write(edited: Edited) -> Path:
        target: Path = context.folder / uuid.uuid4().hex / f"{edited.facts['edit']}.png"
        edited.save(target)
        return target

    async def edit(request: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        hidden = gr.update(visible=False)
        try:
            asked = await asyncio.to_thread(read_request, *values)
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip(), hidden
            return

        def work(job: Job) -> Edited:
            return desk.edit(job, asked)

        async for step in follow(context, TaskRequest(run=asked.run, work=work), client_of(request), what="inversions"):
            if step.outcome is None:
                yield step.html, gr.skip(), hidden
                continue
            before, after = asked.image.copy(), step.outcome.image
            before.thumbnail((768, 768))
            shown = after.copy()
            shown.thumbnail((768, 768))
            pictures = [(f"before, {asked.image.width} x {asked.image.height} px", before)]
            pictures.append((f"after, {after.width} x {after.height} px", shown))
            saved = await asyncio.to_thread(write, step.outcome)
            yield (
                told("Done."),
                shots([(str(values[2]), pictures)], width="100%"),
                gr.update(value=str(saved), visible=True),
            )

    def cancel(request: Any) -> Any:
        return gr.skip() if server.cancel_client(client_of(request)) else told("Nothing is under way.")

    def show_tab(name: Any) -> Any:
        # Hidden, not False: Gradio takes a tab that is False out of the page, and then forgets that it was hidden.
        return gr.update(visible=True if can_edit(server.catalog, name) else "hidden")

    def change_run(name: Any) -> tuple[Any, ...]:
        found = context.model(name)
        names, reads = class_choices(found)[1:], found is not None and found.texts is not None
        return (
            show_tab(name),
            gr.update(choices=[GUESS, *names], value=GUESS, visible=bool(names)),
            gr.update(choices=names, value=names[0] if names else None, visible=bool(names)),
            gr.update(visible=reads),
            gr.update(visible=reads),
            gr.update(value="exactly", visible=can_encode_in_one_call(server.catalog, name)),
        )

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    upload.change(opened, upload, [status, easel, mask, boxes, download], **private)
    inputs = [run, upload, kind, shows, to, words, to_words, strength, seed, encoder, mask, boxes]
    go.click(context.with_request(edit), inputs, [status, result, download], **private)
    stop.click(context.with_request(cancel), None, status, api_visibility="private")
    run.change(change_run, run, [tab, shows, to, words, to_words, encoder], **private)
    # Only ever hides: its answer may come after that of a run chosen meanwhile.
    page.load(lambda name: gr.skip() if can_edit(server.catalog, name) else show_tab(name), run, tab, **private)
