"""Large images through a network in overlapping tiles, blended where they overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: every `tile - overlap`, the last one flush with the end; one tile where it is enough."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def tile_weight(length: int, overlap: int) -> Tensor:
    """(length,) in (0, 1]: 1 in the middle, falling linearly over `overlap` positions towards both ends, nowhere 0."""
    distance = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()
    return (distance / (overlap + 1)).clamp(max=1)


def run_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    shrink: int = 1,
    enlarge: int = 1,
) -> Tensor:
    """`function` over tiles of x, blended with weights that sum to 1 everywhere.

    Args:
        function: (B, C, h, w) -> (B, D, h * enlarge / shrink, w * enlarge / shrink).
        x: (B, C, H, W); H, W, tile and overlap are multiples of `shrink`.
        tile: Side of the tiles, in positions of x.
        overlap: Positions that neighbours share.

    Source: the weighted folding of Rombach et al. 2022, arXiv:2112.10752, with a linear ramp in place of theirs.
    """
    height, width = x.shape[-2:]

    def out(length: int) -> int:
        return length * enlarge // shrink

    total: Tensor | None = None
    weights: Tensor | None = None
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = function(x[..., top : top + tile, left : left + tile])
            rows, columns = (tile_weight(n, out(overlap)).to(part) for n in part.shape[-2:])
            weight = rows[:, None] * columns
            if total is None or weights is None:
                total = part.new_zeros(*part.shape[:-2], out(height), out(width))
                weights = part.new_zeros(out(height), out(width))
            window = (slice(out(top), out(top) + part.shape[-2]), slice(out(left), out(left) + part.shape[-1]))
            total[(..., *window)] += weight * part
            weights[window] += weight
    assert total is not None, "every image has a tile"
    assert weights is not None
    return total / weights
