"""What the training loop costs over a bare loop of the same network, batch and optimiser, in turn in one process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.data import Downsampler, ShapesSource, prepare_images
from pagoda.data.order import batch_indices
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import DiffusersNetwork, backbone_preset, build_backbone
from pagoda.training import LoopConfig, MetricLog, OptimizerConfig, Runtime, Trainable, Trainer
from pagoda.training.denoising import DenoisingObjective, NoiseLaw
from pagoda.training.optim import EMA

BATCH, ROUNDS = 64, 8


def compare(seed: int, *, size: int, steps: int) -> dict[str, float]:
    """Seconds a step of both loops, block by block in turn, each after a warm-up."""
    data = prepare_images(
        ShapesSource(count=2000), sizes=[size], downsampler=Downsampler(), cache_dir=None, progress=False
    )

    def network() -> DiffusersNetwork:
        torch.manual_seed(seed)
        return DiffusersNetwork(build_backbone(backbone_preset("tiny", size), image_size=size, num_classes=10))

    bare = network()
    bare_optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)
    bare_denoiser, average = EDMDenoiser(bare), EMA(bare, 0.99)
    images = data.images(torch.arange(BATCH), size)
    condition = Condition.of_labels(data.labels(torch.arange(BATCH)))

    def bare_block() -> float:
        """The least that training does: noise, forward, backward, clipping, update, average; always the same batch."""
        start = time.perf_counter()
        for step in range(steps):
            sigma = torch.randn(BATCH).mul(1.2).sub(1.2).exp()
            noisy = images + sigma[:, None, None, None] * torch.randn_like(images)
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            error = (bare_denoiser(noisy, sigma, condition) - images).square().flatten(1).mean(1)
            bare_optimizer.zero_grad(set_to_none=True)
            (weight * error).mean().backward()
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0, foreach=True)
            bare_optimizer.step()
            average.update(step)
        return (time.perf_counter() - start) / steps

    ours = network()
    objective = DenoisingObjective(
        EDMDenoiser(ours),
        Trainable(ours, OptimizerConfig(lr=1e-3), 0.99),
        lambda indices, flips: (data.images(indices, size, flips), Condition.of_labels(data.labels(indices))),
        noise=NoiseLaw(),
    )
    pairs: list[tuple[float, float]] = []
    started = 0.0

    def order(step: int, count: int) -> torch.Tensor:
        """The trainer asks for each step's images: between two blocks of its steps, run a bare one."""
        nonlocal started
        if step % steps == 0:
            block = (time.perf_counter() - started) / steps
            bare_seconds = bare_block()
            if step:
                pairs.append((bare_seconds, block))
            started = time.perf_counter()
        return batch_indices(seed, step, count, len(data))

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            objective,
            # The first block warms up; the last step, with its checkpoint, lies outside every block.
            LoopConfig(steps=(ROUNDS + 1) * steps + 1, batch_size=BATCH, preview_every=0, checkpoint_every=10**9),
            runtime=Runtime("cpu"),
            folder=Path(folder),
            stage="bench",
            seed=seed,
            order=order,
            log=MetricLog(Path(folder) / "metrics.jsonl", "bench"),
        ).run()
    pairs = pairs[1:]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "ms_bare": 1e3 * min(a for a, _ in pairs),
        "ms_loop": 1e3 * min(b for _, b in pairs),
        "ratio": (ratios[ROUNDS // 2 - 1] + ratios[ROUNDS // 2]) / 2,
    }


@benchmark(
    "loop_overhead",
    question="What does the training loop cost over a bare loop of the same network, batch and optimiser?",
    passes=[
        PassLine("at most 5 % at 8 px (median of pairs)", lambda r: r.median("8 px", "ratio"), at_most=1.05),
        PassLine("at most 5 % at 16 px (median of pairs)", lambda r: r.median("16 px", "ratio"), at_most=1.05),
    ],
)
def loop_overhead(budget: float) -> dict[str, Arm]:
    """Two sizes: the smaller the network, the dearer the loop."""
    steps = max(2, round(12 * budget))
    return {
        "8 px": lambda seed: compare(seed, size=8, steps=2 * steps),
        "16 px": lambda seed: compare(seed, size=16, steps=steps),
    }
