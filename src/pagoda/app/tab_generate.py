"""The tab *Generate*: images of a class and of seeds, at one size or at all of them side by side."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from pagoda.app.calls import prompt_of
from pagoda.app.context import PageContext, client_of, follow, number, whole_number
from pagoda.app.downloads import label_of, write_zip
from pagoda.app.jobs import ImageRequest
from pagoda.app.models import LoadedModel
from pagoda.app.page_style import shots, told
from pagoda.app.server import Answer
from pagoda.errors import ConfigError, PagodaError
from pagoda.images import to_pil
from pagoda.stages.exploring import MAX_SEED, LatentPoint

EVERY_CLASS = "every class in turn"
ALL_SIZES = "all sizes side by side"
FIRST_COUNT = 8
"""Images that are there when the page opens."""
_STRONGEST = 4.0
LONGEST_PROMPT = 1000
"""Characters."""


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
    sizes = [told_size(size, model) for size in reversed(model.generator.sizes)]
    return [*sizes, ALL_SIZES] if len(sizes) > 1 else sizes


def told_size(size: int, model: LoadedModel) -> str:
    """The side of the images in pixels, which are larger than the size of a generator that makes latents."""
    return f"{model.generator.picture_shape(size)[-1]} px"


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
    return tuple(size for size in model.generator.sizes if choice in (ALL_SIZES, told_size(size, model)))


def prompt_from(text: Any, model: LoadedModel) -> str | None:
    """The prompt that was typed; None for captions of the data, and where the model reads no texts.

    Raises:
        ConfigError: too long.
    """
    prompt = " ".join(str(text or "").split())
    if len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"a prompt has {LONGEST_PROMPT:,} characters at most, got {len(prompt):,}. Shorten it.")
    return prompt if prompt and model.texts is not None else None


def guidance_range(model: LoadedModel | None) -> tuple[float, float] | None:
    """Weights that the slider offers: those that the generator was trained with, or some around 1; None where there is nothing to
    guide towards."""
    if model is None or not (model.generator.num_classes or model.texts):
        return None
    trained = model.generator.guidance_max
    return (0.0, _STRONGEST) if trained is None else (1.0, float(trained))


def show_answer(model: LoadedModel, answer: Answer, request: ImageRequest) -> str:
    """The images of an answer as HTML."""
    names = model.class_names
    by_size = {size: to_pil(images) for size, images in answer.images.items()}
    items = []
    for index, point in enumerate(request.points):
        label = label_of(model, request, index)
        told_to_show = prompt_of(model, request, index)
        if label is not None:
            told_to_show = names[label] if names else f"class {label}"
        what = f" · {told_to_show}" if told_to_show else ""
        items.append(
            (
                f"seed {point.seeds[0]}{what}",
                [(told_size(size, model), images[index]) for size, images in by_size.items()],
            )
        )
    return shots(items, width="17rem" if len(by_size) > 1 else "7.5rem")


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr, server = context.gr, context.server
    model = context.model(run.value)
    classes, sizes = class_choices(model), size_choices(model)
    weights = guidance_range(model)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            label = gr.Dropdown(classes, value=classes[0] if classes else None, label="Class", visible=bool(classes))
            prompt = gr.Textbox(
                label="Prompt",
                info="Left empty: captions of the training data, in turn.",
                max_length=LONGEST_PROMPT,
                visible=model is not None and model.texts is not None,
                elem_id="generate-prompt",
            )
            seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0)
            count = gr.Slider(1, server.config.max_images, value=FIRST_COUNT, step=1, label="Images")
            size = gr.Dropdown(sizes, value=sizes[0] if sizes else None, label="Size")
            guidance = gr.Slider(
                *(weights or (0.0, _STRONGEST)),
                value=1,
                step=0.1,
                label="Guidance",
                info="1 is none; more exaggerates what sets the class or the text apart.",
                visible=weights is not None,
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
        name: Any, chosen: Any, first: Any, many: Any, side: Any, weight: Any, text: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        hidden = gr.update(visible=False)
        try:
            loaded = await asyncio.to_thread(server.model, str(name))
            start = whole_number(first, "the seed", 0, MAX_SEED - server.config.max_images)
            total = whole_number(many, "the number of images", 1, server.config.max_images)
            klass, words, allowed = class_of(chosen, loaded), prompt_from(text, loaded), guidance_range(loaded)
            wanted = ImageRequest(
                run=str(name),
                points=tuple(LatentPoint(seeds=(start + i,)) for i in range(total)),
                labels=None if klass is None else (klass,) * total,
                prompts=None if words is None else (words,) * total,
                sizes=sizes_of(side, loaded),
                guidance=1.0 if allowed is None else number(weight, "guidance", *allowed),
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
        weights = guidance_range(found)
        low, high = weights or (0.0, _STRONGEST)
        return (
            gr.update(choices=classes, value=classes[0] if classes else None, visible=bool(classes)),
            gr.update(choices=sizes, value=sizes[0] if sizes else None),
            gr.update(visible=weights is not None, value=1, minimum=low, maximum=high),
            gr.update(visible=found is not None and found.texts is not None, value=""),
            told(context.problem(name)),
            "",
            gr.update(visible=False),
        )

    inputs = [run, label, seed, count, size, guidance, prompt]
    outputs = [status, result, download]
    handler = context.with_request(generate)
    options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    go.click(handler, inputs, outputs, api_name="generate", **options)
    seed.submit(handler, inputs, outputs, api_visibility="private", **options)
    prompt.submit(handler, inputs, outputs, api_visibility="private", **options)
    fresh = other.click(lambda: secrets.randbelow(10**6), None, seed, api_visibility="private")
    fresh.then(handler, inputs, outputs, api_visibility="private", **options)
    stop.click(context.with_request(cancel), None, status, api_visibility="private")
    run.change(change_run, run, [label, size, guidance, prompt, *outputs], api_visibility="private", **options)
    page.load(handler, inputs, outputs, api_visibility="private", **options)
