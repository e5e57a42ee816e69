"""How far a reconstruction is from its image: pixels, features, and the published perceptual distance, each with its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.networks import LPIPS, DiffAugment, FeatureStack, feature_distance
from pagoda.stages.config import LossConfig
from pagoda.training import StepRandom


class ReconstructionLoss:
    """L_rec = pixel * pseudo-Huber + feature * feature distance + lpips * LPIPS, per sample.

    Args:
        config: Weights.
        features: Frozen stack of the feature distance; None leaves it out.
        lpips: None leaves it out.
        decode: What makes pictures for LPIPS, where images are latents; None: they are pictures.

    Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822, whose distance is the feature distance of augmented images alone.
    """

    def __init__(
        self,
        config: LossConfig,
        features: FeatureStack | None,
        lpips: LPIPS | None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.features = features
        self.lpips = lpips
        self.decode = decode or (lambda images: images)
        self.augment = DiffAugment(config.feature_augment)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is reconstructed."""
        return self.config.pixel == 0 and self.features is None and self.lpips is None

    def __call__(
        self, rebuilt: Tensor, real: Tensor, crop: Callable[[Tensor], Tensor], random: StepRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,), and its terms by name, without their weights.

        Args:
            rebuilt: Images (B, C, r, r).
            real: What they should be, nominally in [-1, 1].
            crop: The window that features look through.
            random: Draws of the step; both images of a pair are augmented by one of them.
        """
        config = self.config
        named = {"reconstruction": pseudo_huber(rebuilt - real, config.huber)}
        total = config.pixel * named["reconstruction"]
        if self.features is not None:
            seen = [crop(rebuilt), crop(real)]
            if self.augment.policy:
                draw = draw_augmentation(self.augment, random, "feature", real.device)
                seen = [self.augment.apply(images, draw) for images in seen]
            named["feature"] = feature_distance(self.features(seen[0]), self.features(seen[1]))
            total = total + config.feature * named["feature"]
        if self.lpips is not None:
            seen = [self._enlarged(self.decode(crop(images))) for images in (rebuilt, real)]
            named["lpips"] = self.lpips.distance(*seen)
            total = total + config.lpips * named["lpips"]
        return total, named

    def _enlarged(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        side = self.config.lpips_size
        if images.shape[-1] >= side:
            return images
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def draw_augmentation(augment: DiffAugment, random: StepRandom, name: str, device: torch.device) -> dict[str, Tensor]:
    """A draw for this process's rows of the step."""
    draw = augment.draw(random.batch_size, random.generator(f"augment-{name}"))
    return {key: value[random.rows].to(device) for key, value in draw.items()}


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c per element, averaged over each sample: (B, ...) -> (B,)."""
    return ((difference.square() + c * c).sqrt() - c).flatten(1).mean(1)
