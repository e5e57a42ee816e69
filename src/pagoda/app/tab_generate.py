"""The tab *Generate*: images of a class and of seeds, at one size or at all of them side by side."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from pagoda.app.context import PageContext, client_of, follow, number, whole_number
from pagoda.app.downloads import label_of, write_zip
from pagoda.app.jobs import ImageRequest
from pagoda.app.page_style import shots, told
from pagoda.app.server import Answer, LoadedModel
from pagoda.errors import ConfigError, PagodaError
from pagoda.images import to_pil
from pagoda.stages.exploring import MAX_SEED, LatentPoint

EVERY_CLASS = "every class in turn"
ALL_SIZES = "all sizes side by side"
FIRST_COUNT = 8
"""Images that are there when the page opens."""
_STRONGEST = 4.0


def class_choices(model: LoadedModel | None) -> list[str]:
    """What the menu of classes holds: empty for a model without classes."""
    if model is None or not model.generator.num_classes:
        return []
    names = model.class_names or [str(k) for k in range(model.generator.num_classes)]
    return [EVERY_CLASS, *(f"{k}: {name}" for k, name in enumerate(names))]


def size_choices(model: LoadedModel | None) -> list[str]:
    """What the menu of sizes holds, the largest first."""
    if model is None:
        return []
    sizes = [f"{size} px" for size in reversed(model.generator.sizes)]
    return [*sizes, ALL_SIZES] if len(sizes) > 1 else sizes


def class_of(choice: Any, model: LoadedModel | None) -> int | None:
    """The label that a choice stands for; None for every class in turn.

    Raises:
        ConfigError: not one of the choices.
    """
    choices = class_choices(model)
    if not choices or choice in (None, EVERY_CLASS):
        return None
    if choice not in choices:
        raise ConfigError(f"no class {str(choice)[:40]!r} in this run; choose one of the list.")
    return choices.index(choice) - 1


def sizes_of(choice: Any, model: LoadedModel | None) -> tuple[int, ...]:
    """The sizes that a choice stands for.

    Raises:
        ConfigError: not one of the choices.
    """
    if model is None or choice is None:
        return ()
    if choice not in size_choices(model):
        raise ConfigError(f"no size {str(choice)[:40]!r} in this run; choose one of the list.")
    return tuple(model.generator.sizes) if choice == ALL_SIZES else (int(str(choice).removesuffix(" px")),)


def show_answer(model: LoadedModel, answer: Answer, request: ImageRequest) -> str:
    """The images of an answer as HTML."""
    names = model.class_names
    by_size = {size: to_pil(images) for size, images in answer.images.items()}
    items = []
    for index, point in enumerate(request.points):
        label = label_of(model, request, index)
        what = "" if label is None else f" · {names[label] if names else f'class {label}'}"
        items.append(
            (f"seed {point.seeds[0]}{what}", [(f"{size} px", images[index]) for size, images in by_size.items()])
        )
    return shots(items, width="17rem" if len(by_size) > 1 else "7.5rem")


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr, server = context.gr, context.server
    model = context.model(run.value)
    classes, sizes = class_choices(model), size_choices(model)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            label = gr.Dropdown(classes, value=classes[0] if classes else None, label="Class", visible=bool(classes))
            seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0)
            count = gr.Slider(1, server.config.max_images, value=FIRST_COUNT, step=1, label="Images")
            size = gr.Dropdown(sizes, value=sizes[0] if sizes else None, label="Size")
            guidance = gr.Slider(
                0,
                _STRONGEST,
                value=1,
                step=0.1,
                label="Guidance",
                info="1 is the model as trained; more exaggerates what sets the class apart.",
                visible=bool(classes),
            )
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate-go")
                other = gr.Button("Other seeds")
            stop = gr.Button("Cancel", variant="stop", elem_id="generate-stop")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(told(context.problem(run.value)), elem_id="generate-status")
            result = gr.HTML(elem_id="generate-result")
            download = gr.DownloadButton("Download with settings (zip)", visible=False, elem_id="generate-download")

    async def generate(
        name: Any, chosen: Any, first: Any, many: Any, side: Any, weight: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        hidden = gr.update(visible=False)
        try:
            loaded = await asyncio.to_thread(server.model, str(name))
            start = whole_number(first, "the seed", 0, MAX_SEED - server.config.max_images)
            total = whole_number(many, "the number of images", 1, server.config.max_images)
            klass = class_of(chosen, loaded)
            wanted = ImageRequest(
                run=str(name),
                points=tuple(LatentPoint(seeds=(start + i,)) for i in range(total)),
                labels=None if klass is None else (klass,) * total,
                sizes=sizes_of(side, loaded),
                guidance=number(weight, "guidance", 0, _STRONGEST) if loaded.generator.num_classes else 1.0,
            )
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip(), hidden
            return
        async for step in follow(context, wanted, client_of(request)):
            if step.outcome is None:
                yield step.html, gr.skip(), hidden
                continue
            shown = await asyncio.to_thread(show_answer, loaded, step.outcome, wanted)
            archive = await asyncio.to_thread(write_zip, context.folder, loaded, step.outcome, wanted)
            yield (
                told(f"{total} image{'s' if total > 1 else ''} of {name}, one network call each."),
                shown,
                gr.update(value=str(archive), visible=True),
            )

    def cancel(request: Any) -> Any:
        count = server.cancel_client(client_of(request))
        return gr.skip() if count else told("Nothing is under way.")

    def change_run(name: Any) -> tuple[Any, ...]:
        found = context.model(name)
        classes, sizes = class_choices(found), size_choices(found)
        return (
            gr.update(choices=classes, value=classes[0] if classes else None, visible=bool(classes)),
            gr.update(choices=sizes, value=sizes[0] if sizes else None),
            gr.update(visible=bool(classes), value=1),
            told(context.problem(name)),
            "",
            gr.update(visible=False),
        )

    inputs = [run, label, seed, count, size, guidance]
    outputs = [status, result, download]
    handler = context.with_request(generate)
    options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    go.click(handler, inputs, outputs, api_name="generate", **options)
    seed.submit(handler, inputs, outputs, api_visibility="private", **options)
    fresh = other.click(lambda: secrets.randbelow(10**6), None, seed, api_visibility="private")
    fresh.then(handler, inputs, outputs, api_visibility="private", **options)
    stop.click(context.with_request(cancel), None, status, api_visibility="private")
    run.change(change_run, run, [label, size, guidance, *outputs], api_visibility="private", **options)
    page.load(handler, inputs, outputs, api_visibility="private", **options)
