"""The twelve exact invariants of PaGoDA, one after the other, on a tiny U-Net with random weights and on exact denoisers.

Where a room's own tests say more about one of them, the comment above it names the file.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import tiny_config
from torch import Tensor, nn

from pagoda.data import LatentStore
from pagoda.diffusion import (
    Condition,
    CosineVPSchedule,
    EDMDenoiser,
    Euler,
    FixedPoint,
    GaussianDenoiser,
    GuidedDenoiser,
    build_solver,
    convert,
    invert,
    karras_sigmas,
    sample,
)
from pagoda.networks import (
    BackboneConfig,
    DiffAugment,
    DiffusersNetwork,
    Discriminator,
    MixedFeatures,
    OneStepGenerator,
    RandomFeatures,
    TeacherFeatures,
    build_backbone,
    feature_distance,
)
from pagoda.stages.encode import encode_batch
from pagoda.stages.objective import ADAPTIVE_RANGE, adaptive_weight
from pagoda.steering.holes import fill_hole
from pagoda.steering.mixing import interpolate_latents

LABELS = Condition.of_labels([0, -1, 2])
Z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(GaussianDenoiser):
    """Knows how often it was called, and at which levels."""

    def __init__(self, mean: float = 0.1, std: float = 0.5) -> None:
        super().__init__(mean, std)
        self.levels: list[float] = []

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.levels.append(float(sigma.flatten()[0]))
        return super().denoise(x, sigma, condition)


@pytest.fixture
def network() -> nn.Module:
    config = BackboneConfig(channels=(16, 32), head_dim=16, norm_groups=4)
    model = build_backbone(config, image_size=8, num_classes=3)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def nearest(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2, mode="nearest")


# 1. tests/diffusion/test_solvers.py
def test_1_the_grid_meets_its_ends_and_inversion_visits_it_backwards() -> None:
    grid = karras_sigmas(40)
    ulp = torch.finfo(torch.float64).eps
    assert float(grid[0]) == pytest.approx(80, rel=ulp)
    assert float(grid[-1]) == pytest.approx(0.002, rel=ulp)
    assert torch.allclose(grid[1:3], torch.tensor([69.451, 60.117], dtype=torch.float64), atol=1e-3)
    down, up = Counting(), Counting()
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    sample(down, x, sigmas=grid, solver=Euler())
    invert(up, x, sigmas=grid.flip(0), solver=Euler())
    assert down.levels == pytest.approx(grid[:-1].tolist())
    assert up.levels == pytest.approx(grid.flip(0)[:-1].tolist())


# 2. tests/diffusion/test_solvers.py
def test_2_an_euler_step_of_inversion_is_the_textbook_step_of_ddim() -> None:
    schedule, denoiser = CosineVPSchedule(), GaussianDenoiser(0.3, 0.5)
    t, s = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    x_t = Z.double()
    x0 = denoiser(x_t / schedule.alpha(t), float(schedule.nu(t)))
    eps = convert(x0, x_t, t, "x0", "eps", schedule)
    grid = torch.stack([schedule.nu(t), schedule.nu(s)])
    ours = invert(denoiser, x_t / schedule.alpha(t), sigmas=grid, solver=Euler()) * schedule.nu(s) * schedule.alpha(s)
    expected = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    assert float((ours - expected).norm() / expected.norm()) < 1e-6


# 3. tests/diffusion/test_solvers.py
@pytest.mark.parametrize(("name", "factor"), [("heun", 4), ("euler", 2)])
def test_3_errors_fall_with_the_order_of_the_solver(name: str, factor: float) -> None:
    denoiser = GaussianDenoiser(0.3, 0.5)
    images = 0.3 + 0.5 * Z.double()
    exact = 0.3 + (images - 0.3) * ((0.25 + 80**2) / (0.25 + 0.002**2)) ** 0.5
    errors = []
    for count in (80, 160, 320):
        z = invert(denoiser, images, sigmas=karras_sigmas(count).flip(0), solver=build_solver(name))
        errors.append(float((80 * z - exact).norm()))
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([factor] * 2, rel=0.12)


def test_3_a_round_trip_by_fixed_points_is_exact() -> None:
    solver = FixedPoint(Euler(), iterations=20)
    denoiser, images, grid = GaussianDenoiser(0.3, 0.5), 0.3 + 0.5 * Z.double(), karras_sigmas(40)
    z = invert(denoiser, images, sigmas=grid.flip(0), solver=solver)
    assert float((sample(denoiser, z, sigmas=grid, solver=Euler()) - images).abs().max()) < 1e-5


def test_3_a_round_trip_by_the_solver_of_that_name_is_exact() -> None:
    """`encode.solver=fixed_point` solves for what Heun's method carries back."""
    denoiser, images, grid = GaussianDenoiser(0.3, 0.5), 0.3 + 0.5 * Z.double(), karras_sigmas(40)
    z = invert(denoiser, images, sigmas=grid.flip(0), solver=build_solver("fixed_point"))
    back = sample(denoiser, z, sigmas=grid, solver=build_solver("heun"))
    assert float((back - images).abs().max()) < 1e-5
    plain = invert(denoiser, images, sigmas=grid.flip(0), solver=build_solver("heun"))
    assert float((sample(denoiser, plain, sigmas=grid, solver=build_solver("heun")) - images).abs().max()) > 1e-5


