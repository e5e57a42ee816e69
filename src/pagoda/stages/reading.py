"""A trained model as something to be read: a run, a teacher's folder, or a diffusers pipeline, with the images that suit it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagoda.data import (
    Downsampler,
    DownsamplerKind,
    ImageDataset,
    SourceConfig,
    check_source,
    open_source,
    prepare_images,
)
from pagoda.diffusion import Condition, Denoiser, precondition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import DiffusersNetwork, ImageCodec, model_hash, open_codec, open_pipeline_codec
from pagoda.networks.calling import null_of_zeros, takes_tokens, token_width
from pagoda.networks.loading import load_model
from pagoda.networks.teachers import read_scheduler
from pagoda.stages.captions import prompt_condition
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher
from pagoda.stages.pipeline_texts import PipelineTexts, reads_texts
from pagoda.stages.run_folder import RunFolder
from pagoda.training import Runtime


@dataclass(frozen=True)
class ReadableModel:
    """A frozen denoiser and what images it knows.

    Attributes:
        denoiser: In evaluation mode, without gradients.
        size: Side of its images in pixels.
        channels: 1 or 3.
        class_names: One name per class, or None without classes.
        source: How its own images were opened; other images are opened alike.
        downsampler: Kernel that made its images smaller.
        encode: Images -> latents, for a model of latents.
        sigma_max: Largest noise level that it is read at; None = as far as its schedule goes.
        embed: Texts -> condition, one row a text, for a model of texts.
    """

    denoiser: Denoiser
    size: int
    channels: int
    class_names: list[str] | None
    source: SourceConfig
    downsampler: DownsamplerKind
    encode: Callable[[Tensor], Tensor] | None = None
    sigma_max: float | None = None
    embed: Callable[[Sequence[str]], Condition] | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.denoiser.parameters()).device

    @property
    def hash(self) -> str:
        """Hash of the network's weights."""
        network: Any = self.denoiser
        return model_hash(network.network)

    def images(self, data: str, settings: Mapping[str, Any] | None = None, *, progress: bool = False) -> ImageDataset:
        """Other images, opened and reduced as the model's own were.

        Args:
            data: Folder, zip, IDX folder, parquet file, hub name, or `shapes`.
            settings: Dotted settings of the source on top of the model's own, such as `{"source.split": "test"}`.

        Raises:
            ConfigError: settings of anything else.
            DataError: images that cannot be read or are too small; all of them are named.
        """
        given = dict(settings or {})
        foreign = [key for key in given if not key.startswith("source.")]
        if foreign:
            raise ConfigError(f"only settings of the source are read here, such as source.pad; got {foreign}.")
        options = SourceConfig() if data.split(":")[0] == "shapes" else replace(
            self.source.for_other_images(), filter=None, mode="grey" if self.channels == 1 else "rgb"
        )  # fmt: skip
        options = override(options, {key.removeprefix("source."): value for key, value in given.items()})
        source = open_source(data, options=options)
        check_source(source, size=self.size, min_images=1, progress=progress).raise_if_bad()
        return prepare_images(
            source, sizes=(self.size,), downsampler=Downsampler(self.downsampler), cache_dir=None, progress=progress
        )


def open_readable(path: Path | str, *, device: str = "auto") -> ReadableModel:
    """The denoiser in a folder: a run of pagoda (its teacher), a teacher's folder, or a diffusers pipeline.

    Raises:
        ArtifactError: none of these, or weights that are not those that were written.
        ConfigError: a network or a scheduler that pagoda cannot read.
    """
    path = Path(path)
    target = Runtime(device).device
    if (path / "config.yaml").is_file():
        run = RunFolder.open(path)
        run.require("teach", f"pagoda teach DATA --out {path}")
        config = run.config()
        model = _open_teacher(run.teacher)
        source = SourceConfig() if config.data.split(":")[0] == "shapes" else config.source
        embed = partial(prompt_condition, run) if config.condition == "text" else None
        model = replace(model, source=source, downsampler=config.downsampler, embed=embed)
    elif (path / "denoiser.json").is_file():
        model = _open_teacher(path)
    elif (path / "model_index.json").is_file():
        model = _open_pipeline(path)
    else:
        raise ArtifactError(
            f"{path} is neither a run (config.yaml), nor a teacher (denoiser.json), nor a diffusers pipeline (model_index.json). "
            "Make a run with `pagoda teach DATA --out RUN`."
        )
    _fill_null(model.denoiser)
    model.denoiser.to(target).eval().requires_grad_(False)
    return model


def _fill_null(denoiser: Denoiser) -> None:
    """Where nobody gives a text, a network of texts is told none: what it saw in training when its text was dropped."""
    network: Any = denoiser.network
    if isinstance(network, DiffusersNetwork) and network.null is None and token_width(network.model):
        network.null = null_of_zeros(network.model)


def _open_teacher(path: Path) -> ReadableModel:
    denoiser, facts = load_teacher(path)
    known: Any = facts
    size, channels, encode = int(known["image_size"]), int(known["channels"]), None
    if "codec" in known:
        codec = _codec_beside(path)
        size, channels, encode = size * codec.factor, codec.image_channels, partial(_encode, codec)
    return ReadableModel(
        denoiser,
        size=size,
        channels=channels,
        class_names=known.get("class_names"),
        source=SourceConfig(),
        downsampler=Downsampler().kind,
        sigma_max=float(known["sigma_max"]),
        encode=encode,
    )


def _codec_beside(path: Path) -> ImageCodec:
    """The codec of the run that a teacher lies in.

    Raises:
        ConfigError: it is not there.
    """
    folder = path.parent / "codec"
    if not folder.is_dir():
        raise ConfigError(
            f"the teacher in {path} works on latents of a codec, and {folder} is not there; give the run that it comes from."
        )
    return open_codec(folder)


def _open_pipeline(path: Path) -> ReadableModel:
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    part = next((name for name in ("unet", "transformer", "model") if name in index), None)
    if part is None or "scheduler" not in index:
        raise ArtifactError(f"{path} names no `unet` or `transformer` with a `scheduler`; it has {sorted(index)}.")
    model = load_model(path / part)
    embed = PipelineTexts(path, index) if takes_tokens(model) and reads_texts(index) else None
    network = DiffusersNetwork(model, null=None if embed is None else embed.null())
    denoiser = precondition(network, scheduler=read_scheduler(path))
    side = network.sample_size
    if side is None:
        raise ConfigError(f"{path / part} does not say its `sample_size`; add it to its config.json.")
    vae, stride, channels = None, 1, network.in_channels
    if index.get("vae"):
        codec = open_pipeline_codec(path / "vae")
        vae, stride, channels = partial(_encode, codec), codec.factor, codec.image_channels
    names = [str(k) for k in range(network.num_classes)] if network.num_classes else None
    return ReadableModel(
        denoiser, side * stride, channels, names, SourceConfig(), Downsampler().kind, encode=vae, embed=embed
    )


def _encode(codec: ImageCodec, images: Tensor) -> Tensor:
    """Latents of images, where these are."""
    latents: Tensor = codec.to(images.device).encode(images)
    return latents
