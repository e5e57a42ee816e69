"""Growing an octave: exact identities at the start, nothing lost, everything new wakes up."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.diffusion.conditions import Condition
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import LevelConfig, OneStepGenerator, model_hash
from pagoda.networks.growth import SelfAttention, carry_over, count_groups

Z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = Condition.of_labels([0, -1, 4])


def enlarge(image, mode="bilinear"):
    return F.interpolate(image, scale_factor=2, mode=mode, **({"align_corners": False} if mode == "bilinear" else {}))


@pytest.fixture(params=["denoiser", "raw"])
def generator(teacher, request):
    return OneStepGenerator.from_teacher(teacher, output=request.param).eval()


@pytest.mark.parametrize("channels", [None, 12])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_growth_starts_as_the_bilinear_enlargement_bitwise(generator, channels, upsample):
    once = generator.grow(channels=channels, upsample=upsample)
    twice = once.grow(channels=channels, upsample=upsample)
    assert torch.equal(once(Z, LABELS), enlarge(generator(Z, LABELS)))
    assert torch.equal(twice(Z, LABELS), enlarge(enlarge(generator(Z, LABELS))))


def test_features_of_equal_width_start_as_the_nearest_enlargement_bitwise(generator):
    grown = generator.grow(use_rgb=False).grow(use_rgb=False).grow(use_rgb=False)
    lower, *_ = grown.lower_outputs(Z, LABELS, 16)
    for size in (32, 64):
        upper, *_ = grown.lower_outputs(Z, LABELS, size)
        assert torch.equal(upper, enlarge(lower, "nearest"))
        lower = upper


def test_zero_head_starts_at_zero(generator):
    assert torch.equal(generator.grow(channels=8, head_init="zero")(Z, LABELS), torch.zeros(3, 3, 16, 16))


@pytest.mark.parametrize("output", ["denoiser", "raw"])
def test_copied_head_draws_the_whole_image_from_enlarged_features(unet, output):
    generator = OneStepGenerator.from_teacher(unet, output=output).eval()
    grown = generator.grow(head_init="copy").grow(head_init="copy")
    hidden, *_ = grown.lower_outputs(Z, LABELS, 16)
    scale = 80 * 0.5 / (6400 + 0.25) ** 0.5 if output == "denoiser" else 1.0  # c_out of EDM
    by_hand = scale * unet.conv_out(unet.conv_act(unet.conv_norm_out(enlarge(hidden, "nearest"))))
    assert torch.allclose(grown(Z, LABELS, resolution=16), by_hand, atol=1e-6)
    assert torch.equal(grown.octaves[0].conv_out.weight, grown.octaves[1].conv_out.weight)


def test_copied_head_needs_equal_width_and_a_head_that_draws_the_whole_image(unet, dit):
    generator = OneStepGenerator.from_teacher(unet)
    with pytest.raises(ShapeError, match="needs the width of the level below, 8, got 16"):
        generator.grow(channels=16, head_init="copy")
    with pytest.raises(ConfigError, match="adds to an enlarged image"):
        generator.grow().grow(head_init="copy")
    with pytest.raises(ConfigError, match="a transformer has no convolutional head"):
        OneStepGenerator.from_teacher(dit).grow(head_init="copy")


def test_growth_leaves_the_old_generator_untouched_and_keeps_every_tensor(generator):
    before = model_hash(generator)
    grown = generator.grow(channels=12)
    old, new = generator.state_dict(), grown.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert len(new) > len(old)
    assert not {value.data_ptr() for value in old.values()} & {value.data_ptr() for value in new.values()}
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1)
    assert model_hash(generator) == before
    assert not grown.training
    assert generator.train().grow().training


def test_every_new_parameter_receives_a_gradient_within_three_steps(generator):
    grown = generator.grow(channels=12).train()
    grown.freeze_below("top")
    optimiser = torch.optim.Adam(grown.trainable_parameters(), lr=1e-3)
    target = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    reached: list[set[str]] = []
    for _ in range(3):
        optimiser.zero_grad()
        (grown(Z, LABELS) - target).square().mean().backward()
        gradients = {name: p.grad for name, p in grown.named_parameters() if p.requires_grad}
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        reached.append({name for name, gradient in gradients.items() if bool(gradient.abs().sum() > 0)})
        optimiser.step()
    assert {name.rsplit(".", 2)[1] for name in reached[0]} == {"conv_out"}  # all else waits behind the zero head
    assert reached[2] == {name for name, p in grown.named_parameters() if p.requires_grad}


def test_growth_by_training_lowers_the_loss(unet):
    grown = OneStepGenerator.from_teacher(unet).grow(channels=12).train()
    grown.freeze_below("top")
    lower = [value.detach() for value in grown.lower_outputs(Z, LABELS)]
    target = torch.sin(torch.arange(16.0)).expand(3, 3, 16, 16)
    optimiser = torch.optim.Adam(grown.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (grown.forward_top(*lower) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Old(torch.nn.Module):
    """Three tensors, planted with faults below."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)


