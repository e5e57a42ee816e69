"""The Python API: three functions from images to a grown one-step generator.

    teacher = pagoda.teach("photos/", size=32, out="runs/photos")
    generator = pagoda.distill(teacher)
    generator = pagoda.grow(generator, size=256)
    images = generator.sample(64, label=3, seed=0)

They work on run folders, so every step resumes, and everything that the command line can do with the folder is possible too.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pagoda.acceleration import Plan, accelerate
from pagoda.diffusion import Condition, sample
from pagoda.errors import ConfigError
from pagoda.images import to_pil
from pagoda.networks import OneStepGenerator, PixelCodec
from pagoda.pretraining import TechniqueConfig
from pagoda.stages.adopt import teacher_settings
from pagoda.stages.captions import sample_prompts
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.run_codec import named_factor, open_run_codec
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import check_labels, load_generator, sample_images
from pagoda.stages.train import train
from pagoda.stages.unread_settings import check_read
from pagoda.training import noise_of_seeds


class _TemporaryFolder:
    """A folder that goes when the last object that uses it goes, or when Python ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pagoda-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Teacher:
    """A diffusion model of down-sampled images.

    Attributes:
        run: Its folder.
    """

    run: RunFolder
    _kept: _TemporaryFolder | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Side of its images in pixels."""
        return self.run.config().base

    def sample(
        self,
        n: int = 1,
        *,
        label: int | None = None,
        prompt: str | Sequence[str] = (),
        seed: int = 0,
        plans: Sequence[Plan] = (),
    ) -> list[Image.Image]:
        """Images by Heun's method at 18 noise levels (35 network calls): slow, for comparison.

        `plans` make it cheaper, see `pagoda.acceleration`: e.g. `plans=[DeepCache(interval=2)]`. `label` and `prompt`: see
        `Generator.sample`.

        Raises:
            ConfigError: a label out of range.
        """
        denoiser, facts = load_teacher(self.run.teacher)
        seeds = list(range(seed, seed + n))
        num_classes, channels = int(str(facts["num_classes"])), int(str(facts["channels"]))
        labels = check_labels(None if label is None else [label] * n, seeds, num_classes)
        z = noise_of_seeds(seeds, (channels, self.size, self.size))
        texts = sample_prompts(self.run, seeds, [prompt] if isinstance(prompt, str) else prompt)[1]
        condition = Condition.of_labels(labels) if texts is None else texts
        codec = open_run_codec(self.run) or PixelCodec(channels)
        with accelerate(denoiser, *plans) if plans else nullcontext():
            return to_pil(codec.pictures(sample(denoiser, z, condition=condition)))


@dataclass(frozen=True)
class Generator:
    """A one-step generator.

    Attributes:
        run: Its folder.
        size: Side of its images in pixels.
    """

    run: RunFolder
    size: int
    _kept: _TemporaryFolder | None = field(default=None, repr=False)

    @property
    def model(self) -> OneStepGenerator:
        """The network, read from the folder."""
        return load_generator(self.run, self.size)

    def sample(
        self,
        n: int = 1,
        *,
        label: int | None = None,
        prompt: str | Sequence[str] = (),
        seed: int = 0,
        resolution: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """One network call for all images; the image of a seed is always the same.

        Args:
            n: How many.
            label: Class of all images; every class in turn when None.
            prompt: A text for all images, or several in turn, for a run that reads texts; captions of the data when empty.
            seed: Seed of the first image; the next ones count up.
            resolution: Side in pixels; the largest when None.
            guidance: Guidance weight of a generator that was trained with it (`guidance.scale_max`); 1, which is none, when None.

        Raises:
            ConfigError: a label out of range, or a guidance weight outside of the trained range.
            ShapeError: a resolution that the generator does not have.
        """
        labels = None if label is None else [label] * n
        seeds = range(seed, seed + n)
        texts = sample_prompts(self.run, seeds, [prompt] if isinstance(prompt, str) else prompt)[1]
        images = sample_images(
            self.model, seeds, labels=labels, condition=texts, resolution=resolution, guidance=guidance
        )
        return to_pil(images)


def teach(
    data: str | Path,
    *,
    size: int,
    out: str | Path | None = None,
    preset: str = "small",
    settings: Mapping[str, Any] | None = None,
    techniques: Sequence[str | TechniqueConfig | Mapping[str, Any]] = (),
    quiet: bool = False,
) -> Teacher:
    """Train a diffusion model of the down-sampled images.

    Args:
        data: Folder of images, zip, IDX folder, parquet file, hub name, or "shapes".
        size: Side of the down-sampled images, in pixels.
        out: Run folder, continued when it is there; a temporary one when None.
        preset: tiny, small, base, official or pagoda.
        settings: Single settings by dotted key, e.g. `{"teach.loop.steps": 500}`; those of later stages too.
        techniques: What changes the training: names, configurations, or names with options (see `pagoda techniques`).
        quiet: Print nothing.

    Raises:
        PagodaError: bad data, settings or artefacts, before the long work starts.
    """
    kept = _TemporaryFolder() if out is None else None
    folder = kept.path / "run" if kept is not None else Path(str(out))
    chosen = {"techniques": list(techniques)} if techniques else {}
    chosen = {**(settings or {}), **chosen}
    factor = named_factor(str(chosen.get("codec") or ""), folder, teacher=str(chosen.get("teacher.path") or ""))
    config = override(preset_config(preset, str(data), base=size, size=size, codec_factor=factor), chosen)
    check_read(config, settings or {})
    if (folder / "config.yaml").exists():  # a run that has grown since keeps its final size
        config = override(config, {"size": max(config.size, RunFolder(folder).config().size)})
    return Teacher(train(config, str(folder), until="teach", quiet=quiet), kept)


def adopt(
    path: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    preset: str = "small",
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Teacher:
    """Take a diffusion model that was trained elsewhere in place of `teach`; `distill` and `grow` then go on as always.

    Args:
        path: A diffusers folder: a pipeline, or a network with its scheduler's configuration beside it.
        data: Images like those that it was trained on, labelled as they were; see `teach`.
        out: Run folder, continued when it is there; a temporary one when None.
        preset: tiny, small or base: lengths of the later stages.
        settings: Single settings by dotted key; those of later stages too.
        quiet: Print nothing.

    Raises:
        PagodaError: no teacher, or one that suits neither pagoda nor the data.
    """
    kept = _TemporaryFolder() if out is None else None
    folder = kept.path / "run" if kept is not None else Path(str(out))
    given = dict(settings or {})
    whole = preset_config(preset, str(data), base=32, size=32)  # of the right sizes once the teacher's is known
    suitable = teacher_settings(str(path), given, config=whole)
    size = suitable["base"]
    chosen = {**suitable, **given}
    factor = named_factor(str(chosen.get("codec") or ""), folder, teacher=str(path))
    config = override(preset_config(preset, str(data), base=size, size=size, codec_factor=factor), chosen)
    check_read(config, given)
    if (folder / "config.yaml").exists():  # a run that has grown since keeps its final size
        config = override(config, {"size": max(config.size, RunFolder(folder).config().size)})
    return Teacher(train(config, str(folder), until="teach", quiet=quiet), kept)


def distill(
    teacher: Teacher,
    data: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Generator:
    """Invert every image to its latent and distil the teacher into a one-step generator of its size.

    Args:
        teacher: From `teach` or `adopt`.
        data: The teacher's own data, for readers' sake; other data are refused.
        settings: Settings of the stages `encode` and `distill` by dotted key.
        quiet: Print nothing.

    Raises:
        ConfigError: other data than the teacher's.
        PagodaError: as `teach`.
    """
    config = _continue(teacher.run, data, settings)
    run = train(config, str(teacher.run.path), until="distill", quiet=quiet)
    return Generator(run, config.base, teacher._kept)


def grow(
    generator: Generator,
    data: str | Path | None = None,
    *,
    size: int,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Generator:
    """Grow a generator octave by octave to `size`; the levels below stay as they are.

    Args:
        generator: From `distill` or `grow`.
        data: The generator's own data, for readers' sake; other data are refused.
        size: Side of the images, in pixels: the base size times a power of two.
        settings: Settings of the stage `grow` by dotted key.
        quiet: Print nothing.

    Raises:
        ConfigError: other data, or a size that is not an octave.
        DataError: images smaller than `size`.
        PagodaError: as `teach`.
    """
    config = _continue(generator.run, data, settings, size=size)
    run = train(config, str(generator.run.path), until="grow", quiet=quiet)
    return Generator(run, size, generator._kept)


def _continue(run: RunFolder, data: str | Path | None, settings: Mapping[str, Any] | None, **changes: Any) -> RunConfig:
    config = run.config()
    if data is not None and str(data) != config.data:
        raise ConfigError(f"this model was made from {config.data!r}, not from {str(data)!r}; start anew with `teach`.")
    config = override(config, {**(settings or {}), **changes})
    check_read(config, settings or {})
    return config
