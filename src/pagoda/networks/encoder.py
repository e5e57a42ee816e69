"""The inverse in one call: an image of base size -> the latent that the teacher's ODE would have carried it to.

Source: the amortised encoder of the official code of PaGoDA (Kim et al. 2024, arXiv:2405.14822), which the paper's captions do not
mention; the linear path around the network is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.diffusion.denoiser import precondition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import DiffusersNetwork, config_of, count_classes, disable_dropout, keep_mean, square_size
from pagoda.networks.description import build_model, describe_model
from pagoda.networks.growth import carry_over, zero_layer
from pagoda.networks.guidance import GuidanceEmbedding, resolve_guidance, shifted_state, split_guidance
from pagoda.networks.null_condition import NullCondition
from pagoda.networks.safe_model import SafeModel


class LatentEncoder(SafeModel, ConfigMixin):  # type: ignore[misc]  # diffusers' own mixins disagree
    """Images at sigma_min (B, C, b, b) -> unit-scale latents (B, C, b, b): z = c x + F(c_in x, sigma_min, condition).

    c = sqrt((sd^2 + sigma_max^2) / (sd^2 + sigma_min^2)) / sigma_max is the exact map of Gaussian data of mean 0 and standard
    deviation sd = sigma_data. F is the teacher's network with its last layer at zero: so the encoder starts as that map.

    Args:
        base_config: Config of the base model, with its class under `_class_name`. Its dropout is the teacher's and not applied.
        sigma_min: Noise level at which images lie.
        sigma_max: Noise level at which latents live.
        sigma_data: Standard deviation of the data; of the linear path, and of EDM preconditioning.
        noise_scale: The base's noise input is noise_scale * ln(sigma_min); not read where a scheduler is given.
        guidance_max: Largest guidance weight that latents were encoded under; None for none.
        scheduler: Configuration of the diffusers scheduler that the base was trained with: it gives c_in and the noise input. None: EDM
            preconditioning.
        null_condition: Shapes of what the base receives in slots that a condition lacks; see `NullCondition`.

    Raises:
        ConfigError: noise levels out of order.
        ShapeError: the base config names no size.
    """

    @register_to_config
    def __init__(
        self,
        base_config: dict[str, Any],
        sigma_min: float,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_scale: float = 250.0,
        guidance_max: float | None = None,
        scheduler: dict[str, Any] | None = None,
        null_condition: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ConfigError(f"an encoder needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        if guidance_max is not None and guidance_max <= 1:
            raise ConfigError(
                f"guidance_max must be above 1 (1 is no guidance), got {guidance_max}; None takes no weight."
            )
        self.base: Any = build_model(base_config)
        disable_dropout(self.base)
        size = square_size(self.base)
        if size is None:
            raise ShapeError("the base model's config has no sample_size; give the side of its images in pixels.")
        self.base_size = size
        self.num_classes = count_classes(self.base)
        self._denoiser: Any = precondition(  # for its scalings
            _no_network, sigma_data=sigma_data, noise_scale=noise_scale, scheduler=scheduler
        )
        self.null: Any = None if null_condition is None else NullCondition(null_condition)
        self.linear = ((sigma_data**2 + sigma_max**2) / (sigma_data**2 + sigma_min**2)) ** 0.5 / sigma_max
        self.guided = None if guidance_max is None else GuidanceEmbedding(anatomy(self.base).embedding_dim)

    @classmethod
    def from_teacher(
        cls,
        model: nn.Module,
        *,
        sigma_min: float,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_scale: float = 250.0,
        guidance_max: float | None = None,
        scheduler: Mapping[str, Any] | None = None,
    ) -> LatentEncoder:
        """An encoder that starts from a copy of the teacher, apart from its last layer, which is zero.

        Args:
            model: The teacher's network, a diffusers model or a `DiffusersNetwork`, whose null condition is then taken over; left
                as it is.
            sigma_min, sigma_max, guidance_max: As the latents were made with.
            sigma_data, noise_scale: As the teacher was trained with; sigma_data as measured where a scheduler is given.
            scheduler: As the teacher was trained with; None: EDM preconditioning.

        Raises:
            ConfigError: a model without anatomy, noise levels out of order, or a scheduler that cannot be read.
        """
        null: NullCondition | None = None
        if isinstance(model, DiffusersNetwork):
            null, model = model.null, model.model
        encoder = cls(
            base_config=describe_model(model),
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            noise_scale=noise_scale,
            guidance_max=guidance_max,
            scheduler=None if scheduler is None else dict(scheduler),
            null_condition=None if null is None else null.shapes,
        )
        like = next(model.parameters())
        nn.Module.to(encoder, device=like.device, dtype=like.dtype)  # diffusers' own `to` warns about every type
        carry_over(model, encoder.base)
        if null is not None:
            carry_over(null, encoder.null)
        zero_layer(anatomy(encoder.base).part("head")[-1])  # conv_out, or what projects to patches
        return encoder

    @property
    def channels(self) -> int:
        """Channels of image and latent."""
        return int(config_of(self.base).in_channels)

    @property
    def sigma_min(self) -> float:
        """Noise level at which images lie."""
        return float(config_of(self).sigma_min)

    @property
    def guidance_max(self) -> float | None:
        """Largest guidance weight that it takes; None where it takes none."""
        found: float | None = config_of(self).guidance_max
        return found

    def forward(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Encode.

        Args:
            x: Images at the level sigma_min (B, C, b, b): clean ones plus sigma_min times unit noise where the run's encoder adds
                noise, else the clean ones.
            condition: As the latents were made under; guidance weights are 1 when absent.

        Returns:
            Unit-scale latents (B, C, b, b).

        Raises:
            ShapeError: images of another size.
            ConfigError: the condition does not suit the base, or a guidance weight lies outside of the trained range.
        """
        expected = (self.channels, self.base_size, self.base_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ShapeError(f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}.")
        if self.null is not None:
            condition = self.null.fill(condition, x.shape[0])
        shift = None
        if self.guided is not None:
            condition, weight = split_guidance(condition)
            shift = self.guided(resolve_guidance(weight, cast(float, self.guidance_max), x.shape[0], x))
        sigma = torch.full((x.shape[0],), self.sigma_min, dtype=x.dtype, device=x.device)
        scaled, time = self._denoiser.network_input(x, sigma)
        parts = anatomy(self.base)
        hidden, state = shifted_state(parts, scaled, time, condition, shift)
        return self.linear * x + keep_mean(parts.head(hidden, state), self.channels)


def _no_network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    raise AssertionError("the encoder runs its base through the anatomy")
