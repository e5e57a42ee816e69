"""What an image of 512 px costs in one step: the official generator against a latent consistency model of Stable Diffusion's shape.

    python -m benchmarks run price_512 --seeds 3 --json docs/results/price_512.json
    python -m benchmarks.price_512 draw docs/results/price_512.json docs/results/images/price_512.png

Weights are random: they change neither work nor time. Each model runs alone in a process of its own, one image a call: on a GPU where
PyTorch sees one, weights and inputs in bf16 (float32 where it has no units for that), else on two threads of the CPU in float32. With
CUDA_VISIBLE_DEVICES= before the command the CPU is measured beside a GPU too; that is a result of its own, in a file of its own.

- `generator`: a U-Net of 64 px of the official widths (192 channels, multiples 1, 2, 3, 4, three blocks a level, attention at 32, 16
  and 8 px, 64 channels a head), called once with a class label, and three octaves of 192, 192 and 96 channels above it, three
  blocks each.
- `latent_consistency`: diffusers' U-Net of Stable Diffusion 1.5 with a guidance embedding (256 values), called once on a latent of
  64 x 64 x 4, and the decoder of its autoencoder. The text encoder is left out, as is whatever else a prompt costs.

Multiply-adds are counted as they run. The official network has 109.7 G at 64 px and 430.4 G at 512 px. Ours differs: it is diffusers'
U-Net, whose levels shrink and grow by single convolutions, and its octaves also see the enlarged lower image.

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822: 512 px twice as fast as a one-step latent consistency model (arXiv:2310.04378).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.harness import Arm, PassLine, benchmark
from benchmarks.harness.runner import load_result
from benchmarks.metrics import measure_command
from benchmarks.places import DTYPES, Place, choose_place
from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.files import atomic_path
from pagoda.networks import BackboneConfig, OneStepGenerator, build_backbone, num_parameters
from pagoda.networks.counting import MultiplyAdds
from pagoda.networks.description import describe_model
from pagoda.networks.growth import LevelConfig, count_groups

THREADS = 2
CALLS = 5
"""Timed calls after one that is not; the median counts."""
GPU_CALLS = 50
"""The same on a GPU, where a call takes milliseconds."""
GPU_WARM_UP = 5
"""Calls of each kind on a GPU that are not timed: the first ones choose kernels and take memory."""
ON_CPU = Place("cpu", "float32")
BLOCKS = 3
"""Residual blocks an octave: the official one has one that enlarges and two more."""
OFFICIAL_MULTIPLY_ADDS = {64: 109.7e9, 512: 430.4e9}
MODELS = ("generator", "latent_consistency")
PARTS = {"generator": ("base, 64 px", "octaves"), "latent_consistency": ("U-Net", "decoder")}


@dataclass(frozen=True)
class Sizes:
    """Widths and sides; `full` is what is published, `small` is for trying the benchmark out."""

    channels: tuple[int, ...]
    octaves: tuple[int, ...]
    side: int
    unet: tuple[int, ...]
    decoder: tuple[int, ...]
    groups: int
    head: int
    context: int


FULL = Sizes((192, 384, 576, 768), (192, 192, 96), 64, (320, 640, 1280, 1280), (128, 256, 512, 512), 32, 64, 768)
SMALL = Sizes((32, 64, 96, 128), (32, 32, 16), 16, (32, 64, 128, 128), (16, 32, 64, 64), 16, 32, 64)


def build_generator(sizes: Sizes) -> OneStepGenerator:
    """The official generator's shape with random weights."""
    backbone = BackboneConfig(
        channels=sizes.channels,
        layers_per_block=3,
        attention_levels=(1, 2, 3),
        head_dim=sizes.head,
        norm_groups=sizes.groups,
    )
    with torch.device("meta"):  # only its description is needed, and a copy would count as memory
        network = build_backbone(backbone, image_size=sizes.side, in_channels=3, num_classes=1000)
    levels = [
        asdict(LevelConfig(channels=width, num_blocks=BLOCKS, head_groups=count_groups(width)))
        for width in sizes.octaves
    ]
    generator = OneStepGenerator(base_config=describe_model(network), levels=levels)
    return generator.eval().requires_grad_(False)


