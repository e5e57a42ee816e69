"""Teachers trained with each technique: how exactly do images go to their latents and back?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.technique_runs import SETTINGS, STEPS
from benchmarks.technique_sets import SIZE, small_sets
from pagoda.diffusion import Condition, invert, karras_sigmas, sample
from pagoda.networks.experts import soft_routing
from pagoda.stages.config import override
from pagoda.stages.context import load_teacher
from pagoda.stages.presets import preset_config
from pagoda.stages.train import train
from pagoda.training import seeded_generator

ARMS = {"plain": [], "dtr": ["dtr"], "switch_dit": ["switch_dit"], "dit_moe": ["dit_moe"], "ddae_plus": ["ddae_plus"]}


def round_trip(techniques: list[str], budget: float) -> Arm:
    """PSNR of 128 held-out images after Heun's method there and back on 18 levels, and moments of their latents."""

    def measure(seed: int) -> dict[str, float]:
        settings = {
            **SETTINGS,
            "seed": seed,
            "teach.loop.steps": max(20, round(STEPS * budget)),
            "techniques": techniques,
        }
        data = small_sets()["shapes"]
        config = override(preset_config("tiny", data.source(Path()), base=SIZE, size=SIZE), settings)
        images, labels = data.held_out
        clean, condition = images[:128].float() / 127.5 - 1, Condition.of_labels(labels[:128])
        sigmas = karras_sigmas(18, sigma_min=0.04)
        noise = torch.randn(clean.shape, generator=seeded_generator("round-trip"))
        figures = {}
        with TemporaryDirectory() as folder:
            denoiser, _ = load_teacher(train(config, folder + "/run", until="teach", quiet=True).teacher)
        for name in ("hard", "soft") if "dit_moe" in techniques else ("hard",):
            manager = soft_routing(denoiser) if name == "soft" else contextlib.nullcontext()
            with manager, torch.no_grad():
                z = invert(denoiser, clean, sigmas=sigmas.flip(0), condition=condition, noise=noise)
                back = sample(denoiser, z, sigmas=torch.cat([sigmas, torch.zeros(1).double()]), condition=condition)
            error = (back - clean).square().mean()
            figures[f"psnr_{name}"] = float(10 * torch.log10(4 / error))
            figures[f"std_{name}"] = float(z.std())
        return figures

    return measure


@benchmark(
    "technique_inversion",
    question="Does a teacher with routing go to the latents and back as exactly as a plain one?",
    passes=[
        PassLine(
            "dtr: within 1 dB of the plain teacher",
            lambda r: r.median("dtr", "psnr_hard") - r.median("plain", "psnr_hard"),
            at_least=-1.0,
        ),
        PassLine(
            "switch_dit: within 1 dB",
            lambda r: r.median("switch_dit", "psnr_hard") - r.median("plain", "psnr_hard"),
            at_least=-1.0,
        ),
        PassLine(
            "dit_moe: within 1 dB",
            lambda r: r.median("dit_moe", "psnr_hard") - r.median("plain", "psnr_hard"),
            at_least=-1.0,
        ),
        PassLine(
            "ddae_plus: within 1 dB",
            lambda r: r.median("ddae_plus", "psnr_hard") - r.median("plain", "psnr_hard"),
            at_least=-1.0,
        ),
    ],
)
def technique_inversion(budget: float) -> dict[str, Arm]:
    """The networks that are another one when they sample."""
    return {name: round_trip(list(techniques), budget) for name, techniques in ARMS.items()}
