"""The tab *Explore*: walk between two or four images, look around one, and cut the noise short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pagoda.app.context import PageContext, client_of, follow, number, whole_number
from pagoda.app.jobs import ImageRequest
from pagoda.app.models import LoadedModel
from pagoda.app.page_style import one, shots, told
from pagoda.app.tab_generate import LONGEST_PROMPT, class_choices, class_of, prompt_from
from pagoda.errors import ConfigError, PagodaError
from pagoda.images import to_pil
from pagoda.stages.exploring import MAX_SEED, LatentPoint, variation, walk

CANDIDATES = 12
_NEIGHBOURS = 8
_STATIONS = 7
NO_TRUNCATION = 3.0
"""The right end of the slider: 0.3 % of Gaussian values lie beyond, and they are left as they are."""


def parse_seeds(text: Any, *, least: int = 1) -> list[int]:
    """Seeds that were typed: numbers with commas or spaces between them.

    Raises:
        ConfigError: something else, or fewer than `least`, or more than four.
    """
    words = str(text or "").replace(",", " ").split()
    seeds = [whole_number(word, "a seed", 0, MAX_SEED) for word in words]
    if not least <= len(seeds) <= 4:
        raise ConfigError(f"pick {least if least > 1 else '1'} to 4 images, got {len(seeds)}.")
    return seeds


def toggle(text: Any, seed: int) -> str:
    """The typed seeds with one more, or one less; the oldest goes when there are four."""
    try:
        seeds = parse_seeds(text) if str(text or "").strip() else []
    except ConfigError:
        seeds = []
    seeds = [s for s in seeds if s != seed] if seed in seeds else [*seeds, seed][-4:]
    return ", ".join(map(str, seeds))


def cut_of(value: Any) -> float | None:
    """Truncation by the slider's position.

    Raises:
        ConfigError: not a position of it.
    """
    cut = number(value, "truncation", 0.1, NO_TRUNCATION)
    return None if cut >= NO_TRUNCATION else cut


def first_caption(model: LoadedModel | None) -> str:
    """A text to begin with; empty where the model reads none."""
    return "" if model is None or model.texts is None else model.texts.captions[0]


def build(context: PageContext, page: Any, tab: Any, run: Any) -> None:
    """Build the tab; `run` is the menu of runs."""
    gr, server = context.gr, context.server
    loaded = context.model(run.value)
    classes = class_choices(loaded)[1:]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            label = gr.Dropdown(classes, value=classes[0] if classes else None, label="Class", visible=bool(classes))
            prompt = gr.Textbox(
                first_caption(loaded),
                label="Prompt",
                max_length=LONGEST_PROMPT,
                visible=bool(first_caption(loaded)),
                elem_id="explore-prompt",
            )
            first = gr.Number(0, label="Seed of the first candidate", precision=0, minimum=0)
            cut = gr.Slider(
                0.1,
                NO_TRUNCATION,
                value=NO_TRUNCATION,
                step=0.1,
                label="Truncation",
                info="Standard deviations that the noise stays below; 3 leaves it as it is, less is more typical and less varied.",
            )
            show = gr.Button("Show candidates", variant="primary", elem_id="explore-show")
            picked = gr.State("0, 1")
            picks = gr.Textbox(
                "0, 1",
                label="Seeds to walk between",
                info="Two or four; click on candidates, or type.",
                elem_id="explore-picks",
            )
            across = gr.Slider(0, 1, value=0.5, step=0.01, label="Across", elem_id="explore-across")
            down = gr.Slider(0, 1, value=0.5, step=0.01, label="Down (of four)", elem_id="explore-down")
            with gr.Row():
                way = gr.Button("Show the whole way", elem_id="explore-way")
                around = gr.Button("Vary around the first", elem_id="explore-around")
            strength = gr.Slider(0, 1, value=0.3, step=0.05, label="How far the variations go")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(told(""), elem_id="explore-status")
            candidates = gr.Gallery(
                label="Candidates",
                columns=6,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                format="png",
                interactive=False,
                buttons=[],
                elem_classes="gallery-pick",
                elem_id="explore-candidates",
            )
            live = gr.HTML(elem_id="explore-live")
            result = gr.HTML(elem_id="explore-result")

    async def make(
        name: Any, chosen: Any, text: Any, points: list[LatentPoint], request: Any
    ) -> AsyncIterator[tuple[str, Any]]:
        """(words, images or None) until the images are there."""
        loaded = await asyncio.to_thread(server.model, str(name))
        labels = None
        if loaded.generator.num_classes:
            labels = (class_of(chosen, loaded) or 0,) * len(points)
        # One text for all: on a walk nothing but the noise is to change.
        words = prompt_from(text, loaded) or first_caption(loaded)
        prompts = (words,) * len(points) if loaded.texts is not None else None
        wanted = ImageRequest(run=str(name), points=tuple(points), labels=labels, prompts=prompts)
        async for step in follow(context, wanted, client_of(request)):
            yield step.html, None if step.outcome is None else to_pil(step.outcome.images[loaded.generator.size])

    async def show_candidates(
        name: Any, chosen: Any, prompted: Any, start: Any, value: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            begin = whole_number(start, "the seed", 0, MAX_SEED - CANDIDATES)
            points = [LatentPoint(seeds=(begin + i,), truncation=cut_of(value)) for i in range(CANDIDATES)]
            async for words, images in make(name, chosen, prompted, points, request):
                if images is None:
                    yield words, gr.skip()
                else:
                    shown = [(image.convert("RGB"), f"seed {begin + i}") for i, image in enumerate(images)]
                    yield told("Click on two or four of them."), shown
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip()

    async def move(
        name: Any, chosen: Any, prompted: Any, text: Any, right: Any, low: Any, value: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            corners = parse_seeds(text, least=2)
            place = (number(right, "across", 0, 1), number(low, "down", 0, 1) if len(corners) == 4 else 0.0)
            async for words, images in make(
                name, chosen, prompted, [walk(corners, *place, truncation=cut_of(value))], request
            ):
                if images is None:
                    yield words, gr.skip()
                    continue
                where = f"{place[0]:.0%} across" + (f", {place[1]:.0%} down" if len(corners) == 4 else "")
                yield told(""), one(f"between {', '.join(map(str, corners))}: {where}", images[0])
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip()

    async def whole_way(
        name: Any, chosen: Any, prompted: Any, text: Any, value: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            corners = parse_seeds(text, least=2)
            steps = [i / (_STATIONS - 1) for i in range(_STATIONS)]
            places = [(x, 0.0) for x in steps] if len(corners) == 2 else [(x, y) for y in steps for x in steps]
            points = [walk(corners, *place, truncation=cut_of(value)) for place in places]
            async for words, images in make(name, chosen, prompted, points, request):
                if images is None:
                    yield words, gr.skip()
                else:
                    items = [
                        (f"{x:.0%}" + (f" / {y:.0%}" if len(corners) == 4 else ""), [("on the way", image)])
                        for (x, y), image in zip(places, images, strict=True)
                    ]
                    yield told(f"From {corners[0]} to {corners[-1]}."), shots(items, width="12%")
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip()

    async def vary(
        name: Any, chosen: Any, prompted: Any, text: Any, far: Any, value: Any, request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            seed = parse_seeds(text)[0]
            centre = LatentPoint(seeds=(seed,), truncation=cut_of(value))
            reach = number(far, "how far", 0, 1)
            points = [centre, *(variation(centre, i, reach) for i in range(_NEIGHBOURS))]
            async for words, images in make(name, chosen, prompted, points, request):
                if images is None:
                    yield words, gr.skip()
                else:
                    names = [f"seed {seed}", *(f"variation {i + 1}" for i in range(_NEIGHBOURS))]
                    items = [(caption, [("varied", image)]) for caption, image in zip(names, images, strict=True)]
                    yield told(f"Around seed {seed}."), shots(items)
        except PagodaError as error:
            yield told(str(error), bad=True), gr.skip()

    def pick(text: Any, start: Any, event: Any) -> tuple[str, str]:
        seeds = toggle(text, int(start or 0) + int(event.index))
        return seeds, seeds

    def change_run(name: Any) -> tuple[Any, ...]:
        found = context.model(name)
        names, words = class_choices(found)[1:], first_caption(found)
        menu = gr.update(choices=names, value=names[0] if names else None, visible=bool(names))
        return menu, gr.update(value=words, visible=bool(words)), told(context.problem(name)), None, "", ""

    pick.__annotations__ = {"event": gr.SelectData}
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    show.click(context.with_request(show_candidates), [run, label, prompt, first, cut], [status, candidates], **private)
    # Clicks are added up on the server, one after another: the field of a page still shows what was there before the last of them.
    clicks: dict[str, Any] = {**private, "concurrency_limit": 1, "trigger_mode": "multiple"}
    candidates.select(pick, [picked, first], [picks, picked], **clicks)
    picks.input(lambda text: text, picks, picked, **private)
    inputs = [run, label, prompt, picks, across, down, cut]
    walking = context.with_request(move)
    for changed in (across, down, picks, label, cut):
        changed.change(walking, inputs, [status, live], trigger_mode="always_last", **private)
    prompt.submit(walking, inputs, [status, live], **private)
    way.click(context.with_request(whole_way), [run, label, prompt, picks, cut], [status, result], **private)
    around.click(context.with_request(vary), [run, label, prompt, picks, strength, cut], [status, result], **private)
    run.change(change_run, run, [label, prompt, status, candidates, live, result], **private)
    opened = tab.select(
        context.with_request(show_candidates), [run, label, prompt, first, cut], [status, candidates], **private
    )
    opened.then(walking, inputs, [status, live], **private)