def build_latent_consistency(sizes: Sizes) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """U-Net and autoencoder of Stable Diffusion 1.5's shape with random weights; the encoder's half is dropped."""
    unet = UNet2DConditionModel(
        sample_size=sizes.side,
        block_out_channels=sizes.unet,
        cross_attention_dim=sizes.context,
        attention_head_dim=8,
        time_cond_proj_dim=256,
        norm_num_groups=sizes.groups,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=sizes.decoder,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.decoder),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.decoder),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=sizes.groups,
    )
    autoencoder.encoder = None
    return unet.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


def _generator(
    sizes: Sizes, seed: int, place: Place
) -> tuple[list[nn.Module], list[nn.Module], Callable[[], Tensor], Callable[[], Tensor]]:
    """Networks of both parts, the call of the first part, and that of the whole."""
    generator = build_generator(sizes)
    place.bring(generator)
    z = place.tensor(torch.randn(1, 3, sizes.side, sizes.side))
    condition = Condition.of_labels([seed % 1000]).to(torch.device(place.device))
    return (
        [generator.base],
        [generator.octaves],
        lambda: generator(z, condition, resolution=sizes.side),
        lambda: generator(z, condition),
    )


def _latent_consistency(
    sizes: Sizes, seed: int, place: Place
) -> tuple[list[nn.Module], list[nn.Module], Callable[[], Tensor], Callable[[], Tensor]]:
    unet, autoencoder = build_latent_consistency(sizes)
    for module in (unet, autoencoder):
        place.bring(module)
    noise, text = torch.randn(1, 4, sizes.side, sizes.side), torch.randn(1, 77, sizes.context)
    step, guidance = torch.tensor([999]), torch.randn(1, 256)
    noise, text, step, guidance = map(place.tensor, (noise, text, step, guidance))

    def latent() -> Tensor:
        return unet(noise, step, encoder_hidden_states=text, timestep_cond=guidance).sample

    return (
        [unet],
        [autoencoder.decoder, autoencoder.post_quant_conv],
        latent,
        lambda: autoencoder.decode(latent()).sample,
    )