def test_a_tensor_that_is_not_carried_over_is_named():
    a, b = torch.ones(2), torch.ones(3)
    new = Old(a=torch.zeros(2), b=torch.zeros(3), c=torch.zeros(1))
    carry_over(Old(a=a, b=b), new)
    assert torch.equal(new.a, a)
    assert torch.equal(new.b, b)
    with pytest.raises(ArtifactError, match=r"1 of 2 tensors have no place.*`b`"):
        carry_over(Old(a=a, b=b), Old(a=a))
    with pytest.raises(ShapeError, match=r"`b` has shape \(3,\) in the old network and \(4,\)"):
        carry_over(Old(a=a, b=b), Old(a=a, b=torch.ones(4)))
    with pytest.raises(ArtifactError, match="`a` was not carried over"):
        carry_over(Old(a=a * torch.nan), Old(a=a))
    shared = torch.zeros(2)
    with pytest.raises(ArtifactError, match="`a` was not carried over"):
        carry_over(Old(a=torch.ones(2), b=torch.zeros(2)), Old(a=shared, b=shared))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (12, 3), (24, 6), (48, 12), (64, 16), (192, 32)])
def test_groups_divide_the_width_and_hold_four_channels(channels, groups):
    assert count_groups(channels) == groups


def test_unknown_choices_are_refused(unet):
    generator = OneStepGenerator.from_teacher(unet)
    with pytest.raises(ConfigError, match=r"unknown head_init 'skip'. Did you mean `skip_rgb`"):
        generator.grow(head_init="skip")
    with pytest.raises(ConfigError, match="unknown upsample 'near'"):
        generator.grow(upsample="near")
    with pytest.raises(ConfigError, match="at least 1"):
        generator.grow(num_blocks=0)
    with pytest.raises(ShapeError, match="head_groups=5 does not divide"):
        LevelConfig(channels=12, head_groups=5)


def test_attention_is_the_identity_at_first_and_comes_back_from_disk(generator, tmp_path):
    plain, attentive = (generator.grow(channels=16, use_rgb=False, attention=on) for on in (False, True))
    attentive.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(attentive(Z, LABELS), plain(Z, LABELS))
    upper = [g.grow(channels=16).lower_outputs(Z, LABELS)[0] for g in (plain, attentive)]
    assert torch.equal(*upper)
    with torch.no_grad():
        for attention in attentive.octaves[0].attentions:
            attention.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(attentive.grow().lower_outputs(Z, LABELS)[0], upper[0])
    attentive.save_pretrained(tmp_path)
    loaded = OneStepGenerator.from_pretrained(tmp_path, local_files_only=True)
    assert model_hash(loaded) == model_hash(attentive)


def test_attention_looks_at_all_pixels_with_weights_that_sum_to_one():
    attention = SelfAttention(64).double()
    with torch.no_grad():
        for layer in (attention.qkv, attention.out):
            layer.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    h = torch.randn(2, 64, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.qkv(attention.norm(h)).flatten(2).chunk(3, 1)  # (2, 64, 16)
    expected = []
    for part in range(2):
        rows = slice(32 * part, 32 * part + 32)
        weights = (q[:, rows].transpose(1, 2) @ k[:, rows] / 32**0.5).softmax(-1)  # (2, 16, 16)
        expected.append(v[:, rows] @ weights.transpose(1, 2))
    mixed = torch.cat(expected, 1).unflatten(2, (4, 4))
    torch.testing.assert_close(attention(h), h + attention.out(mixed))
