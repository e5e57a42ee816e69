"""The inverse in one call: an image of base size -> the latent that the teacher's ODE would have carried it to.

Source: the amortised encoder of the official code of PaGoDA (Kim et al. 2024, arXiv:2405.14822), which the paper's captions do not
mention; the linear path around the network is ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.diffusion.denoiser import EDMDenoiser
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import DiffusersNetwork, config_of, count_classes, disable_dropout, keep_mean, square_size
from pagoda.networks.description import build_model, describe_model
from pagoda.networks.growth import carry_over, zero_layer
from pagoda.networks.guidance import GuidanceEmbedding, resolve_guidance, shifted_state, split_guidance
from pagoda.networks.safe_model import SafeModel


class LatentEncoder(SafeModel, ConfigMixin):  # type: ignore[misc]  # diffusers' own mixins disagree
    """Images at sigma_min (B, C, b, b) -> unit-scale latents (B, C, b, b): z = c x + F(c_in x, sigma_min, condition).

    c = sqrt((sd^2 + sigma_max^2) / (sd^2 + sigma_min^2)) / sigma_max is the exact map of Gaussian data of mean 0 and standard
    deviation sd = sigma_data. F is the teacher's network with its last layer at zero: so the encoder starts as that map.

    Args:
        base_config: Config of the base model, with its class under `_class_name`. Its dropout is the teacher's and not applied.
        sigma_min: Noise level at which images lie.
        sigma_max: Noise level at which latents live.
        sigma_data: Standard deviation of the data.
        noise_scale: The base's noise input is noise_scale * ln(sigma_min).
        guidance_max: Largest guidance weight that latents were encoded under; None for none.

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
        self._edm = EDMDenoiser(_no_network, sigma_data=sigma_data, noise_scale=noise_scale)  # for its scalings
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
    ) -> LatentEncoder:
        """An encoder that starts from a copy of the teacher, apart from its last layer, which is zero.

        Args:
            model: The teacher's network, a diffusers model or a `DiffusersNetwork`; left as it is.
            sigma_min, sigma_max, guidance_max: As the latents were made with.
            sigma_data, noise_scale: As the teacher was trained with.

        Raises:
            ConfigError: a model without anatomy, or noise levels out of order.
        """
        if isinstance(model, DiffusersNetwork):
            model = model.model
        encoder = cls(
            base_config=describe_model(model),
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            noise_scale=noise_scale,
            guidance_max=guidance_max,
        )
        like = next(model.parameters())
        nn.Module.to(encoder, device=like.device, dtype=like.dtype)  # diffusers' own `to` warns about every type
        carry_over(model, encoder.base)
        base = encoder.base
        zero_layer(base.proj_out_2 if isinstance(base, DiTTransformer2DModel) else base.conv_out)
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
        shift = None
        if self.guided is not None:
            condition, weight = split_guidance(condition)
            shift = self.guided(resolve_guidance(weight, cast(float, self.guidance_max), x.shape[0], x))
        sigma = torch.full((x.shape[0],), self.sigma_min, dtype=x.dtype, device=x.device)
        scaled, time = self._edm.network_input(x, sigma)
        parts = anatomy(self.base)
        hidden, state = shifted_state(parts, scaled, time, condition, shift)
        return self.linear * x + keep_mean(parts.head(hidden, state), self.channels)


def _no_network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    raise AssertionError("the encoder runs its base through the anatomy")
