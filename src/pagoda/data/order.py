"""In which order the images are seen: a pure function of (seed, step), so that resuming needs no loader state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pagoda.errors import ConfigError


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of 0 .. n-1, int64 (n,), that depends on the arguments alone.

    Raises:
        ConfigError: `seed` or `epoch` is negative, or `n` is not positive.
    """
    return _epoch_order(seed, epoch, n).clone()


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """Sample indices of one training step, int64 (batch_size,).

    The permutations of all epochs, one after the other, are cut into batches, so a batch may span two epochs (or more,
    when it is larger than the data) and every image is seen equally often up to one.

    Args:
        seed: From 0.
        step: From 0.
        batch_size: Number of indices, at least 1; of all processes together.
        n: Number of images, at least 1.

    Raises:
        ConfigError: an argument is out of range.
    """
    if step < 0 or batch_size < 1 or n < 1:
        raise ConfigError(
            f"batch_indices needs step >= 0, batch_size >= 1 and n >= 1, got step={step}, batch_size={batch_size}, n={n}."
        )
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        first = epoch * n
        parts.append(_epoch_order(seed, epoch, n)[max(start - first, 0) : stop - first])
    return torch.cat(parts)  # a copy, so that nobody can write into the cached order


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    if seed < 0 or epoch < 0 or n < 1:
        raise ConfigError(f"an epoch needs seed >= 0, epoch >= 0 and n >= 1, got seed={seed}, epoch={epoch}, n={n}.")
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n).astype(np.int64, copy=False))
