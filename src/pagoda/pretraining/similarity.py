"""How alike two networks see images: where in a network an encoder's features are found already, and whether alignment took.

Sources: linear CKA, Kornblith et al. 2019, arXiv:1905.00414, eq. 3 with linear kernels; CKNNA, Huh et al. 2024,
arXiv:2405.07987, appendix A: CKA over mutual nearest neighbours only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pagoda.diffusion import Condition, EDMDenoiser, per_sample
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.anatomy import features
from pagoda.pretraining.encoders import TargetEncoder, match_grid


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Centred kernel alignment of features (N, d_a) and (N, d_b) of the same samples: 1 = alike up to rotation and scale, 0 = not at all.

    Raises:
        ShapeError: another number of samples, or fewer than two.
    """
    a, b = _checked(a, b)
    cross = (a.T @ b).square().sum()
    return float(cross / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-30))


def cknna(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """CKA over pairs of samples that are among each other's nearest in both feature spaces, in [-1, 1].

    Args:
        a: (N, d_a).
        b: (N, d_b).
        neighbours: Nearest ones of each sample that count; N - 1 gives all pairs.

    Raises:
        ShapeError: as `linear_cka`.
        ConfigError: neighbours outside of 1..N-1.
    """
    a, b = _checked(a, b)
    if not 1 <= neighbours < len(a):
        raise ConfigError(f"neighbours must lie in 1..{len(a) - 1}, got {neighbours}.")
    kernels = [features @ features.T for features in (a, b)]

    def near(kernel: Tensor) -> Tensor:
        own = torch.eye(len(kernel), dtype=torch.bool, device=kernel.device)
        found = kernel.masked_fill(own, -torch.inf).topk(neighbours, dim=1).indices
        return torch.zeros_like(kernel).scatter(1, found, 1.0)

    masks = [near(kernel) for kernel in kernels]

    def aligned(i: int, j: int) -> Tensor:
        return (masks[i] * masks[j] * kernels[i] * kernels[j]).sum()

    return float(aligned(0, 1) / (aligned(0, 0) * aligned(1, 1)).sqrt().clamp_min(1e-30))


@torch.no_grad()
def feature_similarity(
    denoiser: EDMDenoiser,
    encoder: TargetEncoder,
    images: Tensor,
    condition: Condition,
    *,
    parts: Sequence[str],
    sigmas: Sequence[float],
    generator: torch.Generator,
    neighbours: int = 10,
) -> list[dict[str, float | str]]:
    """Rows of part, sigma, `cka` and `cknna` between a denoiser's features of noisy images and an encoder's of the clean ones.

    Features are averaged over places. Compare rows with each other: absolute values depend on the images and their number.

    Args:
        denoiser: Over a network with an anatomy, in evaluation mode.
        encoder: Frozen.
        images: Clean (N, C, H, W) in [-1, 1].
        condition: Of the images; `condition.null()` keeps labels out of the features.
        parts: Names of parts.
        sigmas: Noise levels.
        generator: Of the noise, on the CPU.
        neighbours: As in `cknna`.
    """
    target = match_grid(encoder(images, images.shape[-1] // 2), 1).flatten(1)
    rows: list[dict[str, float | str]] = []
    for value in sigmas:
        sigma = torch.full((len(images),), float(value), device=images.device)
        noise = torch.randn(images.shape, generator=generator).to(images)
        c_in = per_sample(denoiser.scalings(sigma)[2], images)
        network: torch.nn.Module = denoiser.network  # type: ignore[assignment]
        noisy = c_in * (images + per_sample(sigma, images) * noise)
        found = features(network, noisy, denoiser.noise_input(sigma), condition, names=parts)
        for name in parts:
            mine = found[name].mean((2, 3))
            rows.append(
                {
                    "part": name,
                    "sigma": float(value),
                    "cka": linear_cka(mine, target),
                    "cknna": cknna(mine, target, neighbours),
                }
            )
    return rows


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 and centred."""
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ShapeError(
            f"features must be (N, d) of the same N >= 2 samples, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    a, b = a.double(), b.double()
    return a - a.mean(0), b - b.mean(0)
