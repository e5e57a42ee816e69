"""Wall time against multiply-adds on a U-Net of Stable Diffusion's topology.

The network has Stable Diffusion's blocks at two fifths of its width: 142 M parameters, random weights, latents of 32 x 32, guidance in
one batch. Speed does not depend on the weights. In each arm the plain pipeline and the others run in turn, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import pagoda
from benchmarks.harness import Arm, PassLine, benchmark
from pagoda.acceleration import DeepCache, FasterDiffusion, Plan

WIDTHS = (128, 256, 512, 512)
STEPS = (20, 50)
PLANS: dict[str, Plan] = {
    "deepcache-n5-b0": DeepCache(interval=5, branch=0),
    "deepcache-n5-b1": DeepCache(interval=5, branch=1),
    "deepcache-n3-b0": DeepCache(interval=3, branch=0),
    "faster-one-by-one": FasterDiffusion(parallel=False),
    "faster-parallel": FasterDiffusion(max_parallel=5),
}
LONG = ("deepcache-n5-b0", "deepcache-n5-b1", "faster-one-by-one")
"""Plans that are held to a line; at 50 steps only these run."""


@cache
def pipeline(width_share: float) -> StableDiffusionPipeline:
    """Random weights, made once."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(max(32, int(w * width_share) // 32 * 32) for w in WIDTHS),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    made = StableDiffusionPipeline(
        AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
                      up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval().requires_grad_(False),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def run_once(pipe: StableDiffusionPipeline, steps: int, seed: int) -> Tensor:
    """Final latents of one run with guidance."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    latents: Tensor = pipe(
        prompt_embeds=embeddings[0],
        negative_prompt_embeds=embeddings[1],
        num_inference_steps=steps,
        height=256,
        width=256,
        generator=generator,
        output_type="latent",
    ).images
    return latents


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Result and seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def against_plain(plan: Plan, steps: int, share: float, rounds: int, seed: int) -> dict[str, float]:
    """Share of time saved over the share of multiply-adds saved, plain and accelerated runs in turn after a warm-up of both."""
    pipe, plain, fast, facts = pipeline(share), [], [], {}
    short = max(6, steps // 4)  # a call of each sort; the first of each is counted, which takes a little time
    run_once(pipe, short, seed)
    for _ in range(rounds):
        expected, seconds = timed(partial(run_once, pipe, steps, seed))
        plain.append(seconds)
        with pagoda.accelerate(pipe, plan) as run:
            run_once(pipe, short, seed)
            found, seconds = timed(partial(run_once, pipe, steps, seed))
        fast.append(seconds)
        facts = run.ledgers[0].facts()
    before, after = statistics.median(plain), statistics.median(fast)
    saved = facts["multiply_adds_saved"]
    return {
        "parameters_m": sum(p.numel() for p in pipe.unet.parameters()) / 1e6,
        "seconds_plain": before,
        "seconds": after,
        "speedup": before / after,
        "multiply_adds_saved": saved,
        "time_saved": 1 - after / before,
        "share_of_theory": (1 - after / before) / saved,
        "held_mib": facts["bytes_held"] / 2**20,
        "deviation": float((found - expected).norm() / expected.norm()),
    }


@benchmark(
    "acceleration_speed",
    question=(
        "How much of the multiply-adds that a plan saves is saved in wall time, on a U-Net of Stable Diffusion's topology with 142 M "
        "parameters? `share_of_theory` is the share of time saved over the share of multiply-adds saved."
    ),
    passes=[
        *(
            PassLine(
                f"{name}, {steps} steps: at least 90 % of the saving in multiply-adds is saved in time",
                lambda r, name=name, steps=steps: r.median(f"{name}-{steps}", "share_of_theory"),
                at_least=0.9,
            )
            for name in LONG
            for steps in STEPS
        ),
    ],
)
def acceleration_speed(budget: float) -> dict[str, Arm]:
    """Every plan at 20 steps, and those that are held to a line at 50; a smaller budget takes a narrower network."""
    share, rounds = (1.0, {20: 2, 50: 1}) if budget >= 1 else (max(0.25, budget**0.5), {20: 1, 50: 1})
    arms: dict[str, Arm] = {
        f"{name}-{steps}": partial(against_plain, plan, steps, share, rounds[steps])
        for steps in STEPS
        for name, plan in PLANS.items()
        if steps == 20 or name in LONG
    }
    return arms
