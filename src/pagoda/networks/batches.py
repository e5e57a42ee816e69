"""How many images go through a network at once where none of them is trained on: the fewer, the larger they are."""

from __future__ import annotations

PIXELS_AT_ONCE = 2**16
"""Pixels of a call: 64 images of 32 px, 4 of 128 px. Larger calls only take more memory on a CPU, and hardly less time on a GPU."""
IMAGES_AT_ONCE = 256
"""Images of a call, at most."""


def images_at_once(side: int) -> int:
    """Images of a network call without gradients, so that what it holds does not grow with their size.

    Args:
        side: Of the largest images that the call makes or reads, in pixels.
    """
    return max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // side**2))
