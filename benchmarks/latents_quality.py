"""What comes of runs on latents and on pixels from as many multiply-adds, both to 32 px: drawn shapes, a codec of factor 2 of one's own.

The work is counted by `pagoda plan` before the run: inversion, teacher's pairs, growth and the encoding of images are in it; the training
of the codec is not, since one codec serves every later run (`codec_minutes` tells what it took). The arm `codec` has no generator: real
images are encoded and decoded, which tells what latents cost by themselves.

A window of 16 sees a quarter of a picture of 32 px, but the whole of its latent: the last arm's sees a quarter of both.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.shapes import real_images
from benchmarks.theory.base_size import with_work, work
from benchmarks.theory.shapes_runs import distance, num_scored, samples, seconds, shapes_config
from pagoda.evaluation import psnr
from pagoda.networks import AutoencoderCodec
from pagoda.stages.codec import train_codec
from pagoda.stages.codec_config import CodecNetworkConfig, CodecTrainConfig, widths_of
from pagoda.stages.config import RunConfig, override
from pagoda.stages.train import train

BASE, SIZE, FACTOR = 8, 32, 2
STEPS = 0.5
"""Share of the demo's steps that the run on pixels takes."""
CODEC_STEPS = 400
WINDOW = 8
"""Of the last arm, in latents."""
DRAWN = 3000
"""Images that the codec is trained on."""


@cache
def codec_of(seed: int, budget: float) -> tuple[AutoencoderCodec, str, float]:
    """A codec of drawn images, its folder and the minutes that it took."""
    folder = Path(tempfile.mkdtemp(prefix="pagoda-codec-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = override(
        CodecTrainConfig(
            data=f"shapes:count={max(100, round(DRAWN * min(1.0, budget)))}",
            size=SIZE,
            seed=seed,
            mirror=False,
            device="cpu",
            network=CodecNetworkConfig(channels=widths_of(FACTOR)),
        ),
        {"loop.steps": max(4, round(CODEC_STEPS * budget)), "loop.preview_every": 0},
    )
    started = time.perf_counter()
    codec = train_codec(config, folder, quiet=True)
    return codec, str(folder), (time.perf_counter() - started) / 60


def config_of(seed: int, budget: float, codec: str, window: int | None = None) -> RunConfig:
    """The demo's settings on pixels, or on latents with all steps multiplied so that the work is that of the run on pixels."""
    pixels = shapes_config(seed, base=BASE, size=SIZE, budget=STEPS * budget)
    if not codec:
        return pixels
    config = shapes_config(seed, base=BASE, size=SIZE // FACTOR, budget=STEPS * budget, codec=codec)
    config = config if window is None else override(config, {"grow.loss.crop": window})
    return with_work(config, work(pixels))


def generated(on_latents: bool, window: int | None, budget: float, seed: int) -> dict[str, float]:
    """Train a run and score its samples at 32 px."""
    config = config_of(seed, budget, codec_of(seed, budget)[1] if on_latents else "", window)
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, str(Path(folder) / "run"), quiet=True)
        made = samples(run, config.size, num_scored(budget))
        return {
            **distance(made, seed),
            "gigamultiply_adds": work(config) / 1e9,
            "minutes": seconds(run) / 60,
            "steps_grow": float(sum(config.grow.steps[: len(config.growth)])),
        }


def rebuilt(budget: float, seed: int) -> dict[str, float]:
    """Real images that the judge knows, encoded and decoded."""
    codec, _, minutes = codec_of(seed, budget)
    images = real_images(SIZE)[0][: num_scored(budget)].float() / 127.5 - 1
    with torch.no_grad():
        made = torch.cat([codec.decode(codec.encode(part)).clamp(-1, 1) for part in images.split(100)])
    return {**distance(made, seed), "psnr": psnr(made, images), "codec_minutes": minutes}


def over(arm: str) -> object:
    """The largest ratio over the seeds of an arm's distance to that of the run on pixels."""

    def value(results: Results) -> float:
        pairs = zip(results.values(arm, "distance"), results.values("pixels", "distance"), strict=True)
        return max(a / b for a, b in pairs)

    return value


@benchmark(
    "latents_quality",
    question=(
        "Does a run on latents of half the side come as near to the data as one on pixels, from as many multiply-adds? Drawn shapes, to "
        "32 px."
    ),
    passes=[
        PassLine("latents: at most 1.25 x the distance of pixels, on every seed", over("latents"), at_most=1.25),  # type: ignore[arg-type]
        PassLine(
            f"a window of {WINDOW} latents costs at most a tenth of the distance in the median",
            lambda r: r.median(f"latents, window {WINDOW}", "distance") / r.median("latents", "distance"),
            at_most=1.1,
        ),
        PassLine(
            "the codec alone leaves at most half of the distance of the run on pixels",
            lambda r: r.median("codec", "distance") / r.median("pixels", "distance"),
            at_most=0.5,
        ),
    ],
)  # fmt: skip
def latents_quality(budget: float) -> dict[str, Arm]:
    """The codec alone, and a run on pixels and two on its latents."""
    return {
        "codec": partial(rebuilt, budget),
        "pixels": partial(generated, False, None, budget),
        "latents": partial(generated, True, None, budget),
        f"latents, window {WINDOW}": partial(generated, True, WINDOW, budget),
    }