def measure(
    model: str, sizes: Sizes, seed: int, place: Place = ON_CPU, *, threads: int = THREADS, calls: int = CALLS
) -> dict[str, Any]:
    """Parameters, multiply-adds and milliseconds of both parts of a model, one image a call; on a GPU also the most of its memory that
    was taken, weights included, and the bits of a number."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    build = {"generator": _generator, "latent_consistency": _latent_consistency}[model]
    first, second, call_first, call_whole = build(sizes, seed, place)
    counts = []
    with torch.no_grad():
        for call in (call_first, call_whole):
            with MultiplyAdds() as counter:
                image = call()
            counts.append(counter.total)
        if place.on_gpu:
            for call in GPU_WARM_UP * (call_first, call_whole):
                call()
            place.synchronise()
            torch.cuda.reset_peak_memory_stats()
        times: dict[Callable[[], Tensor], list[float]] = {call_first: [], call_whole: []}
        for _ in range(calls):
            for call, spent in times.items():  # interleaved, so that a machine that slows down slows both
                spent.append(place.seconds(call))
    before, whole = (1e3 * sorted(spent)[calls // 2] for spent in times.values())
    on_gpu: dict[str, float] = {}
    if place.on_gpu:
        on_gpu = {
            "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20,
            "bits": 8 * DTYPES[place.precision].itemsize,
        }
    return {
        "side": image.shape[-1],
        "parameters_m_first": num_parameters(first) / 1e6,
        "parameters_m_second": num_parameters(second) / 1e6,
        "gigamultiply_adds_first": counts[0] / 1e9,
        "gigamultiply_adds_second": (counts[1] - counts[0]) / 1e9,
        "ms_first": before,
        "ms_second": whole - before,
        "ms": whole,
        "images_per_s": 1e3 / whole,
        **on_gpu,
    }


def _arm(model: str, sizes: str, place: Place, seed: int) -> dict[str, float]:
    """In a process of its own, for its peak memory."""
    where = [place.device, place.precision]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.price_512", "measure", model, sizes, str(seed), *where]
        cost = measure_command(command, log=log)
        figures = json.loads(log.read_text().splitlines()[-1])
    return {**figures, "process_peak_mib": cost["peak_mib"]}


def described(place: Place) -> str:
    """A place for people."""
    return f"on a GPU in {place.precision}" if place.on_gpu else "on two threads"


@benchmark(
    "price_512",
    question=(
        "Does one step of the official generator make an image of 512 px at least twice as fast as one step of a latent consistency "
        "model? `first` is the base or the U-Net, `second` the octaves or the decoder; one image a call "
        f"{described(choose_place())}."
    ),
    passes=[
        PassLine(
            "at least 2 x faster (median over seeds)",
            lambda r: r.median("latent_consistency", "ms") / r.median("generator", "ms"),
            at_least=2.0,
        ),
        PassLine(
            "both make images of 512 px", lambda r: min(r.min(m, "side") for m in MODELS), at_least=512, at_most=512
        ),
        PassLine(
            "our base has the official one's multiply-adds at 64 px within 15 % (ratio)",
            lambda r: r.median("generator", "gigamultiply_adds_first") * 1e9 / OFFICIAL_MULTIPLY_ADDS[64],
            at_least=0.85,
            at_most=1.15,
        ),
        PassLine(
            "and the whole at 512 px within 25 % (ratio)",
            lambda r: (
                (r.median("generator", "gigamultiply_adds_first") + r.median("generator", "gigamultiply_adds_second"))
                * 1e9
                / OFFICIAL_MULTIPLY_ADDS[512]
            ),
            at_least=0.75,
            at_most=1.25,
        ),
    ],
)
def price_512(budget: float) -> dict[str, Arm]:
    """One arm a model; a budget below 1 measures small networks at a quarter of the size."""
    place = choose_place()
    return {model: partial(_arm, model, "full" if budget >= 1 else "small", place) for model in MODELS}


def draw(result: Path, target: Path) -> None:
    """Two stacked bars: milliseconds of both parts of both models, with multiply-adds and memory below them.

    Raises:
        ConfigError: the result is not finished.
    """
    import matplotlib.pyplot as plt

    record = load_result(result)
    if not record["complete"]:
        raise ConfigError(f"{result} is not finished: run the same command again first.")
    rows = {model: [row["metrics"] for row in record["arms"][model]] for model in MODELS}

    def middle(model: str, metric: str) -> float:
        values = sorted(row[metric] for row in rows[model])
        return float(values[len(values) // 2])

    on_gpu = "gpu_peak_mib" in rows["generator"][0]
    unit, memory, where = ("s", "process_peak_mib", f"{THREADS} threads")
    if on_gpu:
        unit, memory = "ms", "gpu_peak_mib"
        where = f"{record['machine']['accelerator']}, {middle('generator', 'bits'):.0f} bits"
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    names = {"generator": "one-step generator", "latent_consistency": "one-step latent\nconsistency model"}
    colours = {"first": "#3f6f8f", "second": "#d08a3c"}
    places = [1.5 * index for index in range(len(MODELS))]  # wide apart: words stand beside each bar
    for place, model in zip(places, MODELS, strict=True):
        bottom = 0.0
        for part, colour in colours.items():
            height = middle(model, f"ms_{part}") / (1 if on_gpu else 1e3)
            axes.bar(
                place,
                height,
                bottom=bottom,
                width=0.5,
                color=colour,
                edgecolor="white",
                hatch="//" if part == "second" else "",
            )
            work = f"{middle(model, f'gigamultiply_adds_{part}'):,.0f} G multiply-adds"
            words = f"{PARTS[model][part == 'second']}\n{height:.2f} {unit}, {work}"
            axes.annotate(words, (place + 0.28, bottom + height / 2), va="center", fontsize=8)
            bottom += height
    labels = []
    for model in MODELS:
        parameters = middle(model, "parameters_m_first") + middle(model, "parameters_m_second")
        labels.append(f"{names[model]}\n{parameters:,.0f} M parameters, {middle(model, memory) / 1024:.1f} GiB")
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.5, 2.9)
    axes.set_ylabel(
        f"{'milliseconds' if on_gpu else 'seconds'} an image of {middle('generator', 'side'):.0f} px, {where}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(target) as part_path:
        figure.savefig(part_path, dpi=150, format="png")
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"] and len(sys.argv) == 7:
        place = choose_place(*sys.argv[5:])
        calls = GPU_CALLS if place.on_gpu else CALLS
        sizes = {"full": FULL, "small": SMALL}[sys.argv[3]]
        print(json.dumps(measure(sys.argv[2], sizes, int(sys.argv[4]), place, calls=calls)))
    elif sys.argv[1:2] == ["draw"] and len(sys.argv) == 4:
        draw(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit("usage: python -m benchmarks.price_512 draw RESULT.json PICTURE.png")
