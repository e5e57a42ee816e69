"""The discriminator: per-sample, class-conditional, and only its heads are trained."""

import copy
import dataclasses

import pytest
import torch

from pagoda.diffusion.conditions import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import Discriminator, MixedFeatures, ProjectedDiscriminator, RandomFeatures, TeacherFeatures

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = Condition.of_labels([0, 1, -1, 4])


@pytest.fixture(params=["plain", "mixed", "raw", "mixed-raw"])
def discriminator(request, unet):
    torch.manual_seed(0)
    stack = TeacherFeatures(unet)
    stack = MixedFeatures(stack, width=8) if "mixed" in request.param else stack
    return Discriminator.for_stack(stack, image_size=16, num_classes=5, width=16, raw_pixels="raw" in request.param)


def test_logits_of_a_sample_do_not_depend_on_its_batch(discriminator):
    for mode in (False, True):  # in training mode power iterations advance, so each run starts from the same state
        discriminator.train(mode)
        whole = copy.deepcopy(discriminator)(IMAGES, LABELS)
        single = copy.deepcopy(discriminator)(IMAGES[1:2], LABELS[1:2])
        assert whole.ndim == 2
        assert torch.allclose(whole[1:2], single, atol=1e-5)


def test_permuting_the_batch_permutes_the_logits(discriminator):
    discriminator.eval()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(discriminator(IMAGES[order], LABELS[order]), discriminator(IMAGES, LABELS)[order], atol=1e-5)


def test_label_matters_and_no_label_is_the_null_row(discriminator):
    discriminator.eval()
    null = discriminator(IMAGES, Condition.of_labels([-1] * 4))
    assert torch.equal(discriminator(IMAGES), null)
    given = discriminator(IMAGES, LABELS)
    assert torch.allclose(given[2], null[2], atol=1e-6)
    assert not torch.allclose(given[0], null[0], atol=1e-3)
    with pytest.raises(ConfigError, match="label 5 is out of range"):
        discriminator(IMAGES, Condition.of_labels([5, 0, 0, 0]))


def test_only_the_heads_are_trained_and_gradients_reach_the_images(discriminator):
    frozen = copy.deepcopy(discriminator.stack.state_dict())
    images = IMAGES.clone().requires_grad_(True)
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in discriminator.heads.parameters()}
    optimiser = torch.optim.Adam(trained, lr=1e-2)
    discriminator(images, LABELS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    optimiser.step()
    for name, value in discriminator.stack.state_dict().items():
        assert torch.equal(value, frozen[name])


def test_heads_resume_bitwise_from_their_state(discriminator):
    discriminator.train()
    for _ in range(2):
        discriminator(IMAGES, LABELS)  # power iterations advance
    state = copy.deepcopy(discriminator.heads_state_dict())
    assert not any(name.startswith("stack") for name in state)
    expected = [discriminator(IMAGES, LABELS) for _ in range(2)]
    torch.manual_seed(1)
    fresh = Discriminator.for_stack(
        discriminator.stack,
        image_size=16,
        num_classes=5,
        width=16,
        raw_pixels=discriminator.heads.raw_pixels,
    ).train()
    assert not torch.equal(copy.deepcopy(fresh)(IMAGES, LABELS), expected[0])
    fresh.heads.load_state_dict(state)
    for logits in expected:
        assert torch.equal(fresh(IMAGES, LABELS), logits)


def test_heads_learn_to_separate_two_kinds_of_images():
    torch.manual_seed(0)
    discriminator = Discriminator.for_stack(RandomFeatures(1, (8, 16)), image_size=8, num_classes=0, width=16)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(discriminator.heads.parameters(), lr=5e-3)
    for _ in range(40):
        smooth = torch.rand(16, 1, 1, 1, generator=generator).expand(-1, -1, 8, 8)
        rough = torch.rand(16, 1, 8, 8, generator=generator)
        loss = (1 - discriminator(smooth)).relu().mean() + (1 + discriminator(rough)).relu().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1  # chance is 2


def test_large_maps_are_reduced_to_eight_pixels_and_small_ones_to_four():
    def count_logits(side):
        heads = ProjectedDiscriminator([4], sides=[side], num_classes=0, width=8)
        return heads([torch.zeros(1, 4, side, side)]).shape[1]

    assert [count_logits(side) for side in (2, 4, 8, 16, 32, 64)] == [4, 16, 16, 16, 64, 64]


def test_raw_pixels_add_one_head_on_the_image(unet):
    stack = TeacherFeatures(unet)
    plain = Discriminator.for_stack(stack, image_size=16, num_classes=0)
    raw = Discriminator.for_stack(stack, image_size=16, num_classes=0, raw_pixels=True)
    assert len(raw.heads.heads) == len(plain.heads.heads) + 1
    assert raw(IMAGES).shape[1] == plain(IMAGES).shape[1] + 16


def test_impossible_heads_are_refused():
    with pytest.raises(ShapeError, match="2 maps have channels and 1 have sides"):
        ProjectedDiscriminator([4, 8], sides=[8], num_classes=0)
    with pytest.raises(ConfigError, match="at least one map"):
        ProjectedDiscriminator([], sides=[], num_classes=0)
    with pytest.raises(ShapeError, match="reads 1 maps, got 2"):
        ProjectedDiscriminator([4], sides=[8], num_classes=0)([torch.zeros(1, 4, 8, 8)] * 2)
    with pytest.raises(ConfigError, match="without classes"):
        ProjectedDiscriminator([4], sides=[8], num_classes=0)([torch.zeros(1, 4, 8, 8)], Condition.of_labels([0]))


def test_guidance_changes_nothing_at_first_and_is_learnt_then(unet):
    torch.manual_seed(0)
    stack, guided = TeacherFeatures(unet), dataclasses.replace(LABELS, guidance=torch.tensor([1.0, 2.0, 4.0, 7.5]))
    plain = Discriminator.for_stack(stack, image_size=16, num_classes=5, width=16).eval()
    judge = Discriminator.for_stack(stack, image_size=16, num_classes=5, width=16, guided=True).eval()
    judge.heads.load_state_dict(plain.heads.state_dict(), strict=False)
    assert torch.equal(judge(IMAGES, guided), plain(IMAGES, LABELS))
    logits = judge(
        IMAGES[:1].expand(4, -1, -1, -1), dataclasses.replace(guided, label=torch.zeros(4, dtype=torch.int64))
    )
    (logits.mean(1) * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    last = judge.heads.heads[0].guided.outer
    with torch.no_grad():
        last.weight -= last.weight.grad
    same = judge(IMAGES, dataclasses.replace(LABELS, guidance=torch.ones(4)))
    other = judge(IMAGES, dataclasses.replace(LABELS, guidance=torch.full((4,), 3.0)))
    assert not torch.allclose(same, other, atol=1e-4)


def test_guidance_without_an_input_is_refused(unet):
    judge = Discriminator.for_stack(TeacherFeatures(unet), image_size=16, num_classes=5)
    with pytest.raises(ConfigError, match="no input for the condition `guidance`"):
        judge(IMAGES, Condition(guidance=torch.ones(4)))
