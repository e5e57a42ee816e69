"""The one-step generator: starts as its teacher, freezes what it says, comes back from disk unchanged."""

import copy

import pytest
import torch
from tests.networks.conftest import make_dit, make_unet
from torch import nn

from pagoda.diffusion.conditions import Condition
from pagoda.diffusion.denoiser import EDMDenoiser
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import DiffusersNetwork, OneStepGenerator, anatomy, model_hash

Z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = Condition.of_labels([0, -1, 4])


def wake(generator: OneStepGenerator) -> OneStepGenerator:
    """Random weights in the zero-initialised layers too."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in generator.octaves.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return generator


@pytest.fixture
def grown(teacher) -> OneStepGenerator:
    """8 -> 16 -> 32 px, every weight non-zero."""
    return wake(OneStepGenerator.from_teacher(teacher).grow(channels=12).grow(channels=8, num_blocks=1)).eval()


def test_generator_starts_as_the_teachers_denoiser_at_sigma_max(teacher):
    denoiser = EDMDenoiser(DiffusersNetwork(teacher), sigma_data=0.4, noise_scale=0.25)
    generator = OneStepGenerator.from_teacher(teacher, sigma_max=40.0, sigma_data=0.4, noise_scale=0.25)
    assert torch.allclose(generator.eval()(Z, LABELS), denoiser(40.0 * Z, 40.0, LABELS), atol=1e-6)


def test_raw_output_is_the_network_itself(teacher):
    generator = OneStepGenerator.from_teacher(teacher, output="raw").eval()
    denoised = EDMDenoiser(DiffusersNetwork(teacher))(80 * Z, 80.0, LABELS)
    c_skip, c_out = 0.25 / (6400 + 0.25), 80 * 0.5 / (6400 + 0.25) ** 0.5
    assert torch.allclose(c_skip * 80 * Z + c_out * generator(Z, LABELS), denoised, atol=1e-6)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_teachers_dropout_ends_with_the_teacher(kind):
    """In train mode too: the generator is a function of its noise, and starts as the teacher without its dropout."""
    teacher = {"unet": make_unet, "dit": make_dit}[kind](dropout=0.5)
    denoiser = EDMDenoiser(DiffusersNetwork(teacher))
    generator = OneStepGenerator.from_teacher(teacher).train()
    images = generator(Z, LABELS)
    assert torch.equal(generator(Z, LABELS), images)
    torch.testing.assert_close(images, denoiser(80.0 * Z, 80.0, LABELS), atol=1e-6, rtol=0)
    grown = generator.grow().train()
    assert torch.equal(grown(Z, LABELS), grown(Z, LABELS))
    teacher.train()
    assert not torch.equal(denoiser(80.0 * Z, 80.0, LABELS), denoiser(80.0 * Z, 80.0, LABELS))  # left as it was


def test_generator_is_a_copy(teacher):
    before = model_hash(teacher)
    generator = OneStepGenerator.from_teacher(DiffusersNetwork(teacher))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1)
    assert model_hash(teacher) == before


def test_shape_is_read_from_the_generator(grown):
    assert (grown.sizes, grown.base_size, grown.size) == ([8, 16, 32], 8, 32)
    assert (grown.channels, grown.num_classes, grown.sigma_max) == (3, 5, 80.0)


def test_every_resolution_has_its_own_head(grown):
    images = grown(Z, LABELS, return_all=True)
    assert {size: tuple(image.shape) for size, image in images.items()} == {
        size: (3, 3, size, size) for size in (8, 16, 32)
    }
    for size, image in images.items():
        assert torch.equal(grown(Z, LABELS, resolution=size), image)
    assert torch.equal(grown(Z, LABELS), images[32])
    assert list(grown(Z, LABELS, resolution=16, return_all=True)) == [8, 16]


def test_lower_resolution_does_not_run_the_levels_above(grown):
    grown.octaves[1].register_forward_hook(lambda *_: pytest.fail("the top level ran"))
    grown(Z, LABELS, resolution=16)
    grown.lower_outputs(Z, LABELS)


@pytest.mark.parametrize("size", [16, 32, None])
def test_lower_and_top_compose_to_the_whole_bitwise(grown, size):
    lower = grown.lower_outputs(Z, LABELS, size)
    assert lower[0].shape[-1] == lower[1].shape[-1] == (size or 32) // 2
    assert torch.equal(grown.forward_top(*lower, size=size), grown(Z, LABELS))


def test_sizes_that_do_not_exist_are_refused(grown):
    with pytest.raises(ShapeError, match=r"no level of this generator makes 64 px; accepted are \[8, 16, 32\]"):
        grown(Z, LABELS, resolution=64)
    with pytest.raises(ShapeError, match="nothing lies below the base size 8"):
        grown.lower_outputs(Z, LABELS, 8)
    with pytest.raises(ShapeError, match=r"noise must have shape \(B, 3, 8, 8\), got \(3, 3, 16, 16\)"):
        grown(torch.zeros(3, 3, 16, 16), LABELS)
    with pytest.raises(ConfigError, match="label 5 is out of range"):
        grown(Z, Condition.of_labels([0, 5, 1]))


def test_label_reaches_every_size(grown):
    others = grown(Z, Condition.of_labels([1, 2, 3]), return_all=True)
    for size, image in grown(Z, LABELS, return_all=True).items():
        assert not torch.equal(image, others[size])


def test_image_does_not_depend_on_its_batch(grown):
    whole = grown(Z, LABELS)
    single = torch.cat([grown(Z[k : k + 1], LABELS[k : k + 1]) for k in range(3)])
    assert torch.allclose(whole, single, atol=1e-5)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_round_trip_through_a_folder_is_bit_exact(teacher, tmp_path, levels):
    generator = OneStepGenerator.from_teacher(teacher, output="raw", sigma_max=20.0, sigma_data=0.3, noise_scale=0.25)
    for channels in (12, 8)[:levels]:
        generator = generator.grow(channels=channels, upsample="bilinear", use_rgb=channels == 8, head_init="zero")
    wake(generator).eval().save_pretrained(tmp_path)
    loaded = OneStepGenerator.from_pretrained(tmp_path, local_files_only=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert model_hash(loaded) == model_hash(generator)
    assert torch.equal(loaded(Z, LABELS), generator(Z, LABELS))
    assert loaded.sizes == generator.sizes
    assert torch.equal(loaded.grow()(Z, LABELS, resolution=8), generator(Z, LABELS, resolution=8))


def test_deep_copy_is_independent(grown):
    twin = copy.deepcopy(grown)
    assert torch.equal(twin(Z, LABELS), grown(Z, LABELS))
    with torch.no_grad():
        next(twin.base.parameters()).add_(1)
    assert not torch.equal(twin(Z, LABELS), grown(Z, LABELS))


@pytest.mark.parametrize(("boundary", "trained"), [(8, {8, 16, 32}), (16, {16, 32}), (32, {32}), ("top", {32})])
def test_only_what_lies_above_the_boundary_is_trained(grown, boundary, trained):
    names = grown.freeze_below(boundary)
    owners = {8: grown.base, 16: grown.octaves[0], 32: grown.octaves[1]}
    for size, module in owners.items():
        assert all(parameter.requires_grad == (size in trained) for parameter in module.parameters())
    assert len(names) + len(grown.trainable_parameters()) == len(list(grown.parameters()))
    grown.train()
    assert {size for size, module in owners.items() if module.training} == trained


def test_boundary_can_be_moved_back(grown):
    grown.freeze_below("top")
    assert grown.freeze_below(8) == []
    assert len(grown.trainable_parameters()) == len(list(grown.parameters()))


def test_boundary_inside_the_base_freezes_the_parts_before_it(grown):
    parts = anatomy(grown.base)
    names = [name for name in parts.names() if "." in name]
    boundary = names[-1]
    frozen = set(grown.freeze_below(boundary))
    trained = {id(p) for name in (boundary, "head") for module in parts.part(name) for p in module.parameters()}
    for name, parameter in grown.named_parameters():
        assert (name in frozen) == (name.startswith("base.") and id(parameter) not in trained)
    with pytest.raises(ConfigError, match=r"no part `decoder.99`"):
        grown.freeze_below("decoder.99")


def test_frozen_tensors_stay_bit_identical_while_the_top_trains(grown):
    frozen = set(grown.freeze_below("top"))
    before = {name: value.clone() for name, value in grown.state_dict().items()}
    old = grown(Z, LABELS, resolution=16)
    grown.train()
    optimiser = torch.optim.Adam(grown.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        grown(Z, LABELS).square().mean().backward()
        optimiser.step()
    after = grown.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert torch.equal(grown(Z, LABELS, resolution=16), old)


def test_parameters_that_are_never_trained_stay_so(make_unet_with):
    teacher = make_unet_with(time_embedding_type="fourier")
    generator = OneStepGenerator.from_teacher(teacher, noise_scale=0.25).grow()
    assert generator.freeze_below("top")
    assert generator.freeze_below(8) == ["base.time_proj.weight"]


def test_last_layer_is_the_one_that_scales_the_image(grown):
    for size in grown.sizes:
        images = grown(Z, LABELS, resolution=size)
        (gradient,) = torch.autograd.grad(images.sum(), grown.last_layer(size))
        assert gradient.abs().sum() > 0
    assert grown.last_layer() is grown.last_layer(32)
    assert grown.last_layer(32).shape == (3, 8, 3, 3)


def test_text_conditioned_base_works_too(text_unet):
    condition = Condition(tokens=torch.randn(3, 4, 6), tokens_mask=torch.ones(3, 4, dtype=torch.bool))
    generator = OneStepGenerator.from_teacher(text_unet).eval()
    expected = EDMDenoiser(DiffusersNetwork(text_unet))(80 * Z, 80.0, condition)
    assert torch.allclose(generator(Z, condition), expected, atol=1e-6)
    assert generator.grow()(Z, condition).shape == (3, 3, 16, 16)


def test_half_precision_teacher_gives_a_half_precision_generator(unet):
    generator = OneStepGenerator.from_teacher(unet.to(torch.bfloat16)).grow()
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.bfloat16}


def test_impossible_settings_are_refused(unet):
    with pytest.raises(ConfigError, match=r"unknown generator output 'denoise'. Did you mean `denoiser`"):
        OneStepGenerator.from_teacher(unet, output="denoise")
    with pytest.raises(ConfigError, match="must be > 0"):
        OneStepGenerator.from_teacher(unet, sigma_max=0.0)
    with pytest.raises(ConfigError, match="`Linear` is not supported"):
        OneStepGenerator.from_teacher(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="unknown model class `Linear`"):
        OneStepGenerator(base_config={"_class_name": "Linear"})