# 4. tests/diffusion/test_solvers.py
@pytest.mark.parametrize(("name", "calls"), [("heun", 78), ("euler", 39)])
def test_4_an_inversion_of_forty_levels_makes_so_many_calls(name: str, calls: int) -> None:
    denoiser = Counting()
    invert(denoiser, Z.double(), sigmas=karras_sigmas(40).flip(0), solver=build_solver(name))
    assert len(denoiser.levels) == calls


def test_4_sampling_makes_one_call(network: nn.Module) -> None:
    generator, calls = OneStepGenerator.from_teacher(network).eval().grow(channels=8), []
    generator.base.conv_in.register_forward_hook(lambda *_: calls.append(1))
    generator(Z, LABELS)
    assert len(calls) == 1


# 5. tests/networks/test_generator.py
def test_5_the_generator_starts_as_the_denoiser_or_as_the_raw_network(network: nn.Module) -> None:
    denoised = EDMDenoiser(DiffusersNetwork(network))(80 * Z, 80.0, LABELS)
    generator = OneStepGenerator.from_teacher(network).eval()
    raw = OneStepGenerator.from_teacher(network, output="raw").eval()
    assert torch.allclose(generator(Z, LABELS), denoised, atol=1e-6)
    c_in = 1 / (6400 + 0.25) ** 0.5
    time = torch.full((3,), 250 * torch.log(torch.tensor(80.0)))
    assert torch.allclose(raw(Z, LABELS), DiffusersNetwork(network)(c_in * 80 * Z, time, LABELS), atol=1e-6)


