"""Heads of the sizes between, where several octaves are trained together: each rebuilds the images at its own size.

    L_rec = d(x, G(z)) + sum_s d(x_s, G_s(z)),    s the sizes between, x_s the image at s

The loss of the largest image alone tells the head of a level below only what an enlarged copy of its image is good for, and one whose
image nothing reads is told nothing: a generator that is asked for that size would then give grey.

Source: ours; the heads of PaGoDA's lower sizes (Kim et al. 2024, arXiv:2405.14822) come from octaves that are grown one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pagoda.stages.reconstruction import ReconstructionLoss
from pagoda.training import StepRandom

Window = Callable[[Tensor], Tensor]


class RetainedHeads:
    """What the heads of the sizes between are told.

    Args:
        load: By side: images of the data (B,) and mirrors (B,) -> the images at that side (B, C, side, side), as networks see them.
    """

    def __init__(self, load: Mapping[int, Callable[[Tensor, Tensor], Tensor]]) -> None:
        self.load = dict(load)

    def targets(self, indices: Tensor, flips: Tensor) -> dict[int, Tensor]:
        """Images of the data at every side."""
        return {side: load(indices, flips) for side, load in self.load.items()}

    def losses(
        self,
        made: Mapping[int, Tensor],
        targets: Mapping[int, Tensor],
        reconstruction: ReconstructionLoss,
        window: Callable[[int], Window],
        random: StepRandom,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the sides of the mean loss, with its graph, and the loss (B,) of each side by name.

        Args:
            made: By side: images, of which the first rows are the reconstructions.
            targets: By side: what they should be (B, C, side, side).
            window: The window of a side that features look through.
        """
        named, total = {}, torch.zeros(())
        for side, target in targets.items():
            rebuilt = made[side][: len(target)].float()
            loss, _ = reconstruction(rebuilt, target.to(rebuilt.device), window(side), random)
            named[f"reconstruction_{side}"] = loss
            total = total.to(loss.device) + loss.mean()
        return total, named
