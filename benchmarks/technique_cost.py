"""What a training step with a technique costs over the plain DiT of the same size: block by block in turn, in one process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.dit_steps import trained_steps
from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.networks import BackboneConfig
from pagoda.pretraining import (
    CepConfig,
    DdaePlusConfig,
    DitMoeConfig,
    DtrConfig,
    RepaConfig,
    SwitchDitConfig,
    TechniqueConfig,
)

WIDTH, DEPTH, SIZE, BATCH, ROUNDS = 192, 12, 16, 8, 8
TOKENS = (SIZE // 2) ** 2
CONFIGS: dict[str, TechniqueConfig] = {
    "repa": RepaConfig(encoders=("random",)),
    "dtr": DtrConfig(),
    "switch_dit": SwitchDitConfig(),
    "dit_moe": DitMoeConfig(),
    "cep": CepConfig(),
    "ddae_plus": DdaePlusConfig(),
}


def multiply_adds(name: str = "plain") -> float:
    """Of one image forward, per block and token: attention and feed-forward as in the plain network, and what is added."""
    attention = 4 * WIDTH**2 + 2 * TOKENS * WIDTH
    dense = 8 * WIDTH**2
    if name == "switch_dit":
        return attention + dense + 2 * WIDTH**2  # two of three experts
    if name == "dit_moe":
        return attention + (2 * 12 + 6) * WIDTH**2  # two SwiGLU experts of width 4 D, a shared one of width 2 D
    return attention + dense


def make_step(config: TechniqueConfig | None, folder: Path, seed: int) -> Callable[[int], float]:
    """A function that trains some steps and returns the seconds that one took."""
    backbone = BackboneConfig(kind="dit", patch_size=2, hidden_size=WIDTH, depth=DEPTH, head_dim=64)
    return trained_steps(backbone, config, size=SIZE, channels=3, num_classes=10, batch=BATCH, folder=folder, seed=seed)


def compare(name: str, steps: int, rounds: int) -> Arm:
    """Ratio of a technique's step and the plain one's right beside it: the geometric mean of two medians over rounds.

    Of two equal networks one took 1.8 % longer. So each is made first once, and the rounds are even: of two blocks the second one is
    slower, and in an odd number of rounds one of both would be it more often.
    """

    def measure(seed: int) -> dict[str, float]:
        pairs, medians = [], []
        for turn in (0, 1):
            with TemporaryDirectory() as folder:
                made = [None, name] if turn == 0 else [name, None]
                found = {
                    key: make_step(None if key is None else CONFIGS[key], Path(folder) / (key or "plain"), seed)
                    for key in made
                }
                plain, other = found[None], found[name]
                plain(1), other(1)
                timed = []
                for index in range(rounds):  # in turn, the other one first every second time
                    first, second = (plain, other) if index % 2 == 0 else (other, plain)
                    a, b = first(steps), second(steps)
                    timed.append((a, b) if index % 2 == 0 else (b, a))
            medians.append(statistics.median(b / a for a, b in timed))
            pairs += timed
        ratio = math.sqrt(medians[0] * medians[1])
        work = multiply_adds(name) / multiply_adds()
        return {
            "ms_plain": 1e3 * min(a for a, _ in pairs),
            "ms": 1e3 * min(b for _, b in pairs),
            "ratio": ratio,
            "work": work,
            "over_work": ratio / work,
        }

    return measure


def median(arm: str, metric: str = "ratio") -> Callable[[Results], float]:
    """Of a figure over the seeds."""
    return lambda results: results.median(arm, metric)


@benchmark(
    "technique_cost",
    question="What does a training step with each technique cost over the plain DiT of the same size?",
    passes=[
        PassLine("dtr: at most 2 % more", median("dtr"), at_most=1.02),
        PassLine("cep: at most 1 % more", median("cep"), at_most=1.01),
        PassLine("repa with cached targets: at most 10 % more", median("repa"), at_most=1.10),
        PassLine(
            "switch_dit: at most 10 % over its added multiply-adds", median("switch_dit", "over_work"), at_most=1.10
        ),
        PassLine("dit_moe: at most 15 % over its active multiply-adds", median("dit_moe", "over_work"), at_most=1.15),
        PassLine("ddae_plus, self-conditioning alone: at most 2 % more", median("ddae_plus"), at_most=1.02),
    ],
)
def technique_cost(budget: float) -> dict[str, Arm]:
    """A DiT of 12 blocks, half as wide as S, at 16 px."""
    steps, rounds = max(1, round(10 * budget)), max(2, 2 * round(ROUNDS * budget / 2))
    return {name: compare(name, steps, rounds) for name in CONFIGS}
