"""Targets of an octave that keep the image below: real detail on what the frozen levels made, in place of the whole real image.

    x' = x + up(G_l(z) - down_l(x)),    z the latent of x

G_l(z), the frozen levels' image of side l, is not exactly the reduced image. An octave that is asked for x itself has to undo that error
too, which it cannot see: it learns the mean of what would undo it, and blurs. x' has the detail of x and, reduced by averaging, the image
below, so that only detail is left to learn: the step of back-projection for the constraint that reduction gives the lower image.

Source: ours; the projection is that of Kim et al. 2024, PaGoDA, arXiv:2405.14822, for inverse problems, used on the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.diffusion import Condition
from pagoda.networks import OneStepGenerator


class LowerImages:
    """What the frozen levels make of latents, and targets that keep it.

    Args:
        generator: The grown one; its levels below `boundary` are frozen.
        boundary: Side of the lowest level that is trained; the image below has half of it.
        load: Images of the data (B,) and mirrors (B,) -> the images at the side of the image below, (B, C, l, l), as networks see them.
        bounded: Brings targets back into the range of images.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        boundary: int,
        load: Callable[[Tensor, Tensor], Tensor],
        bounded: Callable[[Tensor], Tensor],
    ) -> None:
        self.generator = generator
        self.boundary = boundary
        self.load = load
        self.bounded = bounded

    @torch.no_grad()
    def keep(
        self, targets: Mapping[int, Tensor], reduced: Tensor, inputs: tuple[Tensor, ...], condition: Condition
    ) -> dict[int, Tensor]:
        """Targets with the image below in place of the reduced image (B, C, l, l).

        Args:
            targets: By side r: (B, C, r, r).
            inputs: What the generator makes its images of: latents (B, ...), or the frozen levels' outputs, whose second is the image.
            condition: What it is told.
        """
        cached = len(inputs) > 1
        lower = inputs[1] if cached else self.generator.lower_outputs(inputs[0], condition, self.boundary)[1].float()
        error = lower - reduced
        return {
            side: self.bounded(images.to(error.device) + F.interpolate(error, size=images.shape[-2:], mode="nearest"))
            for side, images in targets.items()
        }
