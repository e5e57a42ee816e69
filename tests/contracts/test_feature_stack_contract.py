"""What every feature stack keeps to: frozen, deterministic, open to gradients of the images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pagoda.networks import (
    FeatureStack,
    JoinedFeatures,
    MixedFeatures,
    RandomFeatures,
    TeacherFeatures,
    TransformersFeatures,
    build_backbone,
    feature_distance,
)
from pagoda.networks.backbones import BackboneConfig

SIZE = 16


def teacher(seed: int = 0, channels: int = 3) -> FeatureStack:
    torch.manual_seed(seed)
    config = BackboneConfig(channels=(16, 32), head_dim=16)
    return TeacherFeatures(build_backbone(config, image_size=SIZE, in_channels=channels, num_classes=3))


def outside(seed: int = 0, channels: int = 3) -> FeatureStack:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": SIZE}
    return TransformersFeatures(
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval(), in_channels=channels
    )


STACKS: dict[str, Callable[[int], FeatureStack]] = {
    "teacher": teacher,
    "teacher-grey": lambda seed: teacher(seed, channels=1),
    "random": lambda seed: RandomFeatures(widths=(8, 16), seed=seed),
    "random-grey": lambda seed: RandomFeatures(1, widths=(8,), seed=seed),
    "mixed": lambda seed: MixedFeatures(teacher(), seed=seed, width=8),
    "joined": lambda seed: JoinedFeatures([teacher(seed), RandomFeatures(widths=(8,))]),
    "transformers": outside,
    "transformers-grey": lambda seed: outside(seed, channels=1),
}


@pytest.fixture(params=list(STACKS))
def make(request: pytest.FixtureRequest) -> Callable[[int], FeatureStack]:
    return STACKS[request.param]


@pytest.fixture
def stack(make: Callable[[int], FeatureStack]) -> FeatureStack:
    return make(0)


def images(stack: FeatureStack, count: int = 3, size: int = SIZE) -> Tensor:
    return torch.rand(count, stack.in_channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_maps_are_as_announced(stack: FeatureStack) -> None:
    for size in (SIZE, 2 * SIZE):
        maps = stack(images(stack, size=size))
        assert [m.shape[1] for m in maps] == list(stack.channels)
        assert [m.shape[-1] for m in maps] == stack.sides(size)
        assert all(len(m) == 3 and bool(m.isfinite().all()) for m in maps)


def test_it_is_frozen_for_good(stack: FeatureStack) -> None:
    assert not any(parameter.requires_grad for parameter in stack.parameters())
    stack.train()
    assert not any(module.training for module in stack.modules())
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    first = stack(images(stack))
    assert all(torch.equal(a, b) for a, b in zip(first, stack(images(stack)), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


def test_gradients_reach_the_images(stack: FeatureStack) -> None:
    shown = images(stack).requires_grad_(True)
    distance = feature_distance(stack(shown), stack(images(stack).flip(-1)))
    (gradient,) = torch.autograd.grad(distance.sum(), shown)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_distance_is_zero_for_equal_images_only_and_per_sample(stack: FeatureStack) -> None:
    a, b = images(stack), images(stack).flip(-1)
    assert torch.equal(feature_distance(stack(a), stack(a)), torch.zeros(3))
    together = feature_distance(stack(a), stack(b))
    assert bool((together > 0).all())
    alone = feature_distance(stack(a[1:2]), stack(b[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_the_fingerprint_names_the_weights(make: Callable[[int], FeatureStack]) -> None:
    stack = make(0)
    assert stack.fingerprint == make(0).fingerprint
    assert stack.fingerprint != make(1).fingerprint
