"""The one-step generator: unit-variance noise at the base size -> image, in one call; it grows by octaves.

The base is a copy of the teacher, seen at sigma_max only. Levels follow it, each twice the size of the one below, each with
a head of its own: `resolution` chooses where to stop.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin  # diffusers' pipelines look for it in the module of a component's class
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.diffusion.denoiser import PreconditionedDenoiser, precondition
from pagoda.errors import ConfigError, ShapeError, did_you_mean
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import (
    DiffusersNetwork,
    config_of,
    count_classes,
    disable_dropout,
    keep_mean,
    square_size,
    token_width,
)
from pagoda.networks.codecs import ImageCodec, PixelCodec
from pagoda.networks.description import build_model, describe_model
from pagoda.networks.growth import GrowthLevel, LevelConfig, carry_over, count_groups
from pagoda.networks.guidance import GuidanceEmbedding, resolve_guidance, shifted_state, split_guidance
from pagoda.networks.null_condition import NullCondition
from pagoda.networks.parts import Anatomy
from pagoda.networks.safe_model import SafeModel
from pagoda.networks.transformer_anatomy import TransformerAnatomy

OUTPUTS = ("denoiser", "raw", "unit")
Output = Literal["denoiser", "raw", "unit"]


class OneStepGenerator(SafeModel, ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own mixins disagree
    """Noise (B, C, b, b) of unit variance -> image (B, C, r, r), r = b * 2^k.

    Made by `from_teacher`, enlarged by `grow`, saved and loaded by diffusers' `save_pretrained` and `from_pretrained`.

    Args:
        base_config: Config of the base model, with its class under `_class_name`. Its dropout is the teacher's and not applied.
        output: "denoiser": image = c_skip sigma_max z + c_out F, so that it starts as the teacher's denoiser at
            sigma_max. "raw": image = F, the official choice, which starts at about twice that. "unit": the denoiser divided
            by |c_out|, for teachers that predict eps: their c_out is -sigma_max, and would multiply every error of the
            network by as much. It starts nearly grey.
        sigma_max: Noise level at which the base is called, in the units of the data.
        sigma_data: Standard deviation of the data.
        noise_scale: The base's noise input is noise_scale * ln(sigma_max).
        levels: `LevelConfig` fields of each level, the lowest first.
        guidance_max: Largest guidance weight that it is trained with; it then takes `Condition.guidance` from 1 (none) up
            to this. None: it takes no weight.
        scheduler: Configuration of the diffusers scheduler that the base was trained with; sigma_data and noise_scale are then not
            read. None: EDM preconditioning.
        null_condition: Shapes of what the base receives in slots that a condition lacks; see `NullCondition`.
        reads_texts: Whether a base with a null condition takes prompts: it was trained on a text an image. One without a null
            condition does where it has an input for them.

    Raises:
        ConfigError: an unknown output or base class, or noise levels that are not positive.
        ShapeError: the base config names no size.
    """

    @register_to_config
    def __init__(
        self,
        base_config: dict[str, Any],
        output: Output = "denoiser",
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_scale: float = 250.0,
        levels: list[dict[str, Any]] | None = None,
        guidance_max: float | None = None,
        scheduler: dict[str, Any] | None = None,
        null_condition: dict[str, list[int]] | None = None,
        reads_texts: bool = False,
    ) -> None:
        super().__init__()
        if guidance_max is not None and guidance_max <= 1:
            raise ConfigError(
                f"guidance_max must be above 1 (1 is no guidance), got {guidance_max}; None takes no weight."
            )
        if output not in OUTPUTS:
            raise ConfigError(f"unknown generator output {output!r}. {did_you_mean(str(output), OUTPUTS)}")
        if sigma_max <= 0 or sigma_data <= 0:
            raise ConfigError(f"sigma_max={sigma_max} and sigma_data={sigma_data} must be > 0.")
        # Submodules are not named like config entries: diffusers would answer with the entry.
        self.base: Any = build_model(base_config)
        disable_dropout(self.base)
        size = square_size(self.base)
        if size is None:
            raise ShapeError("the base model's config has no sample_size; give the side of its images in pixels.")
        self.base_size = size
        self.num_classes = count_classes(self.base)
        # A base that was told one text of every image takes no prompts: they are for those that were trained on texts.
        self.token_dim = 0 if null_condition is not None and not reads_texts else token_width(self.base) or 0
        self._denoiser = precondition(  # for its scalings
            _unused_network, sigma_data=sigma_data, noise_scale=noise_scale, scheduler=scheduler
        )
        # Looked up once: a schedule's table is no part of exported graphs.
        self._scheduled = None if scheduler is None else _constants(self._denoiser, sigma_max)
        self.null: Any = None if null_condition is None else NullCondition(null_condition)
        parts = self._parts
        self._base_width = parts.channels(parts.names()[-2])
        width = self._base_width
        self.octaves: Any = nn.ModuleList()
        for fields in levels or []:
            level = LevelConfig(**fields)
            self.octaves.append(
                GrowthLevel(
                    level,
                    lower_channels=width,
                    image_channels=self.channels,
                    embedding_dim=parts.embedding_dim,
                )
            )
            width = level.channels
        # Last, and zero at first: the weights of everything else, and the images, are those of a generator without it.
        self.guided = None if guidance_max is None else GuidanceEmbedding(parts.embedding_dim)
        self._frozen: list[nn.Module] = []
        self.use_codec(PixelCodec(self.channels))
        # Random Fourier features, for one, are parameters that are never trained.
        self._fixed = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    @classmethod
    def from_teacher(
        cls,
        model: nn.Module,
        *,
        output: Output = "denoiser",
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_scale: float = 250.0,
        guidance_max: float | None = None,
        scheduler: Mapping[str, Any] | None = None,
        reads_texts: bool = False,
    ) -> OneStepGenerator:
        """A generator of the teacher's architecture and size that starts from a copy of its weights.

        Args:
            model: The teacher's network, a diffusers model or a `DiffusersNetwork`, whose null condition is then taken over; left
                as it is.
            output: See the class.
            sigma_max: As the latents were made with.
            sigma_data: As the teacher was trained with.
            noise_scale: As the teacher was trained with.
            guidance_max: See the class. The weight's embedding is drawn from torch's global generator.
            scheduler: As the teacher was trained with; None: EDM preconditioning.
            reads_texts: See the class.

        Raises:
            ConfigError: a model without anatomy, an unknown output, or a sigma_max outside of the schedule.
            ShapeError: its config names no size, or one that is not square.
        """
        null: NullCondition | None = None
        if isinstance(model, DiffusersNetwork):
            null, model = model.null, model.model
        generator = cls(
            base_config=describe_model(model),
            output=output,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            noise_scale=noise_scale,
            guidance_max=guidance_max,
            scheduler=None if scheduler is None else dict(scheduler),
            null_condition=None if null is None else null.shapes,
            reads_texts=reads_texts,
        )
        _match(generator, model)
        carry_over(model, generator.base)
        if null is not None:
            carry_over(null, generator.null)
        return generator

    # Shape.

    @property
    def sizes(self) -> list[int]:
        """Sides of the images that it can make, in pixels, the base first."""
        return [self.base_size * 2**k for k in range(len(self.octaves) + 1)]

    @property
    def size(self) -> int:
        """Side of the largest images."""
        return self.sizes[-1]

    @property
    def channels(self) -> int:
        """Channels of noise and image."""
        return int(config_of(self.base).in_channels)

    @property
    def sigma_max(self) -> float:
        """Noise level at which the base is called."""
        return float(config_of(self).sigma_max)

    @property
    def guidance_max(self) -> float | None:
        """Largest guidance weight that it takes; None where it takes none."""
        found: float | None = config_of(self).guidance_max
        return found

    @property
    def _parts(self) -> Anatomy:
        return anatomy(self.base)

    def _index(self, size: int) -> int:
        """Number of levels below `size`."""
        if size not in self.sizes:
            raise ShapeError(f"no level of this generator makes {size} px; accepted are {self.sizes}. Grow it first?")
        return self.sizes.index(size)

    # Running.

    @overload
    def forward(
        self,
        z: Tensor,
        condition: Condition = ...,
        *,
        resolution: int | None = ...,
        return_all: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, z: Tensor, condition: Condition = ..., *, resolution: int | None = ..., return_all: Literal[True]
    ) -> dict[int, Tensor]: ...

    def forward(
        self,
        z: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        resolution: int | None = None,
        return_all: bool = False,
    ) -> Tensor | dict[int, Tensor]:
        """Make images.

        Args:
            z: Noise (B, C, b, b) of unit variance; the base size at every resolution.
            condition: Labels (-1 = none), or whatever the teacher took; with `guidance_max` also guidance weights, 1 when absent.
            resolution: Side of the images; None = the largest.
            return_all: Also give the image of every smaller level.

        Returns:
            Images (B, C, r, r), nominally in [-1, 1] and not clamped; with `return_all` a dict side -> images.

        Raises:
            ShapeError: `resolution` is not one of `sizes`, or z has another shape.
            ConfigError: the condition does not suit the base, or a guidance weight lies outside of [1, guidance_max].
        """
        top = len(self.octaves) if resolution is None else self._index(resolution)
        images: dict[int, Tensor] = {}
        for size, (_, rgb, _) in zip(self.sizes[: top + 1], self._run(z, condition), strict=False):
            if return_all:
                images[size] = rgb
        return images if return_all else rgb

    def lower_outputs(
        self, z: Tensor, condition: Condition = UNCONDITIONAL, size: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the level that makes `size` receives from below: worth caching where everything below is frozen.

        Args:
            z: Noise (B, C, b, b) of unit variance.
            condition: As in `forward`.
            size: Side of a grown level; None = the top one.

        Returns:
            Features (B, C_h, size/2, size/2), image (B, C, size/2, size/2) and embedding (B, E).

        Raises:
            ShapeError: nothing lies below `size`.
        """
        below = len(self.octaves) if size is None else self._index(size)
        if below == 0:
            raise ShapeError(f"nothing lies below the base size {self.base_size}; accepted are {self.sizes[1:]}.")
        outputs = self._run(z, condition)
        for _ in range(below - 1):
            next(outputs)
        return next(outputs)

    def forward_top(self, hidden: Tensor, rgb: Tensor, embedding: Tensor, size: int | None = None) -> Tensor:
        """Continue where `lower_outputs` stopped (same `size`) up to the largest image, (B, C, r, r).

        Raises:
            ShapeError: nothing lies below `size`.
        """
        return self.forward_levels(hidden, rgb, embedding, size)[self.size]

    def forward_levels(
        self, hidden: Tensor, rgb: Tensor, embedding: Tensor, size: int | None = None
    ) -> dict[int, Tensor]:
        """As `forward_top`, with the image of every level from `size` on: a dict side -> (B, C, side, side).

        Raises:
            ShapeError: nothing lies below `size`.
        """
        below = len(self.octaves) if size is None else self._index(size)
        if below == 0:
            raise ShapeError(f"nothing lies below the base size {self.base_size}; accepted are {self.sizes[1:]}.")
        images = {}
        for side, level in zip(self.sizes[below:], self.octaves[below - 1 :], strict=True):
            hidden, rgb = level(hidden, rgb, embedding)
            images[side] = rgb
        return images

    def _run(self, z: Tensor, condition: Condition) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(features, image, embedding) of the base, then of each level; computes no further than it is asked."""
        hidden, rgb, embedding = self._run_base(z, condition)
        yield hidden, rgb, embedding
        for level in self.octaves:
            hidden, rgb = level(hidden, rgb, embedding)
            yield hidden, rgb, embedding

    def _run_base(self, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        expected = (self.channels, self.base_size, self.base_size)
        if z.ndim != 4 or tuple(z.shape[1:]) != expected:
            raise ShapeError(f"noise must have shape (B, {', '.join(map(str, expected))}), got {tuple(z.shape)}.")
        sigma = torch.full((z.shape[0],), self.sigma_max, dtype=z.dtype, device=z.device)
        if self._scheduled is None:
            scalings, time = self._denoiser.scalings(sigma), self._denoiser.noise_input(sigma)
        else:
            *constants, time = (torch.full_like(sigma, value) for value in self._scheduled)
            scalings = (constants[0], constants[1], constants[2])
        c_skip, c_out, c_in = (c[:, None, None, None] for c in scalings)
        x = sigma[:, None, None, None] * z
        parts = self._parts
        if self.null is not None:
            condition = self.null.fill(condition, z.shape[0])
        shift = None
        if self.guided is not None:
            condition, weight = split_guidance(condition)
            shift = self.guided(resolve_guidance(weight, cast(float, self.guidance_max), z.shape[0], z))
        hidden, state = shifted_state(parts, c_in * x, time, condition, shift)
        rgb = keep_mean(parts.head(hidden, state), self.channels)
        if config_of(self).output == "denoiser":
            rgb = c_skip * x + c_out * rgb
        elif config_of(self).output == "unit":
            rgb = c_skip / c_out.abs() * x + c_out.sign() * rgb
        hidden = parts.as_map(hidden)
        if hidden.shape[-1] != self.base_size:  # a DiT's token grid, brought to the size of its image
            hidden = F.interpolate(hidden, size=z.shape[-2:], mode="nearest")
        return hidden, rgb, state.embedding

    # What it makes latents of.

    @property
    def codec(self) -> ImageCodec:
        """What turns its output into pictures: nothing to do for a generator of pixels. No part of its weights."""
        return cast(ImageCodec, self.__dict__["_codec"])

    def use_codec(self, codec: ImageCodec) -> None:
        """Let this codec decode what the generator makes.

        Raises:
            ShapeError: its latents have other channels.
        """
        if codec.latent_channels != self.channels:
            raise ShapeError(
                f"the generator makes {self.channels} channels, latents of this codec have {codec.latent_channels}; "
                "give the codec that it was trained with."
            )
        self.__dict__["_codec"] = codec  # past nn.Module, which would count it among the weights

    def pictures(self, made: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of what the generator made."""
        return self.codec.pictures(made)

    def picture_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the pictures of a size that it makes; the largest when None."""
        side = (self.size if resolution is None else resolution) * self.codec.factor
        return self.codec.image_channels, side, side

    # Growing.

    def grow(
        self,
        *,
        channels: int | None = None,
        num_blocks: int = 2,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        head_init: Literal["skip_rgb", "zero", "copy"] = "skip_rgb",
        use_rgb: bool = True,
        attention: bool = False,
    ) -> OneStepGenerator:
        """A new generator with one more octave; this one is unchanged.

        With `head_init="skip_rgb"`, ``grow()(z)`` starts as the bilinear enlargement of ``self(z)``, bit for bit; "zero"
        starts black (mid-grey); "copy" (official) applies the lower head to the enlarged features. New weights come from
        torch's global generator; every new parameter has a gradient from the third step on (zero-initialised layers wake
        up one after another). All parameters of the result are trainable: call `freeze_below`.

        Args:
            channels: Width of the new level; None = the width below.
            num_blocks: Residual blocks.
            upsample: How features are enlarged.
            head_init: See above.
            use_rgb: Whether the level also sees the enlarged lower image.
            attention: Self-attention after each block, the identity at first; for low sizes.

        Raises:
            ConfigError: an unknown choice; or "copy" where the level below has no head that draws the whole image.
            ShapeError: "copy" with another width than below.
            ArtifactError: a tensor of this generator did not arrive in the new one.
        """
        lower = int(self.octaves[-1].config.channels) if len(self.octaves) else self._base_width
        width = lower if channels is None else channels
        config = LevelConfig(
            channels=width,
            num_blocks=num_blocks,
            upsample=upsample,
            head_init=head_init,
            use_rgb=use_rgb,
            attention=attention,
            head_groups=count_groups(width),
        )
        if head_init == "copy":
            norm, conv, scale = self._copyable_head()
            if norm.num_channels != width:
                raise ShapeError(
                    f'head_init="copy" needs the width of the level below, {norm.num_channels}, got {width}; '
                    'use that width, or head_init="skip_rgb".'
                )
            config = replace(config, head_groups=norm.num_groups, head_eps=norm.eps)
        fields = {name: value for name, value in dict(config_of(self)).items() if not name.startswith("_")}
        fields["levels"] = [*(fields["levels"] or []), asdict(config)]
        grown = type(self)(**fields)
        grown.use_codec(self.codec)
        _match(grown, self)
        carry_over(self, grown)
        if head_init == "copy":
            grown.octaves[-1].copy_head(norm, conv, scale=scale)
        return grown.train(self.training)

    def _copyable_head(self) -> tuple[nn.GroupNorm, nn.Conv2d, float]:
        """Norm and conv of the top head, and what its output is multiplied by to give an image."""
        if len(self.octaves):
            level = self.octaves[-1]
            if level.config.head_init == "skip_rgb":
                raise ConfigError(
                    'head_init="copy" needs a head that draws the whole image, but the level below adds to an enlarged '
                    'image ("skip_rgb"); use head_init="skip_rgb" here too.'
                )
            return level.norm_out, level.conv_out, 1.0
        if isinstance(self._parts, TransformerAnatomy):
            raise ConfigError(
                'head_init="copy": a transformer has no convolutional head to copy; use head_init="skip_rgb".'
            )
        if self.base.conv_out.out_channels != self.channels:
            raise ConfigError('head_init="copy": the base also predicts a variance; use head_init="skip_rgb".')
        if config_of(self).output == "raw":
            return self.base.conv_norm_out, self.base.conv_out, 1.0
        _, c_out, _ = self._denoiser.scalings(torch.tensor(self.sigma_max, dtype=torch.float64))
        scale = float(c_out) if config_of(self).output == "denoiser" else float(c_out.sign())
        return self.base.conv_norm_out, self.base.conv_out, scale

    # Freezing.

    def freeze_below(self, boundary: int | str) -> list[str]:
        """Freeze everything below a boundary, and only that; frozen parts stay in eval mode whatever `train` says.

        Args:
            boundary: A size: everything that smaller images are made of is frozen (the base size freezes nothing).
                "top": the top size. Or a part of the base such as "decoder.9": the parts before it and the embedding are
                frozen, and every level is trained (the official recipe).

        Returns:
            Names of the frozen parameters.

        Raises:
            ShapeError: no level makes that size.
            ConfigError: the base has no such part.
        """
        if isinstance(boundary, str) and boundary != "top":
            parts = self._parts
            before = parts.names()[: parts.names().index(parts.check(boundary))]
            frozen = [module for name in ["embedding", *before] for module in parts.part(name)]
        else:
            below = self._index(self.size if boundary == "top" else int(boundary))
            frozen = [self.base, *self.octaves][:below]
        if frozen and self.guided is not None:
            frozen = [*frozen, self.guided]  # with the embedding that it is added to
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._fixed)
        for module in frozen:
            module.requires_grad_(False)
        self._frozen = frozen
        self.train(self.training)
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that are not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> OneStepGenerator:
        """Set training mode, except for frozen parts, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen if mode else []:
            module.eval()
        return self

    def last_layer(self, size: int | None = None) -> nn.Parameter:
        """Weight of the last layer that makes images of `size` (None = the top): adaptive loss weights compare its gradients.

        Raises:
            ShapeError: no level makes that size.
        """
        index = self._index(self.size if size is None else size)
        if index:
            return cast(nn.Parameter, self.octaves[index - 1].conv_out.weight)
        layer: Any = self._parts.part("head")[-1]  # conv_out, or what projects to patches
        return cast(nn.Parameter, layer.weight)


def _unused_network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    raise AssertionError("the generator runs its base through the anatomy")


def _constants(denoiser: PreconditionedDenoiser, sigma: float) -> tuple[float, float, float, float]:
    """c_skip, c_out, c_in and the network's time at one noise level."""
    level = torch.tensor([sigma], dtype=torch.float64)
    c_skip, c_out, c_in = (float(c) for c in denoiser.scalings(level))
    return c_skip, c_out, c_in, float(denoiser.noise_input(level))


def _match(module: nn.Module, like: nn.Module) -> None:
    """Bring a module to the device and type of another. diffusers' own `to` warns about every type."""
    parameter = next(like.parameters())
    nn.Module.to(module, device=parameter.device, dtype=parameter.dtype)
