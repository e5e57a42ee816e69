"""The autoencoders of diffusers as image codecs, and how they are read from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor, nn

from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import write_text_atomic
from pagoda.networks.calling import config_of, model_hash
from pagoda.networks.codecs import ImageCodec, refuse_noise
from pagoda.networks.loading import find_weights

CODEC_FILE = "codec.json"
"""Beside the weights of a codec that pagoda wrote: its scale and shift, and its tiles where it has any."""


class AutoencoderCodec(ImageCodec):
    """An autoencoder of diffusers.

    Args:
        model: Kept, not copied; frozen.
        scale: Of the latents.
        shift: Of the latents.

    Raises:
        ConfigError: a model that normalises each latent channel by itself.
    """

    kind: Any
    """Its class in diffusers."""

    def __init__(self, model: nn.Module, *, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(scale=scale, shift=shift)
        config = config_of(model)
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ConfigError(
                "latents_mean and latents_std (a scale for each channel) are not supported; scaling_factor is."
            )
        self.model: Any = model
        self.factor = 2 ** (len(self.widths) - 1)
        self.image_channels, self.latent_channels = int(config.in_channels), int(config.latent_channels)
        self.requires_grad_(False)
        self.eval()

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each level of the encoder."""
        return tuple(config_of(self.model).block_out_channels)

    def to_images(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.model.decode(z).sample)

    @property
    def fingerprint(self) -> str:
        text = f"{type(self).__name__}|{model_hash(self.model)}|{self.scale!r}|{self.shift!r}"
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write network, scale, shift and tiles as a diffusers folder."""
        config = {"scaling_factor": self.scale}
        if "shift_factor" in config_of(self.model):
            config["shift_factor"] = self.shift
        self.model.register_to_config(**config)
        self.model.save_pretrained(folder)
        self.save_facts(folder)

    def save_facts(self, folder: Path) -> None:
        """Write scale, shift and tiles beside the network's own files, which must be in `folder`."""
        facts: dict[str, Any] = {"scale": self.scale, "shift": self.shift, "fingerprint": self.fingerprint}
        if self.tile is not None:  # absent otherwise, as in earlier versions
            facts |= {"tile": self.tile, "overlap": self.overlap}
        write_text_atomic(folder / CODEC_FILE, json.dumps(facts, indent=1))


