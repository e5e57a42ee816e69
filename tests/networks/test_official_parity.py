"""Golden arrays of the official code (made by `fixtures/make.py`): the same numbers from ours.

Its discriminator has another shape than ours (batch norm, another embedding of the classes) and is compared in words only; its counts are
those of `test_growth_cost.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pagoda.diffusion import EDMDenoiser, GaussianDenoiser, build_solver, invert, karras_sigmas, sample
from pagoda.networks import (
    DiffAugment,
    GrowthLevel,
    LevelConfig,
    OneStepGenerator,
    backbone_preset,
    build_backbone,
)
from pagoda.networks.description import describe_model
from pagoda.networks.growth import count_groups
from pagoda.stages.objective import adaptive_weight

GOLDEN = load_file(Path(__file__).parent / "fixtures" / "pagoda.safetensors")
WIDTH, EMBEDDING, SIDE = 128, 24, 8


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_grid_is_the_official_one() -> None:
    grid = torch.cat([karras_sigmas(40, sigma_min=0.002, sigma_max=80.0), torch.zeros(1)])
    torch.testing.assert_close(grid.float(), GOLDEN["grid"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["heun", "euler"])
def test_both_directions_end_where_the_official_samplers_end(name: str) -> None:
    denoiser, x = GaussianDenoiser(0.3, 0.5), drawn((2, 3, 4, 4), 3).double()
    grid, solver = GOLDEN["grid"].double(), build_solver(name)
    made = sample(denoiser, x, sigmas=grid, solver=solver)
    torch.testing.assert_close(made, GOLDEN[f"{name}_down"], rtol=1e-5, atol=1e-6)
    z = invert(denoiser, 0.3 + 0.5 * x, sigmas=grid[:-1].flip(0), solver=solver)
    torch.testing.assert_close(80 * z, GOLDEN[f"{name}_up"], rtol=1e-5, atol=1e-4)


def test_the_scalings_at_the_last_level_are_the_official_ones() -> None:
    denoiser = EDMDenoiser(torch.nn.Identity(), sigma_data=0.5, noise_scale=250.0)  # type: ignore[arg-type]
    c_skip, c_out, _ = denoiser.scalings(torch.tensor(80.0, dtype=torch.float64))
    torch.testing.assert_close(torch.stack([c_skip, c_out]), GOLDEN["scalings"], rtol=1e-12, atol=0)


def test_the_adaptive_weight_is_the_official_one() -> None:
    """Of |x|^2 and of the sum of x, by their gradients at x = (1, 2), which stands for the last layer."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    norms = [torch.autograd.grad(loss, x)[0].norm() for loss in (x.square().sum(), x.sum())]
    torch.testing.assert_close(adaptive_weight(*norms).reshape(1), GOLDEN["adaptive"], rtol=1e-6, atol=0)


# Side -> parameters of the official network and, with the decoder from block 9 on, the trained ones, in millions.
OFFICIAL_COUNTS = {64: (295.90, 24.74), 128: (298.34, 27.17), 256: (300.77, 29.61)}


def test_the_network_of_official_widths_grows_by_what_the_official_one_grows_by() -> None:
    """At its base it is smaller, without scale and shift in its norms (266 M); what an octave adds is the same."""
    with torch.device("meta"):
        base = describe_model(build_backbone(backbone_preset("base", 64), image_size=64, num_classes=1000))
        level = {"channels": 192, "num_blocks": 3, "use_rgb": False, "head_init": "copy"}
        levels = [asdict(LevelConfig(**level, head_groups=count_groups(192)))]  # type: ignore[arg-type]
        generators = [OneStepGenerator(base, output="raw", levels=levels * k) for k in range(3)]
    found = {}
    for generator in generators:
        generator.freeze_below("decoder.9")
        found[generator.size] = [
            sum(parameter.numel() for parameter in group) / 1e6
            for group in (generator.parameters(), generator.trainable_parameters())
        ]
    assert found[64] == pytest.approx([265.67, 21.34], abs=0.01)
    head = (192 * 27 + 3 + 2 * 192) / 1e6  # the official network moves its one head up, ours keeps the lower one
    for side in (128, 256):
        for ours, below, official, smaller in zip(
            found[side], found[side // 2], OFFICIAL_COUNTS[side], OFFICIAL_COUNTS[side // 2], strict=True
        ):
            assert ours - below - head == pytest.approx(official - smaller, abs=0.01)  # of numbers with two decimals


def test_a_level_of_three_blocks_is_the_official_level() -> None:
    config = LevelConfig(channels=WIDTH, num_blocks=3, use_rgb=False, head_init="copy", head_groups=count_groups(WIDTH))
    level = GrowthLevel(config, lower_channels=WIDTH, image_channels=3, embedding_dim=EMBEDDING)
    hidden, embedding, rgb = drawn((2, WIDTH, SIDE, SIDE), 1), drawn((2, EMBEDDING), 2), torch.zeros(2, 3, SIDE, SIDE)
    with torch.no_grad():
        fresh, _ = level(hidden, rgb, embedding)
        assert torch.equal(fresh[:, ::16], GOLDEN["growth_fresh"])
        assert torch.equal(fresh, F.interpolate(hidden, scale_factor=2, mode="nearest"))
        for index, block in enumerate(level.blocks):
            layers = (block.norm1, block.conv1, block.embed, block.norm2, block.conv2)
            for place, layer in enumerate(layers):
                for part, parameter in enumerate((layer.weight, layer.bias)):
                    parameter.copy_(drawn(tuple(parameter.shape), 100 * index + 10 * place + part, 0.05))
        trained, _ = level(hidden, rgb, embedding)
    torch.testing.assert_close(trained[:, ::16], GOLDEN["growth_trained"], rtol=1e-4, atol=1e-5)
    assert float((trained - fresh).norm() / fresh.norm()) > 0.01


def test_augmentation_with_given_numbers_is_the_official_one() -> None:
    images, u = drawn((6, 3, 16, 16), 4), torch.rand(6, 7, generator=torch.Generator().manual_seed(5))
    draw = {"colour": u[:, 0:3], "translation": u[:, 3:5], "cutout": u[:, 5:7]}
    ours = DiffAugment(("colour", "translation", "cutout")).apply(images, draw)
    torch.testing.assert_close(ours, GOLDEN["augmented"], rtol=1e-5, atol=1e-6)


def test_images_are_reduced_as_by_the_official_loader() -> None:
    from pagoda.data import Downsampler

    pixels = np.random.default_rng(0).integers(0, 256, (75, 90, 3), dtype=np.uint8)
    small = Downsampler("box_bicubic")(Image.fromarray(pixels), 16)
    assert torch.equal(torch.from_numpy(np.array(small)), GOLDEN["resized"])
