"""Mixtures of latents that stay as long as latents are: along the great circle, not the chord."""

from __future__ import annotations

import torch
from torch import Tensor

from pagoda.diffusion.denoiser import per_sample
from pagoda.errors import ConfigError, ShapeError

_PARALLEL = 1e-4
"""Sine of the angle below which two latents are mixed linearly: there both ways agree to rounding."""


def spherical_mixture(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Latents on the way from `start` to `end`: sin((1 - f) a) / sin(a) start + sin(f a) / sin(a) end, a = their angle.

    Two latents of equal length give one of that length, where a linear mixture would shrink it: unit Gaussian noise stays on
    the shell that a generator was trained on. The ends are returned bit for bit.

    Args:
        start, end: (B, ...), mixed sample by sample.
        fraction: 0 gives `start`, 1 gives `end`.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: a fraction outside [0, 1].

    Source: Shoemake 1985, Animating rotation with quaternion curves, section 3.3.
    """
    if start.shape != end.shape:
        raise ShapeError(f"latents to be mixed must share one shape, got {tuple(start.shape)} and {tuple(end.shape)}.")
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the fraction of a mixture must lie in [0, 1], got {fraction}.")
    if fraction in (0, 1):
        return start if fraction == 0 else end
    a, b = start.flatten(1).double(), end.flatten(1).double()
    lengths = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
    angle = ((a * b).sum(1) / lengths).clamp(-1, 1).acos()  # (B,)
    sine = angle.sin()
    near = sine < _PARALLEL
    safe = torch.where(near, torch.ones_like(sine), sine)
    first = torch.where(near, torch.full_like(sine, 1 - fraction), ((1 - fraction) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(sine, fraction), (fraction * angle).sin() / safe)
    return (per_sample(first, start) * start.double() + per_sample(second, end) * end.double()).to(start.dtype)
