"""U-Nets that read texts: tokens by attention, pooled vectors by addition, nothing where there is no text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import (
    BackboneConfig,
    DiffusersNetwork,
    OneStepGenerator,
    TeacherFeatures,
    anatomy,
    backbone_preset,
    build_backbone,
)
from pagoda.networks.calling import null_of_zeros, pooled_width, token_width
from pagoda.networks.features import default_taps

TOKENS, POOLED = 10, 6


def text_network(**changes: object) -> DiffusersNetwork:
    config = BackboneConfig(
        channels=(16, 32), attention_levels=(1,), middle=False, norm_groups=8, head_dim=16, **changes
    )  # type: ignore[arg-type]
    model = build_backbone(config, image_size=8, token_dim=TOKENS, pooled_dim=POOLED)
    for parameter in model.conv_out.parameters():
        nn.init.normal_(parameter, std=0.1)  # zero at first, which hides everything else
    return DiffusersNetwork(model)


def texts(batch: int = 3, length: int = 5) -> Condition:
    mask = torch.arange(length)[None] < torch.tensor([[2], [5], [3]])[:batch]
    tokens = torch.randn(batch, length, TOKENS) * mask[..., None]
    return Condition(tokens=tokens, tokens_mask=mask, pooled=torch.randn(batch, POOLED))


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.linspace(1, 5, batch)


@pytest.mark.parametrize("middle", [False, True])
def test_its_parts_are_the_network_bit_for_bit(middle: bool) -> None:
    config = BackboneConfig(channels=(16, 32), attention_levels=(1,), middle=middle, norm_groups=8, head_dim=16)
    network = DiffusersNetwork(build_backbone(config, image_size=8, token_dim=TOKENS, pooled_dim=POOLED)).eval()
    for parameter in network.model.conv_out.parameters():  # type: ignore[union-attr, operator]
        nn.init.normal_(parameter)
    x, t = inputs()
    condition = texts()
    parts = anatomy(network)
    hidden, state = parts.last_state(x, t, condition)
    assert torch.equal(parts.head(hidden, state), network(x, t, condition))
    assert default_taps(parts)


def test_both_slots_are_heard_and_padding_is_not() -> None:
    network = text_network().eval()
    x, t = inputs()
    told = texts()
    assert told.tokens is not None and told.tokens_mask is not None and told.pooled is not None  # noqa: PT018
    plain = network(x, t, told)
    for slot in ("tokens", "pooled"):
        changed = Condition(**{**told.slots(), slot: getattr(told, slot) + 1.0})
        assert not torch.allclose(network(x, t, changed), plain, atol=1e-4)
    noisy = torch.where(told.tokens_mask[..., None], told.tokens, torch.full_like(told.tokens, 7.0))
    masked = Condition(tokens=noisy, tokens_mask=told.tokens_mask, pooled=told.pooled)
    torch.testing.assert_close(network(x, t, masked), plain)
    longer = Condition(
        tokens=nn.functional.pad(told.tokens, (0, 0, 0, 4)),
        tokens_mask=nn.functional.pad(told.tokens_mask, (0, 4)),
        pooled=told.pooled,
    )
    torch.testing.assert_close(network(x, t, longer), plain, atol=1e-5, rtol=1e-4)


def test_no_text_is_the_same_whatever_the_length_of_the_null_tokens() -> None:
    network = text_network().eval()
    x, t = inputs()
    told_nothing = DiffusersNetwork(network.model, null_of_zeros(network.model)).eval()
    torch.testing.assert_close(network(x, t, texts().null()), told_nothing(x, t))
    plain = build_backbone(backbone_preset("tiny", 8), image_size=8, num_classes=3)
    assert null_of_zeros(plain) is None
    assert (token_width(plain), pooled_width(plain)) == (0, 0)
    assert (token_width(network.model), pooled_width(network.model)) == (TOKENS, POOLED)
    assert network.num_classes == 0


def test_every_parameter_learns() -> None:
    network = text_network().train()
    x, t = inputs()
    network(x, t, texts()).square().mean().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_fresh_network_says_nothing_whatever_it_is_told() -> None:
    model = build_backbone(backbone_preset("tiny", 8), image_size=8, token_dim=TOKENS, pooled_dim=POOLED)
    assert DiffusersNetwork(model)(*inputs(), texts()).abs().max() == 0


def test_its_features_of_clean_images_need_no_text_and_pass_gradients() -> None:
    stack = TeacherFeatures(text_network())
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    maps = stack(images)
    assert [m.shape[1] for m in maps] == stack.channels
    maps[-1].square().mean().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_generator_starts_as_its_teacher_and_hears_the_text_at_every_size() -> None:
    generator = OneStepGenerator.from_teacher(text_network()).grow(channels=16).eval()
    for parameter in generator.octaves[0].parameters():
        nn.init.normal_(parameter, std=0.2)
    assert generator.token_dim == TOKENS
    z, told = torch.randn(3, 3, 8, 8), texts()
    made = generator(z, told)
    assert made.shape == (3, 3, 16, 16)
    hidden, rgb, embedding = generator.lower_outputs(z, told)
    assert torch.equal(generator.forward_top(hidden, rgb, embedding), made)
    other = Condition(**{**told.slots(), "pooled": told.pooled.roll(1, 0)})  # type: ignore[union-attr]
    changed = generator.forward_top(hidden, rgb, generator.lower_outputs(z, other)[2])
    assert not torch.allclose(changed, made, atol=1e-3)  # the octave itself, on the same features


def test_what_does_not_fit_is_refused() -> None:
    network = text_network()
    x, t = inputs()
    told = texts()
    with pytest.raises(ConfigError, match=r"pooled embeddings \(B, 6\) and not on labels; it was given tokens"):
        network(x, t, Condition(tokens=told.tokens, tokens_mask=told.tokens_mask))
    with pytest.raises(ConfigError, match="label"):
        network(x, t, Condition(**{**told.slots(), "label": torch.zeros(3, dtype=torch.int64)}))
    with pytest.raises(ShapeError, match="7 wide, the model expects 6"):
        network(x, t, Condition(**{**told.slots(), "pooled": torch.zeros(3, 7)}))
    with pytest.raises(ConfigError, match="kind=unet"):
        build_backbone(backbone_preset("dit_nano", 8), image_size=8, token_dim=TOKENS, pooled_dim=POOLED)
    with pytest.raises(ConfigError, match="num_classes=3"):
        build_backbone(backbone_preset("tiny", 8), image_size=8, num_classes=3, token_dim=TOKENS, pooled_dim=POOLED)
    with pytest.raises(ConfigError, match="pooled_dim=0"):
        build_backbone(backbone_preset("tiny", 8), image_size=8, token_dim=TOKENS)
