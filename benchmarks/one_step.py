"""Whether one-step sampling costs more than a bare forward of the same network, at the batch size and memory layout that suit it best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import DiffusersNetwork, OneStepGenerator, backbone_preset, build_backbone
from pagoda.stages.sampling import sample_images

COUNT = 256
BATCHES = (16, 64, 256)
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.no_grad()
def compare(seed: int, *, size: int, rounds: int) -> dict[str, float]:
    """Both in turn for each batch size and layout; the ratio is the sampler's over the bare forward's, each at its best."""
    torch.manual_seed(seed)
    model = build_backbone(backbone_preset("tiny", size), image_size=size, num_classes=10).eval()
    generator = OneStepGenerator.from_teacher(model).eval()
    bare: dict[tuple[str, int], float] = {}
    ours: dict[tuple[str, int], float] = {}
    for name, layout in LAYOUTS.items():
        torch.nn.Module.to(generator, memory_format=layout)
        network = DiffusersNetwork(generator.base)
        denoiser = EDMDenoiser(network)
        for batch in BATCHES:
            z = (80 * torch.randn(batch, 3, size, size)).to(memory_format=layout)
            labels = Condition.of_labels(torch.arange(batch) % 10)

            def forward(z=z, labels=labels, denoiser=denoiser, batch=batch) -> None:  # type: ignore[no-untyped-def]
                for _ in range(COUNT // batch):
                    denoiser(z, 80.0, labels)

            def sampled(batch=batch) -> None:  # type: ignore[no-untyped-def]
                sample_images(generator, range(COUNT), batch_size=batch)

            pairs = [(seconds(forward), seconds(sampled)) for _ in range(rounds + 1)][1:]
            bare[name, batch] = statistics.median(pair[0] for pair in pairs)
            ours[name, batch] = statistics.median(pair[1] for pair in pairs)
    best = min(bare, key=lambda key: bare[key])
    return {
        "ms_bare": 1e3 * bare[best] / COUNT,
        "ms_one_step": 1e3 * min(ours.values()) / COUNT,
        "ratio": min(ours.values()) / bare[best],
        "best_batch": float(best[1]),
        "channels_last": float(best[0] == "channels last"),
    }


@benchmark(
    "one_step",
    question="What does one-step sampling cost over a bare forward of the same network, each at its best batch size and memory layout?",
    passes=[
        PassLine("at most 5 % at 16 px", lambda r: r.median("16 px", "ratio"), at_most=1.05),
        PassLine("at most 5 % at 32 px", lambda r: r.median("32 px", "ratio"), at_most=1.05),
    ],
)
def one_step(budget: float) -> dict[str, Arm]:
    """Two sizes: seeds, labels and clamping weigh most where the network is small."""
    rounds = max(1, round(5 * budget))
    return {
        "16 px": lambda seed: compare(seed, size=16, rounds=rounds),
        "32 px": lambda seed: compare(seed, size=32, rounds=rounds),
    }
