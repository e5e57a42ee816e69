"""Whether one-step sampling costs more than a bare forward of the same network, at the batch size and memory layout that suit it best.

Beside it: which share of the rate at which this machine multiplies large matrices the network reaches, and where its time goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.diffusion import Condition, EDMDenoiser
from pagoda.networks import DiffusersNetwork, OneStepGenerator, backbone_preset, build_backbone
from pagoda.stages.sampling import sample_images

COUNT = 256
BATCHES = (16, 64, 256)
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


MATRIX = 1536
"""Side of the matrices whose product is timed."""
KINDS = {
    "convolutions": ("convolution",),
    "products": ("addmm", "aten::mm", "bmm", "linear"),
    "attention": ("scaled_dot_product",),
    "norms": ("group_norm", "layer_norm"),
}
"""Of the profiler's operators, by parts of their names; what fits none is elementwise, copies and calls."""


def matrix_rate(rounds: int = 5) -> float:
    """Multiply-adds a second of a product of two large matrices: the best of some rounds."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    a @ b
    return MATRIX**3 / min(seconds(lambda: a @ b) for _ in range(rounds))


@torch.no_grad()
def time_by_kind(forward: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of a call, by `KINDS`."""
    forward()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        forward()
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "rest")
        spent[kind] += event.self_cpu_time_total
    return {f"time_{kind}": value / sum(spent.values()) for kind, value in spent.items()}


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
    torch.nn.Module.to(generator, memory_format=LAYOUTS[best[0]])
    z = (80 * torch.randn(best[1], 3, size, size)).to(memory_format=LAYOUTS[best[0]])
    labels = Condition.of_labels(torch.arange(best[1]) % 10)
    denoiser = EDMDenoiser(DiffusersNetwork(generator.base))
    with FlopCounterMode(display=False) as counter:
        denoiser(z, 80.0, labels)
    multiply_adds = counter.get_total_flops() / 2 / best[1]
    return {
        "ms_bare": 1e3 * bare[best] / COUNT,
        "ms_one_step": 1e3 * min(ours.values()) / COUNT,
        "ratio": min(ours.values()) / bare[best],
        "best_batch": float(best[1]),
        "channels_last": float(best[0] == "channels last"),
        "megamultiply_adds": multiply_adds / 1e6,
        "share_of_matrix_rate": multiply_adds * COUNT / bare[best] / matrix_rate(),
        **time_by_kind(lambda: denoiser(z, 80.0, labels)),
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
