"""Generators in memory: loaded when they are asked for, and again when their run has gone on."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pagoda.app.call_rows import CallRows
from pagoda.app.catalog import RunCatalog
from pagoda.app.server_config import ServerConfig
from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.networks.loading import WEIGHTS
from pagoda.stages.captions import PromptReader, open_captions
from pagoda.stages.context import teacher_facts
from pagoda.stages.exploring import rows_are_independent
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator

_TEXTS_KEPT = 256
"""Embedded texts that stay in memory."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A generator in memory.

    Attributes:
        run: The name of its run.
        generator: In evaluation mode.
        hash: Of its weights.
        class_names: One per class, or None.
        texts: What a generator that reads texts is told; None for others.
        rows: Sizes of its calls: the server's, or 1 where rows of a batch do not come out alike.
        stamp: File, size and time of its weights: another one means that the run has gone on.
    """

    run: str
    generator: OneStepGenerator
    hash: str
    class_names: list[str] | None
    texts: RunTexts | None
    rows: CallRows
    stamp: tuple[str, int, int]


class RunTexts:
    """The captions of a run's data, and its encoder, which stays in memory.

    Args:
        run: A run of texts.
        device: Where to compute.

    Raises:
        ArtifactError: captions or encoder are gone, or not those that were written.
    """

    def __init__(self, run: RunFolder, device: str) -> None:
        table = open_captions(run, run.config())
        assert table is not None  # the generator reads texts
        self.captions = tuple(table.texts)
        self._reader = PromptReader(run, device=device)
        self._kept: OrderedDict[str, Condition] = OrderedDict()

    def caption(self, seed: int) -> str:
        """The text of an image for which nobody gave one."""
        return self.captions[seed % len(self.captions)]

    def condition(self, prompt: str) -> Condition:
        """One row of a text.

        Raises:
            ConfigError: no words.
        """
        if prompt not in self._kept:
            self._kept[prompt] = self._reader([prompt])
            if len(self._kept) > _TEXTS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]


class ModelStore:
    """The generators that were used last. Any thread may ask.

    Args:
        catalog: Which runs there are.
        config: How many are kept, and where they compute.
    """

    def __init__(self, catalog: RunCatalog, config: ServerConfig) -> None:
        self._catalog, self._config = catalog, config
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading = threading.Lock()

    def model(self, name: str) -> LoadedModel:
        """The newest generator of a run, loaded when it is not or when the run has gone on.

        Raises:
            PagodaError: no such run, none of this version, or weights that are damaged.
        """
        run = self._catalog.open(name)
        with self._loading:
            stamp = _stamp(run)
            model = self._models.get(name)
            if model is None or model.stamp != stamp:
                self._models.pop(name, None)
                while len(self._models) >= self._config.max_models:
                    self._models.popitem(last=False)
                model = _in_a_passing_thread(lambda: self._load(name, run, stamp))
                self._models[name] = model
            self._models.move_to_end(name)
            return model

    def _load(self, name: str, run: RunFolder, stamp: tuple[str, int, int]) -> LoadedModel:
        try:
            generator = load_generator(run, device=self._config.device)
        except OSError as error:  # removed between two looks
            raise ConfigError(f"the generator of {name} cannot be read ({error.strerror or error}).") from error
        batch_size, most = self._config.batch_size, self._config.max_rows
        texts = None
        if generator.token_dim:
            texts = RunTexts(run, self._config.device)
            batch_size = most = 1  # the length of the other texts in a call would move last bits
        if batch_size > 1 and not rows_are_independent(generator, batch_size):
            warnings.warn(
                f"{name}: images of one batch depend on each other's place in their last bits here; every image gets a call of its own.",
                stacklevel=2,
            )
            batch_size = most = 1
        names = teacher_facts(run.teacher).get("class_names")
        return LoadedModel(
            run=name,
            generator=generator,
            hash=model_hash(generator),
            class_names=list(names) if isinstance(names, list) else None,
            texts=texts,
            rows=CallRows(batch_size, most, self._config.call_seconds),
            stamp=stamp,
        )


def _in_a_passing_thread(work: Callable[[], Any]) -> Any:
    """Do it in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that ever computed. With more of them than cores it no longer lets any wait
    awake, and the calls that follow take up to twice as long: so the server's thread is to be the only one.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pagoda-load") as once:
        return once.submit(work).result()


def _stamp(run: RunFolder) -> tuple[str, int, int]:
    """Which weights lie there now.

    Raises:
        ConfigError: none, or the run has just been removed.
    """
    sizes = run.generator_sizes()
    if not sizes:
        raise ConfigError(f"{run.path.name} has no generator yet: its training has not come so far.")
    path = run.generator(sizes[-1]) / WEIGHTS
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{run.path.name} has lost its generator ({error.strerror}).") from error
    return (str(path), found.st_size, found.st_mtime_ns)
