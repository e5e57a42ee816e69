"""How much each solver contracts latents, on a mixture whose denoiser is exact, so that every error is the solver's.

Two data sets of the same ten patterns: `wide` modes (std 0.1) and `thin` ones (std 0.003, as images with flat areas have). A thin
mode is narrower than the noise of sigma_min = 0.002 allows to ignore: its clean images do not lie on the marginal at sigma_min.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.diffusion import GaussianMixtureDenoiser, build_solver, invert, karras_sigmas, sample

SOLVERS = ("euler", "heun", "dpm2m")
NODES = (18, 40, 80)
STARTS = ("clean", "noise")
WIDTHS = {"wide": 0.1, "thin": 0.003}
IMAGES = 1024


def _measure(solver: str, nodes: int, start: str, images: int, seed: int) -> dict[str, float]:
    """Moments of the latents of one data set after another, and the round trip back to the state that was inverted."""
    result = {}
    for width, std in WIDTHS.items():
        generator = torch.Generator().manual_seed(seed)
        means = 0.5 * torch.randn(10, 1, 8, 8, generator=generator, dtype=torch.float64)
        oracle = GaussianMixtureDenoiser(means, torch.full((10,), std, dtype=torch.float64))
        clean, _ = oracle.draw(images, generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        sigmas = karras_sigmas(nodes)
        z = invert(
            oracle,
            clean,
            sigmas=sigmas.flip(0),
            solver=build_solver(solver),
            noise=noise if start == "noise" else None,
        )
        back = sample(oracle, z, sigmas=sigmas, solver=build_solver(solver))
        begun = clean + float(sigmas[-1]) * noise if start == "noise" else clean
        result[f"{width}_std"] = float(z.std())
        result[f"{width}_kurtosis"] = kurtosis(z)
        result[f"{width}_round_trip_rmse"] = float((back - begun).square().mean().sqrt())
    return result


def kurtosis(z: Tensor) -> float:
    """Fourth standardised moment; 3 for a Gaussian."""
    centred = z - z.mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


@benchmark(
    "oracle_inversion",
    question=(
        "How far from unit variance are the latents of each solver when the denoiser is exact, and what does noise at sigma_min "
        "change? `wide` and `thin` are the widths of the data's modes (std 0.1 and 0.003, sigma_min = 0.002)."
    ),
    passes=[
        PassLine(
            "Heun with 40 nodes keeps the latents of wide modes at unit scale (smallest over seeds)",
            lambda r: r.min("heun-40-clean", "wide_std"),
            at_least=0.97,
            at_most=1.03,
        ),
        PassLine(
            "Heun with 40 nodes, noise at sigma_min: the same for thin modes (smallest over seeds)",
            lambda r: r.min("heun-40-noise", "thin_std"),
            at_least=0.97,
            at_most=1.03,
        ),
        PassLine(
            "clean images of thin modes contract at sigma_min, whatever the solver (Heun, 80 nodes)",
            lambda r: r.median("heun-80-clean", "thin_std"),
            at_most=0.9,
        ),
        PassLine(
            "Heun with 40 nodes returns to the image it inverted, wide modes (largest RMSE over seeds)",
            lambda r: r.max("heun-40-clean", "wide_round_trip_rmse"),
            at_most=0.01,
        ),
        PassLine(
            "at 40 nodes Euler (DDIM) is off by at least five times as much as Heun, wide modes",
            lambda r: abs(1 - r.median("euler-40-clean", "wide_std")) / abs(1 - r.median("heun-40-clean", "wide_std")),
            at_least=5,
        ),
        PassLine(
            "latents of wide modes are Gaussian in their fourth moment (Heun, 80 nodes, kurtosis 3 within sampling error)",
            lambda r: r.median("heun-80-clean", "wide_kurtosis"),
            at_least=2.9,
            at_most=3.1,
        ),
    ],
)
def oracle_inversion(budget: float) -> dict[str, Arm]:
    """One arm for each solver, number of nodes and start."""
    images = max(16, round(IMAGES * budget))
    return {
        f"{solver}-{nodes}-{start}": partial(_measure, solver, nodes, start, images)
        for solver in SOLVERS
        for nodes in NODES
        for start in STARTS
    }
