"""A discriminator that judges patches of images by themselves, for autoencoders: no outside weights, any domain.

Nothing in it looks across the batch (group norm where the original has batch norm).

Source: Isola et al. 2017, arXiv:1611.07004 (PatchGAN), as in Esser et al. 2021, VQGAN, arXiv:2012.09841.
"""

from __future__ import annotations

from torch import Tensor, nn

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.growth import count_groups


def check_patches(image_size: int, layers: int) -> None:
    """Refuse images of which no patch would be left.

    Raises:
        ShapeError: they are smaller than 3 * 2^layers pixels.
    """
    smallest = 3 * 2**layers
    if image_size < smallest:
        raise ShapeError(
            f"a patch discriminator of {layers} layers needs images of {smallest} px or more, got {image_size}; use fewer layers."
        )


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) -> logits (B, P), one a patch; positive = real.

    Args:
        channels: Of the images.
        width: Of the first layer; doubled by each further one, up to 8 times.
        layers: Convolutions of stride 2; a patch is 16, 34 or 70 pixels wide for 1, 2 or 3 of them.
        image_size: Side of the smallest images that it will see.

    Raises:
        ConfigError: a number below 1.
        ShapeError: images so small that no logit would be left.
    """

    def __init__(self, channels: int = 3, *, width: int = 64, layers: int = 3, image_size: int) -> None:
        super().__init__()
        if min(channels, width, layers) < 1:
            raise ConfigError(f"channels, width and layers must be at least 1, got {channels}, {width} and {layers}.")
        check_patches(image_size, layers)
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for layer in range(1, layers + 1):
            after = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            conv = nn.Conv2d(before, after, 4, stride, 1, bias=False)
            modules += [conv, nn.GroupNorm(count_groups(after), after), nn.LeakyReLU(0.2)]
            before = after
        modules.append(nn.Conv2d(before, 1, 4, 1, 1))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, P)."""
        logits: Tensor = self.layers(images)
        return logits.flatten(1)
