"""The run folder: the unit of work and of hand-over.

    config.yaml            the resolved configuration
    text/                  the embedded captions, and the text encoder that the run trained, where it reads texts
    codec/                 the autoencoder whose latents it works on, where it does
    data/                  small copies of the images at every size, and their latents
    teacher/               the diffusion model, a diffusers folder
    latents/               the encoded images
    teacher-pairs/         what the teacher makes of fresh noise, where the distillation asks for it
    generator-<size>/      the one-step generator after each octave
    checkpoints/<stage>/   what a stage needs to continue
    samples/<stage>/       grids drawn while training
    metrics.jsonl          every figure that was logged
    encoder/               a network that encodes in one call, where `pagoda amortise` was run
    prior-gap/             how much worse each generator is at fresh noise than at training latents
    evaluation/            scores, the judge that was trained for them, the nearest training images
    plan.json              what the run would take, where `pagoda plan` was asked
    report.html            all of it on one page
    stages/<stage>.json    what a stage was made from, whether it is done, and what it cost

A stage's artefact appears under its name only when it is whole. `stages/<stage>.json` holds the settings and the inputs that the
stage was started with; the same command continues it, another configuration is refused with the keys that differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import hash_json, named_disk_errors, write_text_atomic
from pagoda.stages.config import RunConfig, from_dict, read_yaml, to_yaml
from pagoda.version import __version__

BEFORE_SECONDS = "before_seconds"
"""In a stage's record: what its starts took before the first step."""
PLAN_FILE = "plan.json"
"""May lie in a folder before its run begins."""
FREE_KEYS = (
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "preview_every",
    "cache_gib",
    "device",
    "threads",
    "tensorboard",
    "allow_download",
)
"""Settings that change how a run is watched or where it runs, not what comes out: free to change when a stage continues. Of `cache_gib`
an octave keeps in its record which side of it the stage was on, since that decides where its samples of the prior come from."""


