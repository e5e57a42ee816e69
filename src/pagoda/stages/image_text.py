"""Image-text regularisation: generated images stay near their texts in the space of a frozen encoder of both.

    L_IT = E angle(e_image(crop(G(z, c))), e_text(c))^2,    z ~ N(0, I), c a caption of the data

Source: Sauer et al. 2023, StyleGAN-T, arXiv:2301.09515, section 4.2, taken over by Kim et al. 2024, PaGoDA, arXiv:2405.14822.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.networks import ImageCodec
from pagoda.stages.captions import encoder_folder
from pagoda.stages.config import LossConfig
from pagoda.stages.context import StageContext
from pagoda.text import TWO_TOWER, ImageTextEncoder, TransformersImageTextEncoder, spherical_distance
from pagoda.training import StepRandom

LARGEST_VIEW = 64
"""Larger images are seen through a random window of this side, in pixels, as in StyleGAN-T."""


class ImageTextTerm:
    """The distance of generated images to their captions.

    Args:
        encoder: Of both, frozen.
        texts: Vectors of the different captions (M, d), of unit length.
        rows: (N,) int64: which of them belongs to each image of the data.
        codec: Makes pictures of what a generator of latents makes, differentiably; None for a generator of pictures.
    """

    def __init__(self, encoder: ImageTextEncoder, texts: Tensor, rows: Tensor, codec: ImageCodec | None = None) -> None:
        self.encoder = encoder
        self._codec = codec
        self._texts = texts
        self._rows = rows

    def targets(self, indices: Tensor) -> Tensor:
        """The vectors (B, d) of the captions of images of the data."""
        return self._texts[self._rows[indices]]

    def distance(self, images: Tensor, targets: Tensor, random: StepRandom) -> Tensor:
        """Squared angles (B,) between images (B, C, H, W), or latents that are decoded first, and captions; differentiable."""
        if self._codec is not None:
            images = self._codec.decode(images)
        side = images.shape[-1]
        if side > LARGEST_VIEW:
            generator = random.generator("crop-text")
            top, left = (int(torch.randint(side - LARGEST_VIEW + 1, (), generator=generator)) for _ in range(2))
            images = images[..., top : top + LARGEST_VIEW, left : left + LARGEST_VIEW]
        return spherical_distance(self.encoder.embed_images(images), targets.to(images.device))


def open_image_text(
    context: StageContext, loss: LossConfig, encoder: ImageTextEncoder | None = None
) -> ImageTextTerm | None:
    """The term of a stage; None where its weight is 0.

    Args:
        encoder: One of your own, where the compute is; None opens the one that the loss names.

    Raises:
        ArtifactError: the encoder is missing.
        ConfigError: it has no image tower, or is given to a loss without the term.
    """
    if loss.image_text == 0:
        if encoder is not None:
            raise ConfigError(
                f"the encoder {encoder.fingerprint} is given for the image-text term, whose weight image_text is 0; give it a weight, or "
                "leave the encoder out."
            )
        return None
    assert context.captions is not None, "checked by the configuration"
    encoder = encoder or open_image_text_encoder(context, loss.image_text_encoder)
    return ImageTextTerm(encoder, encoder.embed_texts(context.captions.texts), context.captions.rows, context.codec)


def open_image_text_encoder(context: StageContext, name: str) -> ImageTextEncoder:
    """The encoder that a setting names: two-tower for the run's own, or a folder or hub name.

    Raises:
        ArtifactError: the encoder is missing.
        ConfigError: it has no image tower.
    """
    source = encoder_folder(context.run) if name == TWO_TOWER else name
    return TransformersImageTextEncoder(
        source, allow_download=context.config.text.allow_download, device=context.runtime.device
    )
