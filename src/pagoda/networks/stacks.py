"""Feature stacks by name, and their configuration: which frozen networks look at images, and at which of their layers.

| name | network |
|---|---|
| `teacher` | the run's own diffusion model at a small noise level: no outside weights, any domain |
| `random`, `random:SEED` | a fixed random convolutional network |
| `transformers:SOURCE` | a vision model of transformers: DINOv2, CLIP, DeiT, ConvNeXt, ... |
| `timm:SOURCE` | a model of timm |

SOURCE is a local folder or a name on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagoda.diffusion.denoiser import PreconditionedDenoiser
from pagoda.errors import ConfigError, did_you_mean
from pagoda.networks.calling import DiffusersNetwork
from pagoda.networks.codecs import ImageCodec, PixelCodec
from pagoda.networks.features import DecodedFeatures, FeatureStack, RandomFeatures, TeacherFeatures
from pagoda.networks.mixing import JoinedFeatures, MixedFeatures
from pagoda.networks.outside import TransformersFeatures
from pagoda.networks.pretrained import check_timm, check_transformers, open_timm, open_transformers

STACKS = ("teacher", "random", "transformers", "timm")
TEACHER_SIGMA = 0.1
"""Noise level at which the teacher looks where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which frozen networks look at images."""

    networks: tuple[str, ...] = ("teacher",)
    """teacher, random, random:SEED, transformers:SOURCE, timm:SOURCE; the maps of several are joined."""
    sigma: float = TEACHER_SIGMA
    """Noise level at which the teacher looks, in the units of the images."""
    layers: tuple[str, ...] = ()
    """Parts of the teacher (such as encoder.1), or numbers of the layers of a network from outside; () for a spread of them."""
    size: int = 0
    """Side in pixels that images are resized to for networks from outside; 0 for the network's own."""
    mixing: bool = False
    """Mix channels and scales by fixed random matrices, which are saved with the run."""
    allow_download: bool = False
    """Fetch networks from the hub that are not in its cache."""

    def __post_init__(self) -> None:
        if not self.networks:
            raise ConfigError(f"a feature stack needs at least one network; {did_you_mean('', STACKS)}")
        for text in self.networks:
            name, _, source = text.partition(":")
            if name not in STACKS:
                raise ConfigError(f"unknown feature network `{text}`. {did_you_mean(name, STACKS)}")
            if name in ("transformers", "timm") and not source:
                raise ConfigError(f"`{text}` needs a folder or a name on the hub, as in `{name}:FOLDER`.")
            if name == "teacher" and source:
                raise ConfigError(f"`{text}`: the teacher is the run's own; its layers and noise level have settings.")
            if name == "random" and source and not source.isdecimal():
                raise ConfigError(f"`{text}`: what follows `random:` is a seed, a number from 0.")
        kinds = self.kinds
        if self.sigma <= 0:
            raise ConfigError(f"sigma of a feature stack must be > 0, got {self.sigma}.")
        if self.sigma != TEACHER_SIGMA and "teacher" not in kinds:
            raise ConfigError(f"sigma={self.sigma} is the teacher's noise level, but networks are {self.networks}.")
        outside = {"transformers", "timm"} & kinds
        if self.size < 0 or (self.size and not outside):
            raise ConfigError(
                f"size={self.size} resizes images for networks from outside, but networks are {self.networks}."
            )
        if self.allow_download and not outside:
            raise ConfigError(f"allow_download has nothing to fetch: networks are {self.networks}.")
        if self.layers:
            if len(self.networks) > 1 or "random" in kinds:
                raise ConfigError(
                    f"layers={self.layers} belong to one teacher or one network from outside, but networks are {self.networks}."
                )
            if outside and not all(layer.isdecimal() for layer in self.layers):
                raise ConfigError(f"layers of `{self.networks[0]}` are numbers from 0, got {self.layers}.")

    @property
    def kinds(self) -> set[str]:
        """Names of the kinds of network."""
        return {text.partition(":")[0] for text in self.networks}


def check_features(config: FeatureConfig) -> None:
    """Refuse what is missing (packages, files) before the long work starts; reads no weights.

    Raises:
        ArtifactError: which file is missing, and where it belongs.
        MissingExtraError: a package is missing.
    """
    checks = {"transformers": check_transformers, "timm": check_timm}
    for text in config.networks:
        name, _, source = text.partition(":")
        if name in checks:
            checks[name](source, allow_download=config.allow_download)


def build_features(
    config: FeatureConfig,
    *,
    teacher: Callable[[], PreconditionedDenoiser],
    in_channels: int,
    seed: int,
    codec: ImageCodec | None = None,
) -> FeatureStack:
    """The feature stack that a configuration names, frozen, on the CPU or where the teacher is.

    Args:
        config: Which networks.
        teacher: Gives the run's diffusion model; called only where it is asked for.
        in_channels: Channels of the images, or of latents.
        seed: Draws the mixing.
        codec: Of latents: networks from outside then look at what it decodes, the others at the latents themselves.

    Raises:
        ArtifactError: weights that are missing; the message says which file and where it belongs.
        MissingExtraError: a package is missing.
        ConfigError: layers, a size or channels that a network does not have.
    """
    stacks = [_open(text, config, teacher, in_channels, codec) for text in config.networks]
    if config.mixing:  # each network by itself: the maps of one are no coarser view of another's
        stacks = [MixedFeatures(stack, seed=seed + index) for index, stack in enumerate(stacks)]
    return stacks[0] if len(stacks) == 1 else JoinedFeatures(stacks)


def _open(
    text: str,
    config: FeatureConfig,
    teacher: Callable[[], PreconditionedDenoiser],
    in_channels: int,
    codec: ImageCodec | None,
) -> FeatureStack:
    name, _, source = text.partition(":")
    numbers = [int(layer) for layer in config.layers] if config.layers and name != "teacher" else None
    if name == "teacher":
        denoiser = teacher()
        assert isinstance(denoiser.network, DiffusersNetwork)
        return TeacherFeatures(
            denoiser.network, sigma=config.sigma, names=config.layers or None, **denoiser.preconditioning
        )
    if name == "random":
        return RandomFeatures(in_channels, seed=int(source or 0))
    if codec is not None and not isinstance(codec, PixelCodec):
        return DecodedFeatures(_open(text, config, teacher, codec.image_channels, None), codec)
    if name == "transformers":
        model, statistics = open_transformers(source, allow_download=config.allow_download)
        return TransformersFeatures(
            model, in_channels=in_channels, layers=numbers, size=config.size or None, statistics=statistics
        )
    return open_timm(
        source,
        in_channels=in_channels,
        layers=numbers,
        size=config.size or None,
        allow_download=config.allow_download,
    )