class RunFolder:
    """A run on disk.

    Args:
        path: The folder; made by `create`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, config: RunConfig) -> RunFolder:
        """Open a folder for this configuration, making it when missing.

        `config.yaml` is written into a new folder only: a run keeps its own until `write_config` is told otherwise.

        Raises:
            ArtifactError: the path is a file, or a folder with other things in it.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ArtifactError(f"{run.path} is a file; --out names a folder.")
        others = [path for path in run.path.iterdir() if path.name != PLAN_FILE] if run.path.is_dir() else []
        if others and not run.config_path.exists():
            raise ArtifactError(f"{run.path} holds other things and no config.yaml; choose an empty folder for --out.")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the run folder {run.path}: {error}.") from error
        if not run.config_path.exists():
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Open a folder that exists.

        Raises:
            ArtifactError: no run is there.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise ArtifactError(
                f"{run.path} is not a run folder: it has no config.yaml. Make one with `pagoda train DATA --out {run.path}`."
            )
        return run

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def config(self) -> RunConfig:
        """The configuration that the folder was last used with.

        Raises:
            ConfigError: the file does not hold a configuration of this version.
        """
        values = read_yaml(self.config_path)
        try:
            return from_dict(RunConfig, values)
        except ConfigError as error:
            raise ConfigError(f"{self.config_path}: {error}") from error

    def write_config(self, config: RunConfig) -> None:
        """Make this the configuration of the run; checked against its stages before (see `check`)."""
        write_text_atomic(self.config_path, to_yaml(config))

    @property
    def teacher(self) -> Path:
        """The diffusion model."""
        return self.path / "teacher"

    @property
    def codec(self) -> Path:
        """The autoencoder whose latents the run works on; not there for a run on pixels."""
        return self.path / "codec"

    @property
    def latents(self) -> Path:
        """The store of encoded images."""
        return self.path / "latents"

    @property
    def teacher_pairs(self) -> Path:
        """The store of images that the teacher made of fresh noise."""
        return self.path / "teacher-pairs"

    @property
    def images(self) -> Path:
        """Small copies of the images."""
        return self.path / "data"

    @property
    def metrics(self) -> Path:
        """Every figure that was logged."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """Scores with their provenance, and who judged."""
        return self.path / "evaluation"

    @property
    def encoder(self) -> Path:
        """The network that encodes in one call, where the stage `amortise` was run."""
        return self.path / "encoder"

    def generator(self, size: int) -> Path:
        """The generator that makes images of `size` pixels."""
        return self.path / f"generator-{size}"

    def generator_sizes(self) -> list[int]:
        """Sizes of the generators that are there, smallest first."""
        names = [
            p.name.removeprefix("generator-") for p in self.path.glob("generator-*") if (p / "config.json").is_file()
        ]
        return sorted(int(name) for name in names if name.isdigit())

    def work(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.path / "checkpoints" / stage

    def samples(self, stage: str) -> Path:
        """Where a stage draws its grids."""
        return self.path / "samples" / stage

    # What a stage was made from.

    def record(self, stage: str) -> dict[str, Any] | None:
        """What is known of a stage, or None when it was never started.

        Raises:
            ArtifactError: the record cannot be read.
        """
        path = self.path / "stages" / f"{stage}.json"
        if not path.exists():
            return None
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}). Remove it and the stage's folder to run the stage again."
            ) from error
        return dict(facts)

    def check(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str | None]) -> dict[str, Any]:
        """Compare a stage that was started with what it would be made from now; returns the latter.

        Args:
            stage: Name of the stage; one that was never started agrees with everything.
            settings: The configuration that decides what comes out.
            inputs: Fingerprints of what the stage reads, as far as they are known; None for what it does not read.

        Raises:
            ArtifactError: the stage was started with other settings or inputs; the keys that differ are named.
        """
        read = {key: value for key, value in inputs.items() if value is not None}
        now = {"settings": json.loads(json.dumps(_without(settings, FREE_KEYS))), "inputs": read}
        before = self.record(stage)
        if before is not None:
            known = {key: before["inputs"].get(key) for key in inputs}
            changed = _differences(before["settings"], now["settings"]) + _differences(known, dict(inputs))
            if changed:
                raise ArtifactError(
                    f"stage `{stage}` of {self.path} was started with another configuration: {'; '.join(changed[:5])}. "
                    "Go back to those settings (the run's config.yaml has them, and `pagoda train --config` reads it), "
                    f"choose another --out, or remove the stage (`stages/{stage}.json` and what it made) to run it again."
                )
        return now

    def begin(
        self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str | None], *, write: bool = True
    ) -> str:
        """Start or continue a stage; returns its fingerprint.

        Args:
            stage: Name of the stage.
            settings: The configuration that decides what comes out.
            inputs: Fingerprints of what the stage reads: data, teacher, latents, generator below; None for what it does not read.
            write: Whether this process is the one that writes files.

        Raises:
            ArtifactError: the stage was started with other settings or inputs; the keys that differ are named.
        """
        facts = self.check(stage, settings, inputs)
        if write and self.record(stage) is None:
            self.write_record(stage, {**facts, "done": False, "version": __version__})
        return hash_json(facts)

    def write_record(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Write what is known of a stage."""
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        write_text_atomic(folder / f"{stage}.json", json.dumps(facts, indent=1))

    def finish(self, stage: str, results: Mapping[str, Any]) -> None:
        """Mark a stage done and keep what it found out; its checkpoints are no longer needed."""
        before = self.record(stage)
        assert before is not None, "a stage is begun before it is finished"
        prepared = {key: before.pop(key) for key in (BEFORE_SECONDS,) if key in before}
        self.write_record(stage, {**before, "done": True, "results": {**results, **prepared}})
        shutil.rmtree(self.work(stage), ignore_errors=True)

    def note_preparation(self, stage: str, seconds: float) -> None:
        """Add to what the starts of a stage under way took before its first step; `finish` puts it among the results."""
        record = self.record(stage)
        assert record is not None, "a stage is begun before it prepares"
        self.write_record(stage, {**record, BEFORE_SECONDS: record.get(BEFORE_SECONDS, 0.0) + seconds})

    def note(self, stage: str, results: Mapping[str, Any]) -> None:
        """Add to what a finished stage found out."""
        record = self.record(stage)
        assert record is not None, "a stage is finished before anything is added"
        self.write_record(stage, {**record, "results": {**record["results"], **results}})

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        facts = self.record(stage)
        return facts is not None and bool(facts["done"])

    def require(self, stage: str, command: str) -> dict[str, Any]:
        """The record of a finished stage.

        Raises:
            ArtifactError: it has not finished; `command` says how to.
        """
        facts = self.record(stage)
        if facts is None or not facts["done"]:
            raise ArtifactError(f"{self.path} has no finished stage `{stage}`. Run `{command}` first.")
        return facts

    @contextlib.contextmanager
    def artifact(self, target: Path) -> Iterator[Path]:
        """A folder to write an artefact into; it takes its name only when the block ends without an error."""
        part = target.with_name(f".writing-{target.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            with named_disk_errors(target):
                yield part
                for file in part.rglob("*"):
                    if file.is_file():
                        with file.open("rb") as handle:
                            os.fsync(handle.fileno())
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from training in this folder at the same time.

        Raises:
            ArtifactError: another process is at work here.
        """
        path = self.path / ".lock"
        handle = path.open("a+")
        try:
            _lock_file(handle, self.path)
            yield
        finally:
            handle.close()  # closing releases the lock; so does a kill


def _lock_file(handle: Any, where: Path) -> None:
    """Take an exclusive lock without waiting."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl; its msvcrt locks the first byte
        import msvcrt

        lock = getattr(msvcrt, "locking")  # noqa: B009 - the attribute exists on Windows only
        take = lambda: lock(handle.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009, E731
    else:
        take = lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # noqa: E731
    try:
        take()
    except OSError as error:
        raise ArtifactError(f"another process is training in {where}. Wait for it, or choose another --out.") from error


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return value


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Readable differences of two nested mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{where}.{k}" if where else str(k))]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]