class KLCodec(AutoencoderCodec):
    """An `AutoencoderKL`."""

    kind = AutoencoderKL

    def to_latents(self, images: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.model.encode(images).latent_dist
        mean: Tensor = posterior.mean
        return mean if noise is None else mean + posterior.std * noise


class TinyCodec(AutoencoderCodec):
    """An `AutoencoderTiny`."""

    kind = AutoencoderTiny

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(config_of(self.model).encoder_block_out_channels)

    def to_latents(self, images: Tensor, noise: Tensor | None) -> Tensor:
        refuse_noise(self, noise)
        return cast(Tensor, self.model.encode(images).latents)


class VQCodec(AutoencoderCodec):
    """A `VQModel`; its latents are those before quantisation."""

    kind = VQModel

    def __init__(self, model: nn.Module, *, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(model, scale=scale, shift=shift)
        self.latent_channels = int(config_of(model).vq_embed_dim or config_of(model).latent_channels)

    def to_latents(self, images: Tensor, noise: Tensor | None) -> Tensor:
        refuse_noise(self, noise)
        return cast(Tensor, self.model.encode(images).latents)


CODECS: dict[str, type[AutoencoderCodec]] = {kind.kind.__name__: kind for kind in (KLCodec, TinyCodec, VQCodec)}
"""By the class in diffusers."""


def wrap_autoencoder(model: nn.Module, *, scale: float = 1.0, shift: float = 0.0) -> AutoencoderCodec:
    """An autoencoder of diffusers as a codec.

    Raises:
        ConfigError: a class that is no codec.
    """
    name = type(model).__name__
    if name not in CODECS:
        raise ConfigError(f"a {name} is no image codec; codecs are {', '.join(sorted(CODECS))}.")
    return CODECS[name](model, scale=scale, shift=shift)


def open_codec(path: Path | str, *, scale: float | None = None, shift: float | None = None) -> AutoencoderCodec:
    """The codec in a diffusers folder.

    Args:
        scale: In place of the folder's own.
        shift: In place of the folder's own.

    Raises:
        ArtifactError: no autoencoder, no safetensors weights or truncated ones; no scale; or other weights than were written.
        ConfigError: a class that is no codec.
    """
    path = Path(path)
    wrapper, config = _read_config(path)
    variant = find_weights(path).variant
    written = _read_codec_file(path)
    found: Any = written.get("scale", config.get("scaling_factor"))
    if scale is None and not isinstance(found, int | float):
        # The class's own default, 0.18215, is that of one published model and wrong for every other.
        copy = " (of a copy of it: the folder is a pipeline's)" if in_pipeline(path) else ""
        raise ArtifactError(
            f"{path}/config.json has no scaling_factor: its latents have no known spread. Measure it on your images: "
            f"`pagoda codec scale {'COPY' if in_pipeline(path) else path} DATA`{copy}, or in Python "
            "`codec = open_codec(path, scale=1); codec.fit_scale([images]); codec.save(folder)`, with images (B, C, H, W) in [-1, 1]."
        )
    own_shift = written.get("shift", config.get("shift_factor")) or 0.0
    codec = wrapper(
        _load(path, wrapper, variant),
        scale=float(found if scale is None else scale),
        shift=float(own_shift if shift is None else shift),
    )
    if scale is None and shift is None:
        _check_written(codec, written, path)
    _take_tiles(codec, written)
    return codec


def in_pipeline(path: Path | str) -> bool:
    """Whether a folder is a part of a diffusers pipeline: one beside a `model_index.json`."""
    return (Path(path).absolute().parent / "model_index.json").is_file()


def open_pipeline_codec(path: Path | str) -> AutoencoderCodec:
    """The codec of a pipeline, with the scale that the pipeline itself uses and its network was therefore trained on.

    That is what its config.json says, and where it is silent the default of its class in diffusers.

    Raises:
        ArtifactError: no autoencoder, no safetensors weights or truncated ones; or a `codec.json` with another scale.
        ConfigError: a class that is no codec.
    """
    path = Path(path)
    wrapper, config = _read_config(path)
    model = _load(path, wrapper, find_weights(path).variant)
    used = {**config_of(model), **config}  # the first with the defaults of its class
    if not isinstance(used.get("scaling_factor"), int | float):
        raise ArtifactError(
            f"{path}/config.json has scaling_factor={used.get('scaling_factor')!r}, which is no number, so that its pipeline cannot use "
            "it either. Write the one that the network was trained with, or leave it out for the default of the class."
        )
    codec = wrapper(model, scale=float(used["scaling_factor"]), shift=float(used.get("shift_factor") or 0.0))
    written = _read_codec_file(path)
    other = (written.get("scale", codec.scale), written.get("shift", codec.shift))
    if other != (codec.scale, codec.shift):
        silent = f"config.json names none, so that it is the default of {type(model).__name__}"
        origin = "its config.json" if "scaling_factor" in config else silent
        raise ArtifactError(
            f"{path} is the codec of a pipeline, which uses the scale {codec.scale:.6g} and the shift {codec.shift:.6g} ({origin}); "
            f"{CODEC_FILE} beside it, which `pagoda codec scale` writes, says {other[0]:.6g} and {other[1]:.6g}. The pipeline's network "
            f"knows latents of its own scale alone: remove {path / CODEC_FILE}. Where it was trained on the other one, write that as "
            "scaling_factor and shift_factor into config.json."
        )
    _check_written(codec, written, path)
    _take_tiles(codec, written)
    return codec


def _read_config(path: Path) -> tuple[type[AutoencoderCodec], dict[str, Any]]:
    """The class of the codec in a folder, and its config.json."""
    try:
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a folder of an autoencoder ({error}).") from error
    name = config.get("_class_name")
    if name not in CODECS:
        raise ConfigError(f"{path} holds a {name}; codecs are {', '.join(sorted(CODECS))}.")
    return CODECS[str(name)], config


def _load(path: Path, wrapper: type[AutoencoderCodec], variant: str | None) -> Any:
    return wrapper.kind.from_pretrained(
        path, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, variant=variant
    )


def _check_written(codec: AutoencoderCodec, written: Mapping[str, Any], path: Path) -> None:
    if written.get("fingerprint", codec.fingerprint) != codec.fingerprint:
        raise ArtifactError(
            f"the weights in {path} are not those that {CODEC_FILE} was written with: exchanged or damaged."
        )


def _take_tiles(codec: AutoencoderCodec, written: Mapping[str, Any]) -> None:
    if "tile" in written:
        codec.use_tiles(int(written["tile"]), int(written["overlap"]))


def _read_codec_file(path: Path) -> dict[str, Any]:
    file = path / CODEC_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}). Make the codec again, or measure its scale.") from error
