"""Image codecs: images to the latents that a diffusion model works on, and back. A codec owns scale, shift and tiling.

| class | network | latent |
|---|---|---|
| `PixelCodec` | none | the image itself |
| `KLCodec` | `AutoencoderKL` | mean of the posterior, or a sample of it |
| `TinyCodec` | `AutoencoderTiny` | its only one |
| `VQCodec` | `VQModel` | before quantisation, which belongs to the decoder |

    latents = (z - shift) * scale,    z what the network gives

One global scale and shift, so that latents have mean 0 and the standard deviation that a diffusion model expects.

Source: Rombach et al. 2022, LDM, arXiv:2112.10752, section 3.1.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.networks.tiling import run_tiled

PIXELS_AT_ONCE = 1 << 22
"""Pixels of all images that `pictures` decodes in one call, at most: 16 images of 512 px."""
LATENT_STD = 0.5
"""What `fit_scale` brings latents to: the sigma_data of EDM preconditioning."""


class ImageCodec(nn.Module, ABC):
    """Images (B, C, H, W) in [-1, 1] to latents (B, c, H/f, W/f), and back. Frozen, in eval mode, differentiable.

    Attributes:
        factor: f, by which latents are smaller.
        image_channels: C.
        latent_channels: c.
        scale: Of the latents.
        shift: Of the latents.
        tile: Side of the tiles in pixels; larger images go through in tiles. None: never.
        overlap: Pixels that neighbouring tiles share.
    """

    factor: int
    image_channels: int
    latent_channels: int

    def __init__(self, *, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
            raise ConfigError(f"a codec needs a scale > 0 and a finite shift, got {scale} and {shift}.")
        self.scale, self.shift = scale, shift
        self.tile: int | None = None
        self.overlap = 0

    @abstractmethod
    def to_latents(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """The network's own latents, not scaled yet; `noise` chooses a sample of a posterior."""

    @abstractmethod
    def to_images(self, z: Tensor) -> Tensor:
        """Images of the network's own latents."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash over network, scale and shift: latents of codecs of different fingerprints do not mix. Tiles are no part of it."""

    @property
    def latents_fingerprint(self) -> str:
        """Hash over what decides latents and pictures: `fingerprint`, and the tiles where there are any."""
        if self.tile is None:
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint}|{self.tile}|{self.overlap}".encode()).hexdigest()

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images of `size` px.

        Raises:
            ShapeError: the factor does not divide the size.
        """
        self._check_sides(size, size)
        return self.latent_channels, size // self.factor, size // self.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images.

        Args:
            images: (B, C, H, W) in [-1, 1]; H and W multiples of `factor`.
            noise: Unit Gaussian, shaped like the latents: a sample of the posterior, where the codec has one. None: its mean.

        Raises:
            ShapeError: other channels or sides.
            DataError: values outside of [-1, 1].
            ConfigError: noise for a codec without a posterior, or together with tiles.
        """
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise ShapeError(f"images must have shape (B, {self.image_channels}, H, W), got {tuple(images.shape)}.")
        self._check_sides(*images.shape[-2:])
        largest = float(images.detach().abs().amax()) if images.numel() else 0.0
        if not largest <= 1 + 1e-3:
            raise DataError(f"images must lie in [-1, 1], got values up to {largest:.4g}. Bytes become x / 127.5 - 1.")
        if self.tile is None or max(images.shape[-2:]) <= self.tile:
            return self._scaled(self.to_latents(images, noise))
        if noise is not None:
            raise ConfigError("an image that goes through in tiles has no single posterior to sample; leave noise out.")
        return run_tiled(
            lambda part: self._scaled(self.to_latents(part, None)),
            images,
            tile=self.tile,
            overlap=self.overlap,
            shrink=self.factor,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) of latents (B, c, H/f, W/f), nominally in [-1, 1] and not clamped.

        Raises:
            ShapeError: other channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ShapeError(f"latents must have shape (B, {self.latent_channels}, h, w), got {tuple(latents.shape)}.")
        if self.tile is None or max(latents.shape[-2:]) * self.factor <= self.tile:
            return self.to_images(self._unscaled(latents))
        return run_tiled(
            lambda part: self.to_images(self._unscaled(part)),
            latents,
            tile=self.tile // self.factor,
            overlap=self.overlap // self.factor,
            enlarge=self.factor,
        )

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """What people and judges look at: decoded in float32, a few at once, and clamped to [-1, 1].

        The codec is moved to where the latents are.

        Args:
            latents: (B, c, h, w), as a network made them.

        Returns:
            Images (B, C, H, W) in [-1, 1], where the latents are.
        """
        self.to(latents.device)
        at_once = max(1, PIXELS_AT_ONCE // (latents.shape[-1] * latents.shape[-2] * self.factor**2))
        return torch.cat([self.decode(part.float()).clamp(-1, 1) for part in latents.split(at_once)])

    def bounded(self, latents: Tensor) -> Tensor:
        """Latents that a network made, brought back into the range of those of images where that range is known."""
        return latents

    def use_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """Let images larger than `tile` pixels through in tiles that share `overlap` pixels (a quarter when None); None: never.

        Raises:
            ConfigError: tiles that the factor does not divide, or that do not advance.
        """
        if tile is None:
            self.tile, self.overlap = None, 0
            return
        shared = tile // 4 // self.factor * self.factor if overlap is None else overlap
        if tile < 1 or tile % self.factor or shared % self.factor or not 0 <= shared < tile:
            raise ConfigError(
                f"tiles of {tile} px that share {shared} px: both must be multiples of {self.factor}, and 0 <= overlap < tile."
            )
        self.tile, self.overlap = tile, shared

    @torch.no_grad()
    def fit_scale(self, batches: Iterable[Tensor], *, std: float = LATENT_STD) -> None:
        """Choose shift and scale so that the latents of these images have mean 0 and standard deviation `std`.

        Args:
            batches: Images (B, C, H, W) in [-1, 1]; those of the training.

        Raises:
            DataError: no image, or latents without any spread.
        """
        self.scale, self.shift = 1.0, 0.0
        count, total, squares = 0, 0.0, 0.0
        for images in batches:
            z = self.encode(images).double()
            count, total, squares = count + z.numel(), total + float(z.sum()), squares + float(z.square().sum())
        spread = math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else 0.0
        if not spread > 0:
            raise DataError(
                "the latents of these images have no spread, so that no scale fits them; give other images."
            )
        self.scale, self.shift = std / spread, total / count

    def train(self, mode: bool = True) -> ImageCodec:
        """Does nothing: a frozen codec stays in eval mode."""
        return super().train(False)

    def _scaled(self, z: Tensor) -> Tensor:
        return z if (self.shift, self.scale) == (0.0, 1.0) else (z - self.shift) * self.scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents if (self.shift, self.scale) == (0.0, 1.0) else latents / self.scale + self.shift

    def _check_sides(self, height: int, width: int) -> None:
        if height < self.factor or height % self.factor or width % self.factor or width < self.factor:
            raise ShapeError(f"images of {height} x {width} px: each side must be a multiple of {self.factor}.")


class PixelCodec(ImageCodec):
    """No codec: the latents are the images themselves, bit for bit."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.factor, self.image_channels, self.latent_channels = 1, channels, channels

    def to_latents(self, images: Tensor, noise: Tensor | None) -> Tensor:
        refuse_noise(self, noise)
        return images

    def to_images(self, z: Tensor) -> Tensor:
        return z

    def pictures(self, latents: Tensor) -> Tensor:
        return latents.detach().float().clamp(-1, 1)

    def bounded(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    @property
    def fingerprint(self) -> str:
        return "pixels"


def refuse_noise(codec: ImageCodec, noise: Tensor | None) -> None:
    """Of a codec without a posterior.

    Raises:
        ConfigError: there is noise.
    """
    if noise is not None:
        raise ConfigError(f"`{type(codec).__name__}` has no posterior to sample; leave noise out.")
