"""Discriminators that judge by texts, and the one that judges every token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import Discriminator, ProjectedDiscriminator, RandomFeatures, TokenDiscriminator

CHANNELS, SIDES = [8, 12], [8, 4]


def maps(batch: int = 3) -> list[torch.Tensor]:
    return [torch.randn(batch, c, s, s) for c, s in zip(CHANNELS, SIDES, strict=True)]


def texts(batch: int = 3) -> Condition:
    return Condition(pooled=torch.randn(batch, 6))


def test_there_is_one_logit_for_every_token_and_patch() -> None:
    heads = TokenDiscriminator([*CHANNELS, 3], sides=[*SIDES, 16], raw_pixels=True)
    assert heads([*maps(), torch.randn(3, 3, 16, 16)]).shape == (3, 64 + 16 + 16)


@pytest.mark.parametrize("kind", [TokenDiscriminator, ProjectedDiscriminator])
def test_logits_depend_on_the_text_of_their_own_sample_alone(kind: type) -> None:
    heads = kind(CHANNELS, sides=SIDES, num_classes=0, pooled_dim=6).eval()
    seen, told = maps(), texts()
    together = heads(seen, told)
    torch.testing.assert_close(heads([m[1:2] for m in seen], told[1:2])[0], together[1])
    assert told.pooled is not None
    other = Condition(pooled=told.pooled.roll(1, 0))
    assert not torch.allclose(heads(seen, other), together)


@pytest.mark.parametrize("kind", [TokenDiscriminator, ProjectedDiscriminator])
def test_texts_of_another_scale_are_heard_alike_and_no_text_is_the_head_without(kind: type) -> None:
    heads = kind(CHANNELS, sides=SIDES, num_classes=0, pooled_dim=6).eval()
    seen, told = maps(), texts()
    assert told.pooled is not None
    louder = Condition(pooled=100 * told.pooled)
    torch.testing.assert_close(heads(seen, louder), heads(seen, told), atol=1e-3, rtol=1e-3)
    silent = heads(seen, told.null())
    plain = kind(CHANNELS, sides=SIDES, num_classes=0).eval()
    plain.load_state_dict({name: value for name, value in heads.state_dict().items() if "text." not in name})
    torch.testing.assert_close(plain(seen), silent)


def test_every_parameter_learns_and_gradients_reach_the_maps() -> None:
    heads = TokenDiscriminator([*CHANNELS, 3], sides=[*SIDES, 6], pooled_dim=6, raw_pixels=True)  # 3 x 3 patches
    assert heads.patch == 2
    seen = [*maps(), torch.randn(3, 3, 6, 6)]
    for part in seen:
        part.requires_grad_(True)
    heads(seen, texts()).square().mean().backward()
    assert not [n for n, p in heads.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in seen)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_small_maps_and_images_have_heads_too(side: int) -> None:
    heads = TokenDiscriminator([5, 3], sides=[side, side], raw_pixels=True)
    assert heads([torch.randn(2, 5, side, side), torch.randn(2, 3, side, side)]).shape == (2, 2 * side * side)


def test_classes_are_judged_as_well() -> None:
    heads = TokenDiscriminator(CHANNELS, sides=SIDES, num_classes=4).eval()
    seen = maps()
    a, b = (heads(seen, Condition.of_labels([label] * 3)) for label in (0, 3))
    assert not torch.allclose(a, b)
    torch.testing.assert_close(heads(seen), heads(seen, Condition.of_labels([-1] * 3)))


def test_a_discriminator_over_a_stack_chooses_its_heads() -> None:
    stack = RandomFeatures(3)
    found = Discriminator.for_stack(stack, image_size=16, num_classes=0, raw_pixels=True, pooled_dim=6, tokens=True)
    assert isinstance(found.heads, TokenDiscriminator)
    logits = found(torch.rand(2, 3, 16, 16), texts(2))
    assert logits.shape == (2, sum(side * side for side in stack.sides(16)) + 16)


@pytest.mark.parametrize("kind", [TokenDiscriminator, ProjectedDiscriminator])
def test_the_guidance_weight_changes_nothing_at_first_and_is_heard_then(kind: type) -> None:
    heads = kind(CHANNELS, sides=SIDES, num_classes=0, pooled_dim=6, guided=True).eval()
    plain = kind(CHANNELS, sides=SIDES, num_classes=0, pooled_dim=6).eval()
    shared = {name: value for name, value in heads.state_dict().items() if "guided" not in name}
    plain.load_state_dict(shared)
    seen, told = maps(), texts()
    weighted = dataclasses.replace(told, guidance=torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(heads(seen, weighted), plain(seen, told))
    for name, parameter in heads.named_parameters():
        if ".outer." in name or name.startswith("guided.outer"):
            torch.nn.init.normal_(parameter, std=0.1)
    assert torch.equal(heads(seen, told), heads(seen, dataclasses.replace(told, guidance=torch.ones(3))))  # none is 1
    louder = heads(seen, dataclasses.replace(told, guidance=torch.tensor([1.0, 2.0, 8.0])))
    assert torch.equal(louder[:2], heads(seen, weighted)[:2])
    assert not torch.allclose(louder[2], heads(seen, weighted)[2])
    with pytest.raises(ConfigError, match="no input for the condition `guidance`"):
        plain(seen, weighted)


@pytest.mark.parametrize("kind", [TokenDiscriminator, ProjectedDiscriminator])
def test_texts_without_an_input_and_inputs_without_texts_are_refused(kind: type) -> None:
    with pytest.raises(ConfigError, match="no input for the condition `pooled`"):
        kind(CHANNELS, sides=SIDES, num_classes=0)(maps(), texts())
    with pytest.raises(ConfigError, match="zeros for none"):
        kind(CHANNELS, sides=SIDES, num_classes=0, pooled_dim=6)(maps())
    with pytest.raises(ShapeError, match="reads 2 maps, got 1"):
        kind(CHANNELS, sides=SIDES, num_classes=0)(maps()[:1])
    with pytest.raises(ConfigError, match="4 classes and texts"):
        TokenDiscriminator(CHANNELS, sides=SIDES, num_classes=4, pooled_dim=6)
