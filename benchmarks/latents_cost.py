"""What a run on latents computes against runs on pixels that end with images of the same size: emoji of 64 px, preset `small`.

While the generator grows, features and judges look through a window of the preset's: 24 px of an image, a seventh of 64 px, and 12 of its
latent. A window of 24 latents, more than half of them, is an arm of its own; what either gives in quality is asked by `latents_quality`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.emoji import archive
from benchmarks.harness import Arm, PassLine, Results, benchmark
from pagoda.data import open_source
from pagoda.networks import MultiplyAdds, open_codec
from pagoda.networks.autoencoders import KLCodec
from pagoda.stages.codec import build_autoencoder
from pagoda.stages.codec_config import CodecNetworkConfig, widths_of
from pagoda.stages.config import RunConfig, override
from pagoda.stages.plan_probe import Prober
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.training import Runtime

FACTOR, SIZE = 2, 64
WIDE = 24
"""Side of a window in latents that is as many as the preset's window has pixels."""
LATENTS = "latents, 16 to 32"


@cache
def codec_folder() -> str:
    """A fresh codec of the size that `pagoda codec train --factor 2` makes: what it computes does not depend on its weights."""
    folder = Path(tempfile.mkdtemp()) / "codec"
    network = CodecNetworkConfig(channels=widths_of(FACTOR))
    KLCodec(build_autoencoder(network, channels=3, size=SIZE)).save(folder)
    return str(folder)


def configuration(base: int, size: int, codec: str) -> RunConfig:
    """The preset `small` on the emoji."""
    settings = {"codec": codec, "source.filter": "skin_tone=", "device": "cpu"}
    factor = FACTOR if codec else 1
    return override(preset_config("small", str(archive()), base=base, size=size, codec_factor=factor), settings)


def planned(base: int, size: int, on_latents: bool, window: int | None, seed: int) -> dict[str, float]:
    """Millions of multiply-adds of one training image in each stage, and of all stages in 1e12; the same for every seed."""
    config = configuration(base, size, codec_folder() if on_latents else "")
    config = config if window is None else override(config, {"grow.loss.crop": window})
    plan = plan_run(config, probe_seconds=0)
    found = {
        f"{'grow' if stage.name.startswith('grow') else stage.name.replace('-', '_')}_m": stage.multiply_adds / 1e6
        for stage in plan.stages
    }  # the last octave
    found["all_e12"] = plan.multiply_adds / 1e12
    return found | sampling(config)


def sampling(config: RunConfig) -> dict[str, float]:
    """Millions of multiply-adds of one image: the generator's call, and the decoding."""
    codec = open_codec(config.codec) if config.codec else None
    source = open_source(config.data, options=config.source)
    with tempfile.TemporaryDirectory() as folder:
        prober = Prober(config, source, Path(folder), Runtime("cpu"), 0.0, codec)
        denoiser, _ = prober.teach()
        generator, probe = prober.distill(denoiser)
        for size in config.growth:
            generator, probe, _ = prober.grow(generator, denoiser, size, 64)
    found = {"generator_m": probe.pass_multiply_adds / 1e6}
    if codec is not None:
        with torch.no_grad(), MultiplyAdds() as counter:
            codec.decode(torch.zeros(1, codec.latent_channels, config.size, config.size))
        found["decode_m"] = counter.total / 1e6
        found["decode_over_generator"] = found["decode_m"] / found["generator_m"]
    return found


def fewer(stage: str) -> Callable[[Results], float]:
    """Multiply-adds of the run on pixels with as many octaves, over those of the run on latents."""
    return lambda r: r.median("pixels, 32 to 64", stage) / r.median(LATENTS, stage)


@benchmark(
    "latents_cost",
    question=(
        "How much less does a run compute that works on latents of half the side (codec of factor 2), when both end with emoji of 64 px? "
        "Millions of multiply-adds an image: of a training image in each stage (forward and backward), of a generated one, of its decoding."
    ),
    passes=[
        PassLine("teach: at least 3 x fewer an image than pixels with as many octaves", fewer("teach_m"), at_least=3),
        PassLine("distill: at least 3 x fewer", fewer("distill_m"), at_least=3),
        PassLine("grow: at least 3 x fewer", fewer("grow_m"), at_least=3),
        PassLine("all stages together: at least 3 x fewer", fewer("all_e12"), at_least=3),
        PassLine(
            "decoding one image costs less than twice the generator's call",
            lambda r: r.median(LATENTS, "decode_over_generator"),
            at_most=2,
        ),
    ],
)
def latents_cost(budget: float) -> dict[str, Arm]:
    """As many octaves on pixels from twice the base, and the same base with an octave more."""
    return {
        LATENTS: partial(planned, 16, 32, True, None),
        f"{LATENTS}, window {WIDE}": partial(planned, 16, 32, True, WIDE),
        "pixels, 32 to 64": partial(planned, 32, 64, False, None),
        "pixels, 16 to 64": partial(planned, 16, 64, False, None),
    }
