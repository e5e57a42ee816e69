"""Differentiable augmentation: drawn once, shared by a pair, undone by nothing."""

import pytest
import torch

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import DiffAugment
from pagoda.networks.augment import POLICIES

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_empty_policy_returns_the_input_itself():
    augment = DiffAugment(())
    assert augment.apply(IMAGES, augment.draw(16)) is IMAGES


@pytest.mark.parametrize("policy", [POLICIES, *[(name,) for name in POLICIES]])
def test_one_draw_acts_alike_on_both_images_of_a_pair(policy):
    augment = DiffAugment(policy)
    draw = augment.draw(16, generator())
    once = augment.apply(IMAGES, draw)
    assert torch.equal(augment.apply(IMAGES.clone(), draw), once)
    assert not torch.equal(once, IMAGES)
    assert not torch.equal(augment.apply(IMAGES, augment.draw(16, generator(1))), once)


def test_draw_is_a_function_of_its_generator_and_each_policy_has_its_own_numbers():
    everything, alone = DiffAugment().draw(4, generator()), DiffAugment(("cutout",)).draw(4, generator())
    assert set(everything) == set(POLICIES)
    assert torch.equal(everything["cutout"], alone["cutout"])
    columns = torch.cat(list(everything.values()), 1)
    assert len(columns.unique()) == columns.numel()


@pytest.mark.parametrize("policy", [POLICIES, *[(name,) for name in POLICIES]])
def test_rows_are_independent_and_gradients_flow(policy):
    augment = DiffAugment(policy)
    draw = augment.draw(16, generator())
    part = {name: value[3:5] for name, value in draw.items()}
    assert torch.allclose(augment.apply(IMAGES[3:5], part), augment.apply(IMAGES, draw)[3:5], atol=1e-6)
    images = IMAGES.double().requires_grad_(True)
    augment.apply(images, draw).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_translation_moves_by_at_most_an_eighth_and_fills_with_grey():
    augment = DiffAugment(("translation",))
    marked = torch.zeros(200, 1, 16, 16)
    marked[:, :, 8, 8] = 1
    moved = augment.apply(marked, augment.draw(200, generator())).flatten(1).argmax(1)
    rows, columns = moved // 16 - 8, moved % 16 - 8
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (-2, 2, -2, 2)
    ones = augment.apply(torch.ones(200, 1, 16, 16), augment.draw(200, generator()))
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 25


def test_cutout_removes_at_most_a_square_of_a_fifth():
    augment = DiffAugment(("cutout",))
    ones = augment.apply(torch.ones(200, 1, 20, 20), augment.draw(200, generator()))
    removed = (ones == 0).flatten(1).sum(1)
    assert removed.max() == 16  # 4 x 4 of 20 x 20
    assert removed.min() > 0


def test_flip_mirrors_about_half_of_the_images():
    augment = DiffAugment(("flip",))
    images = torch.randn(400, 1, 4, 4)
    out = augment.apply(images, augment.draw(400, generator()))
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (mirrored | (out == images).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250


def test_colour_keeps_grey_images_grey_and_works_on_one_channel():
    augment = DiffAugment(("colour",))
    draw = augment.draw(16, generator())
    grey = IMAGES[:, :1].expand(-1, 3, -1, -1)
    out = augment.apply(grey, draw)
    assert torch.allclose(out[:, 0], out[:, 2], atol=1e-6)
    assert torch.allclose(augment.apply(IMAGES[:, :1], draw), out[:, :1], atol=1e-5)


def test_one_draw_fits_every_size():
    augment = DiffAugment(("translation", "flip"))
    draw = augment.draw(16, generator())
    small = augment.apply(IMAGES, draw)
    large = augment.apply(IMAGES.repeat_interleave(2, -1).repeat_interleave(2, -2), draw)
    assert large.shape == (16, 3, 32, 32)
    centre = (large[..., ::2, ::2] - small)[..., 4:12, 4:12]
    assert (centre == 0).flatten(1).all(1).any()  # shifts that are whole small pixels coincide


def test_wrong_draws_are_refused():
    with pytest.raises(ConfigError, match=r"unknown augmentation `color`. Did you mean `colour`"):
        DiffAugment(("color",))
    augment = DiffAugment()
    with pytest.raises(ShapeError, match="8 rows for 16 images"):
        augment.apply(IMAGES, augment.draw(8))
    with pytest.raises(ConfigError, match="no `colour`"):
        augment.apply(IMAGES, {})
