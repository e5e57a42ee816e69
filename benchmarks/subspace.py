"""Subspaces: where training of the low-rank denoiser passes from memorising to finding, and Jacobians read by products alone."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.diffusion import EDMDenoiser
from pagoda.networks import DiffusersNetwork, backbone_preset, build_backbone
from pagoda.training import noise_of_seeds
from pagoda.understanding import (
    DenoiserJacobian,
    LowRankConfig,
    LowRankMixture,
    clustering_accuracy,
    draw_curves,
    k_subspaces,
    subspace_error,
    train_low_rank,
)

SHAPE = (3, 4, 4)
RANKS = (3, 6, 9)
STEPS = 600
STARTS = 40
"""Random starts, of the reference and of training alike."""
RATIOS = (0.5, 0.8, 1.0, 1.5, 2.0, 4.0)
"""Samples a class over the dimension of the class."""


def transition(rank: int, steps: int, seed: int) -> dict[str, float]:
    """Two orthogonal subspaces of `rank` dimensions in 48: errors and accuracies over the number of samples a class."""
    generator = torch.Generator().manual_seed(seed)
    oracle = LowRankMixture.random(SHAPE, [rank, rank], generator)
    figures: dict[str, float] = {}
    for ratio in RATIOS:
        count = max(1, round(ratio * rank))
        tag = f"{ratio:g}d".replace(".", "_")
        codes = torch.randn(2, count, rank, generator=generator, dtype=torch.float64)
        flat = torch.cat([code @ basis.T for code, basis in zip(codes, oracle.bases, strict=True)])
        labels = torch.arange(2).repeat_interleave(count)
        data = flat.reshape(-1, *SHAPE)
        reference = k_subspaces(data, 2, rank, generator, restarts=STARTS)
        # What each class alone can tell, with its members known: the theory's threshold is about this.
        known = [k_subspaces(data[labels == k], 1, rank, generator, restarts=1).bases[0] for k in range(2)]
        figures[f"known_error_{tag}"] = subspace_error(known, oracle.bases)
        figures[f"reference_error_{tag}"] = subspace_error(reference.bases, oracle.bases)
        figures[f"reference_accuracy_{tag}"] = 100 * clustering_accuracy(reference.assignment, labels)
        if ratio >= 1:
            config = LowRankConfig(num_subspaces=2, rank=rank, steps=steps, restarts=STARTS, seed=seed)
            model, assignment = train_low_rank(data, config)
            figures[f"trained_error_{tag}"] = subspace_error(list(model.bases()), oracle.bases)
            figures[f"trained_accuracy_{tag}"] = 100 * clustering_accuracy(assignment, labels)
    if seed == 0 and steps == STEPS:
        draw_transition(rank, figures)
    return figures


def draw_transition(rank: int, figures: dict[str, float]) -> None:
    """Error over samples a dimension, with the threshold of the theory."""
    tags = {ratio: f"{ratio:g}d".replace(".", "_") for ratio in RATIOS}
    curves = {}
    for name in ("known", "reference", "trained"):
        found = [ratio for ratio in RATIOS if f"{name}_error_{tags[ratio]}" in figures]
        curves[name] = (found, [figures[f"{name}_error_{tags[ratio]}"] for ratio in found])
    draw_curves(
        curves,
        Path(f"docs/results/images/subspace-transition-d{rank}.png"),
        x="samples a class / dimension",
        y="distance of projectors",
        title=f"two subspaces of {rank} dimensions in 48",
        mark=1.0,
    )


def triplets(seed: int) -> dict[str, float]:
    """Ten singular triplets of a U-Net of 16 px against the dense SVD; weights are random, as timing and exactness do not need training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_backbone(backbone_preset("small", 16), image_size=16, in_channels=3, num_classes=10)
        torch.nn.init.normal_(model.conv_out.weight, std=0.05)  # it starts at zero
    denoiser = EDMDenoiser(DiffusersNetwork(model), noise_scale=25.0).eval().requires_grad_(False)
    jacobian = DenoiserJacobian(denoiser, noise_of_seeds([seed], (3, 16, 16)), 0.5)
    start = time.perf_counter()
    found = jacobian.svd(10, tolerance=1e-3)
    seconds = time.perf_counter() - start
    s = torch.linalg.svdvals(jacobian.dense())[:10]
    return {
        "seconds": seconds,
        "largest_relative_error": float(((found.s - s).abs() / s).max()),
        "residual": found.residual,
        "products": float(found.products),
        "dimension": float(jacobian.size),
    }


def over_ranks(results: Results, metric: str) -> list[float]:
    """A metric of every rank and seed."""
    return [value for rank in RANKS for value in results.values(f"d{rank}", metric)]


def accuracy_gap(results: Results) -> float:
    """Largest shortfall of the trained denoiser behind the reference, over ranks, seeds and counts of two samples a dimension and more."""
    pairs = [
        (over_ranks(results, f"reference_accuracy_{tag}"), over_ranks(results, f"trained_accuracy_{tag}"))
        for tag in ("2d", "4d")
    ]
    return max(a - b for reference, trained in pairs for a, b in zip(reference, trained, strict=True))


@benchmark(
    "subspace",
    question=(
        "Two subspaces of d dimensions in 48: from how many samples a class (0.5 d to 4 d) are they found, by K-subspaces and by training "
        "the low-rank denoiser? And ten singular triplets of a 16-px U-Net's Jacobian without making it: how long, how exact?"
    ),
    passes=[
        PassLine(
            "with members known, d samples are enough, whatever d (largest error)",
            lambda r: max(over_ranks(r, "known_error_1d")),
            at_most=1e-6,
        ),
        PassLine(
            "and half of d are not (smallest error)", lambda r: min(over_ranks(r, "known_error_0_5d")), at_least=0.5
        ),
        PassLine(
            "trained denoiser within 2 points of the reference's clustering accuracy from 2 d samples on (largest shortfall)",
            accuracy_gap,
            at_most=2,
        ),
        PassLine(
            "the reference clusters without a fault at 4 d (smallest)",
            lambda r: min(over_ranks(r, "reference_accuracy_4d")),
            at_least=100,
        ),
        PassLine(
            "ten triplets of a 16-px U-Net in under 5 s (largest)", lambda r: r.max("jacobian", "seconds"), at_most=5
        ),
        PassLine(
            "equal to the dense SVD to 1e-3 (largest)",
            lambda r: r.max("jacobian", "largest_relative_error"),
            at_most=1e-3,
        ),
    ],
)
def subspace(budget: float) -> dict[str, Arm]:
    """One arm a dimension, and the Jacobian."""
    steps = max(20, round(STEPS * budget))
    return {**{f"d{rank}": partial(transition, rank, steps) for rank in RANKS}, "jacobian": triplets}