# 6. tests/networks/test_growth.py
def test_6_features_of_a_new_level_are_the_old_ones_enlarged_bit_for_bit(network: nn.Module) -> None:
    generator = OneStepGenerator.from_teacher(network).eval()
    grown = generator.grow(use_rgb=False, head_init="copy").grow(use_rgb=False, head_init="copy")
    lower, *_ = grown.lower_outputs(Z, LABELS, 16)
    upper, *_ = grown.lower_outputs(Z, LABELS, 32)
    assert torch.equal(upper, nearest(lower))
    image = grown(Z, LABELS, resolution=16).detach()
    assert (
        float((image - nearest(generator(Z, LABELS).detach())).norm() / image.norm()) > 1e-3
    )  # the head sees doubled pixels
    assert torch.equal(generator.grow(channels=8, head_init="zero")(Z, LABELS), torch.zeros(3, 3, 16, 16))
    enlarged = F.interpolate(generator(Z, LABELS), scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(generator.grow(channels=8, head_init="skip_rgb")(Z, LABELS), enlarged)


# 7. tests/stages/test_growth.py
@pytest.mark.parametrize(("boundary", "moves"), [("top", False), (16, False), (8, True), ("decoder.3", True)])
def test_7_frozen_tensors_stay_and_a_lower_head_moves_only_with_its_own_levels(
    network: nn.Module, boundary: int | str, moves: bool
) -> None:
    grown = OneStepGenerator.from_teacher(network).grow(channels=8).train()
    grown.freeze_below(boundary)
    frozen = {name: p.detach().clone() for name, p in grown.named_parameters() if not p.requires_grad}
    before = grown(Z, LABELS, resolution=8).detach()
    optimiser = torch.optim.Adam(grown.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (grown(Z, LABELS) - 0.5).square().mean().backward()
        optimiser.step()
    after = dict(grown.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert torch.equal(grown(Z, LABELS, resolution=8), before) is not moves


# 8. tests/diffusion/test_denoisers.py and tests/networks
def test_8_guidance_of_one_and_of_zero_are_the_plain_fields_and_its_embedding_starts_silent(
    network: nn.Module,
) -> None:
    denoiser = EDMDenoiser(DiffusersNetwork(network))
    plain = denoiser(Z, 1.0, LABELS)
    assert torch.equal(GuidedDenoiser(denoiser, 1.0)(Z, 1.0, LABELS), plain)
    null = denoiser(Z, 1.0, LABELS.null())  # in a batch of twice the size beside the other, where last bits move
    torch.testing.assert_close(GuidedDenoiser(denoiser, 0.0)(Z, 1.0, LABELS), null, rtol=1e-5, atol=1e-6)
    stack = TeacherFeatures(network)
    judge = Discriminator.for_stack(stack, image_size=8, num_classes=3, guided=True).eval()
    weights = [Condition(label=LABELS.label, guidance=torch.full((3,), w)) for w in (1.0, 5.0)]
    assert torch.equal(judge(Z, weights[0]), judge(Z, weights[1]))
    generator = OneStepGenerator.from_teacher(network, guidance_max=8.0).eval()
    assert torch.equal(generator(Z, weights[0]), generator(Z, weights[1]))


# 9. tests/data/test_latents.py
def test_9_latents_come_back_and_a_mirrored_latent_is_that_of_the_mirrored_image(tmp_path: Path) -> None:
    latents = torch.randn(10, 3, 8, 8)

    def fill(path: Path, *, stop: int | None = None) -> LatentStore:
        store = LatentStore.create(
            path, provenance={"kind": "test"}, shape=(3, 8, 8), count=5, flips=True, dtype="float32", shard_size=4
        )
        for shard in store.missing_shards()[:stop]:
            indices, flips = store.shard_rows(shard)
            store.write_shard(shard, latents[2 * indices + flips])
        return store

    fill(tmp_path / "whole")
    fill(tmp_path / "parts", stop=1)
    fill(tmp_path / "parts")
    rows, flips = torch.tensor([3, 0, 3]), torch.tensor([1, 0, 0])
    for name in ("whole", "parts"):
        assert torch.equal(LatentStore.open(tmp_path / name).get(rows, flips), latents[2 * rows + flips])


def test_9_the_encoder_sees_the_mirrored_image(finished_run: object, tmp_path: Path) -> None:
    from pagoda.stages.context import load_teacher, open_context
    from pagoda.stages.run_folder import RunFolder
    from pagoda.training import Runtime

    assert isinstance(finished_run, RunFolder)
    config = tiny_config(encode__add_noise=False)
    context = open_context(finished_run, config, Runtime("cpu"), quiet=True)
    denoiser, _ = load_teacher(finished_run.teacher)
    rows = torch.tensor([1, 4])
    mirrored = encode_batch(context, denoiser, rows, torch.ones_like(rows))
    images = context.data.images(rows, 8).flip(-1)
    from pagoda.stages.encode import inversion_grid

    grid = inversion_grid(config.encode, config.sigma_max)
    condition = Condition.of_labels(context.data.labels(rows))
    by_hand = invert(denoiser, images, sigmas=grid, condition=condition, solver=build_solver(config.encode.solver))
    torch.testing.assert_close(mirrored, by_hand, atol=1e-5, rtol=1e-4)


# 10. tests/stages/test_losses.py
def test_10_the_adaptive_weight_makes_both_gradients_of_one_length() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (rebuild,) = torch.autograd.grad((x.square()).sum(), x)  # (2, 4)
    (pull,) = torch.autograd.grad((x - 0.5).square().sum(), x)
    weight = adaptive_weight(rebuild.norm(), pull.norm())
    assert float(weight * pull.norm()) == pytest.approx(float(rebuild.norm()), rel=1e-4)
    assert float(adaptive_weight(rebuild.norm(), 3 * pull.norm())) == pytest.approx(float(weight) / 3, rel=1e-4)
    assert float(adaptive_weight(torch.tensor(1e6), torch.tensor(1.0))) == ADAPTIVE_RANGE[1]
    assert float(adaptive_weight(torch.tensor(0.0), torch.tensor(1.0))) == pytest.approx(ADAPTIVE_RANGE[0])


# 11. tests/steering
def test_11_known_pixels_are_kept_and_interpolation_ends_where_it_should() -> None:
    first, second = torch.randn(2, 1, 3, 8, 8)
    assert torch.equal(interpolate_latents(first, second, 0.0), first)
    assert torch.equal(interpolate_latents(first, second, 1.0), second)
    mask = (torch.rand(1, 1, 8, 8) < 0.7).float()  # 1 = keep
    filled = fill_hole(first, mask)
    assert torch.equal(filled * mask, first * mask)


# 12. tests/networks/test_features.py
@pytest.mark.parametrize("mixed", [False, True])
def test_12_the_feature_distance_is_a_bounded_distance_of_pairs_that_are_augmented_alike(
    network: nn.Module, mixed: bool
) -> None:
    stacks = [TeacherFeatures(network), RandomFeatures(3, (8, 16))]
    for stack in (MixedFeatures(s, width=8) if mixed else s for s in stacks):
        x, y = torch.rand(2, 3, 3, 16, 16) * 2 - 1
        d = feature_distance(stack(x), stack(y))
        assert torch.equal(feature_distance(stack(x), stack(x)), torch.zeros(3))
        assert torch.equal(d, feature_distance(stack(y), stack(x)))
        assert bool(((d > 0) & (d <= 4 * len(stack.channels))).all())
        augment = DiffAugment(("colour", "translation", "cutout"))
        draw = augment.draw(3, torch.Generator().manual_seed(0))
        shared = [augment.apply(images, draw) for images in (x, x)]
        assert torch.equal(feature_distance(stack(shared[0]), stack(shared[1])), torch.zeros(3))
        apart = augment.apply(x, augment.draw(3, torch.Generator().manual_seed(1)))
        assert bool((feature_distance(stack(shared[0]), stack(apart)) > 0).all())
