"""Holes continued smoothly from their borders, with work that grows with the holes and not with the image.

Harmonic continuation is decided by the pixels around a hole: so each part of it is solved in its own rectangle, one pixel larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.steering.multigrid import Multigrid
from pagoda.steering.operators import dot

_LARGE = 64
"""Side of a rectangle, in pixels, above which its solution is preconditioned; below, that takes as long as the steps that it saves."""
Part = tuple[int, int, int, int]
"""top, bottom, left and right of a rectangle, in pixels; the second of each pair lies beyond it."""


def fill_hole(images: Tensor, mask: Tensor) -> Tensor:
    """Known pixels as they are, and the smoothest continuation of them elsewhere: its Laplacian is 0 there.

    Args:
        images: (B, C, H, W); what is not known is not read.
        mask: (H, W) or (B, 1, H, W); True = known. At least one pixel of every sample.

    Returns:
        (B, C, H, W); values between the least and the largest known ones.

    Raises:
        ConfigError: a sample of which nothing is known.
    """
    known = mask.expand(len(images), 1, *images.shape[-2:]).to(images.device).bool()
    if not bool(known.flatten(1).any(1).all()):
        raise ConfigError("nothing is known of an image, so there is nothing to continue.")
    filled = torch.where(known, images, 0.0)
    # Parts of one shape are solved together: many small ones, such as scratches, then cost no call each.
    by_shape: dict[tuple[int, int], list[tuple[int, Part, Part]]] = {}
    for row in range(len(images)):
        for part in split_hole(~known[row, 0]):
            around = with_border(part, images.shape[-2:])
            by_shape.setdefault(_shape(around), []).append((row, part, around))
    for places in by_shape.values():
        fixed = torch.stack([filled[(row, slice(None), *_slices(at))] for row, _, at in places]).double()
        inner = torch.ones_like(fixed[:, :1], dtype=torch.bool)
        for index, (row, part, around) in enumerate(places):  # a corner may lie in another part: not ours to continue
            inner[index, 0][_within(part, around)] = known[(row, 0, *_slices(part))]
        solved = _continued(fixed, inner).to(images.dtype)
        for values, (row, part, around) in zip(solved, places, strict=True):
            place = filled[(row, slice(None), *_slices(part))]
            kept = known[(row, slice(None), *_slices(part))]
            place.copy_(torch.where(kept, place, values[(slice(None), *_within(part, around))]))
    return filled


def split_hole(hole: Tensor) -> list[Part]:
    """Rectangles that hold all of a hole, bool (H, W), such that no two parts of it touch: cut along known rows and columns, in turn."""
    parts, open_ = [], [(0, hole.shape[0], 0, hole.shape[1])]
    while open_:
        part = open_.pop()
        top, bottom, left, right = part
        inside = hole[top:bottom, left:right]
        pieces = [
            (top + first, top + last, left + start, left + stop)
            for first, last in _runs(inside.any(1))
            for start, stop in _runs(inside[first:last].any(0))
        ]
        if pieces == [part]:
            parts.append(part)
        else:
            open_ += pieces
    return sorted(parts)


def with_border(part: Part, size: tuple[int, int] | torch.Size) -> Part:
    """A rectangle and the pixels beside it, as far as an image of this height and width has any."""
    top, bottom, left, right = part
    return max(0, top - 1), min(size[0], bottom + 1), max(0, left - 1), min(size[1], right + 1)


def _shape(part: Part) -> tuple[int, int]:
    return part[1] - part[0], part[3] - part[2]


def _slices(part: Part) -> tuple[slice, slice]:
    return slice(part[0], part[1]), slice(part[2], part[3])


def _within(part: Part, around: Part) -> tuple[slice, slice]:
    """Rows and columns of a rectangle within one around it."""
    top, left = part[0] - around[0], part[2] - around[2]
    height, width = _shape(part)
    return slice(top, top + height), slice(left, left + width)


def _runs(there: Tensor) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of True in (N,)."""
    edges = torch.diff(torch.nn.functional.pad(there.int(), (1, 1))).nonzero().flatten().tolist()
    return zip(edges[::2], edges[1::2], strict=True)


def _continued(fixed: Tensor, known: Tensor) -> Tensor:
    """Values (B, C, h, w) of holes within a rectangle whose border is known or ends the image; `fixed` is 0 in the holes."""
    hole = (~known).double()
    neighbours = _sum_of_neighbours(torch.ones_like(hole))

    def laplacian(u: Tensor) -> Tensor:
        return hole * (neighbours * u - _sum_of_neighbours(u))

    target = hole * _sum_of_neighbours(torch.where(known, fixed, 0.0))
    return conjugate_gradients(
        laplacian, target, precondition=Multigrid(hole) if max(hole.shape[-2:]) > _LARGE else None
    )


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 10_000,
) -> Tensor:
    """Solve M x = target with a symmetric positive definite M, for each sample by itself.

    Args:
        apply: M, on tensors like `target`; samples must not mix.
        target: (B, C, H, W), in the range of M.
        precondition: About the inverse of M, symmetric and positive definite; samples must not mix. None for none.
        tolerance: Norm of the residual that ends a sample's solution, as a share of the norm of its target.
        max_steps: Steps after which the solution is given up.

    Raises:
        ConfigError: the solution was given up.

    Source: Hestenes and Stiefel 1952, Methods of conjugate gradients for solving linear systems, section 3.
    """
    x, residual = torch.zeros_like(target), target
    error = dot(residual, residual)
    enough = tolerance**2 * error
    better = residual if precondition is None else precondition(residual)
    direction, gain = better, error if precondition is None else dot(residual, better)
    for _ in range(max_steps):
        going = error > enough  # a solved sample stays as it is, whatever its batch
        if not bool(going.any()):
            return x
        image = apply(direction)
        step = torch.where(going, gain / dot(direction, image).where(going, torch.ones_like(gain)), 0.0)
        x, residual = x + step * direction, residual - step * image
        after = dot(residual, residual)
        better = residual if precondition is None else precondition(residual)
        gained = after if precondition is None else dot(residual, better)
        ratio = gained / gain.where(going, torch.ones_like(gain))
        direction = torch.where(going, better + ratio * direction, direction)
        gain = torch.where(going, gained, gain)
        error = torch.where(going, after, error)
    raise ConfigError(f"a linear system is not solved to {tolerance:g} after {max_steps} steps.")


def _sum_of_neighbours(u: Tensor) -> Tensor:
    """Sum over the neighbours above, below, left and right, as far as there are any."""
    total = torch.zeros_like(u)
    total[..., 1:, :] += u[..., :-1, :]
    total[..., :-1, :] += u[..., 1:, :]
    total[..., 1:] += u[..., :-1]
    total[..., :-1] += u[..., 1:]
    return total
