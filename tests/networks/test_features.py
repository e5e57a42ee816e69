"""Frozen feature stacks and the distance in them."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import DiffusersNetwork, RandomFeatures, TeacherFeatures, anatomy, feature_distance
from pagoda.networks import anatomy as find_anatomy
from pagoda.networks.features import default_taps

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=["teacher-unet", "teacher-dit", "random"])
def stack(request, unet, dit):
    return {
        "teacher-unet": lambda: TeacherFeatures(unet),
        "teacher-dit": lambda: TeacherFeatures(dit),
        "random": lambda: RandomFeatures(3, (4, 8), seed=1),
    }[request.param]()


def test_stack_says_its_channels_and_sides(stack):
    for size in (8, 16):  # larger than the teacher's own size too
        maps = stack(torch.rand(2, 3, size, size))
        assert [features.shape[1] for features in maps] == stack.channels
        assert [features.shape[-1] for features in maps] == stack.sides(size)


def test_stack_is_frozen_and_passes_gradients_to_the_images(stack):
    stack.train()
    assert not any(module.training for module in stack.modules())
    assert not any(parameter.requires_grad for parameter in stack.parameters())
    images = IMAGES.clone().requires_grad_(True)
    torch.stack([features.square().mean() for features in stack(images)]).sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_teacher_features_are_the_taps_of_the_scaled_clean_image(unet):
    stack = TeacherFeatures(unet, sigma=0.2, names=["middle", "encoder.0"], sigma_data=0.4, noise_scale=0.25)
    c_in = 1 / (0.2**2 + 0.4**2) ** 0.5
    t = 0.25 * torch.full((4,), 0.2).log()
    caught = {}
    parts = anatomy(unet)
    for name in ("middle", "encoder.0"):
        parts.part(name)[-1].register_forward_hook(lambda *a, name=name: caught.update({name: a[-1]}))
    DiffusersNetwork(unet)(c_in * IMAGES, t)
    for found, name in zip(stack(IMAGES), ("middle", "encoder.0"), strict=True):
        assert torch.allclose(found, caught[name], atol=1e-6)


def test_default_taps_are_the_last_layers_of_the_encoder_levels(deep_case, dit):
    parts = find_anatomy(deep_case.network)
    taps = default_taps(parts)
    assert [parts.level(name) for name in taps] == [1, 2, 4]
    assert taps[-1] == [name for name in parts.names() if name.startswith("encoder.")][-1]
    assert default_taps(find_anatomy(dit)) == ["block.0", "block.1", "block.2"]


def test_stack_copies_the_teacher(unet):
    stack = TeacherFeatures(unet)
    before = stack(IMAGES)
    assert all(parameter.requires_grad for parameter in unet.parameters())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(stack(IMAGES), before, strict=True))


def test_a_stack_that_copies_nothing_is_the_teacher_itself_frozen(unet):
    copied, own = TeacherFeatures(unet), TeacherFeatures(unet, copied=False)
    assert own.network.model is unet
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert own.fingerprint == copied.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(own(IMAGES), copied(IMAGES), strict=True))


def test_larger_images_are_reduced_by_area_to_max_size(unet):
    free, limited = TeacherFeatures(unet), TeacherFeatures(unet, max_size=8)
    large = torch.rand(2, 3, 32, 32)
    reduced = F.interpolate(large, size=8, mode="area")
    assert all(torch.equal(a, b) for a, b in zip(limited(large), free(reduced), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(limited(IMAGES), free(IMAGES), strict=True))
    with pytest.raises(ShapeError, match="max_size=9 must be a multiple of the network's stride 2"):
        TeacherFeatures(unet, max_size=9)


def test_fingerprint_changes_with_weights_and_settings(unet, make_unet_with):
    stacks = [
        TeacherFeatures(unet),
        TeacherFeatures(unet, sigma=0.2),
        TeacherFeatures(unet, names=["stem"]),
        TeacherFeatures(unet, max_size=4),
        TeacherFeatures(make_unet_with(norm_eps=1e-3)),
        RandomFeatures(3, (4, 8), seed=1),
        RandomFeatures(3, (4, 8), seed=2),
    ]
    fingerprints = [stack.fingerprint for stack in stacks]
    assert len(set(fingerprints)) == len(stacks)
    assert TeacherFeatures(unet).fingerprint == fingerprints[0]
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1
    assert TeacherFeatures(unet).fingerprint not in fingerprints


def test_random_features_are_a_function_of_their_seed_and_are_saved():
    a, b, c = (RandomFeatures(3, (4, 8), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a(IMAGES), b(IMAGES), strict=True))
    assert not torch.equal(a(IMAGES)[0], c(IMAGES)[0])
    c.load_state_dict(a.state_dict())
    assert torch.equal(a(IMAGES)[1], c(IMAGES)[1])


def test_impossible_stacks_are_refused(unet):
    with pytest.raises(ConfigError, match=r"Did you mean `encoder.0`"):
        TeacherFeatures(unet, names=["encoder0"])
    with pytest.raises(ConfigError, match="sigma=0"):
        TeacherFeatures(unet, sigma=0)
    with pytest.raises(ConfigError, match="at least one part"):
        TeacherFeatures(unet, names=[])
    with pytest.raises(ConfigError, match="widths of at least 1"):
        RandomFeatures(3, ())


def test_distance_is_zero_to_itself_symmetric_and_bounded(stack):
    a, b = stack(IMAGES), stack(IMAGES.flip(0) * 0.5)
    assert torch.equal(feature_distance(a, a), torch.zeros(4))
    distance = feature_distance(a, b)
    assert distance.shape == (4,)
    assert torch.equal(distance, feature_distance(b, a))
    assert ((distance > 0) & (distance <= 4 * len(a))).all()


def test_distance_reaches_its_bound_for_opposite_features():
    maps = [torch.randn(2, 4, 3, 3), torch.randn(2, 5, 2, 2)]
    opposite = [-features for features in maps]
    assert torch.allclose(feature_distance(maps, opposite), torch.full((2,), 8.0))


def test_distance_ignores_the_length_of_features_and_the_rest_of_the_batch(stack):
    a, b = stack(IMAGES), stack(IMAGES.flip(-1))
    expected = feature_distance(a, b)
    assert torch.allclose(feature_distance([3 * features for features in a], b), expected, atol=1e-5)
    single = feature_distance([features[2:3] for features in a], [features[2:3] for features in b])
    assert torch.allclose(single, expected[2:3])


def test_distance_of_dead_features_is_finite_and_differentiable():
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    distance = feature_distance([zeros], [torch.randn(2, 3, 4, 4)])
    distance.sum().backward()
    assert torch.allclose(distance, torch.ones(2))
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_distance_needs_the_same_maps():
    with pytest.raises(ShapeError, match="both sides need the same maps"):
        feature_distance([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 4, 4)])
    with pytest.raises(ShapeError, match="at least one"):
        feature_distance([], [])
