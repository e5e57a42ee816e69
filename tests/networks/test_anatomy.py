"""Named parts, split runs and taps: bit-identical to the model's own forward, and no further than asked."""

from dataclasses import replace

import pytest
import torch
from diffusers.models import UNet2DModel
from torch.utils.checkpoint import checkpoint

from pagoda.errors import ConfigError
from pagoda.networks.anatomy import anatomy, features


def test_split_run_is_bit_identical_to_the_model(case):
    parts = anatomy(case.network)
    state = parts.encode(case.x, case.t, case.condition)
    output = parts.head(parts.decode(parts.middle(state), state), state)
    assert torch.equal(output, case.network(case.x, case.t, case.condition))


def test_split_run_honours_gradient_checkpointing(case):
    parameters = [parameter for parameter in case.network.parameters() if parameter.requires_grad]
    output = case.network(case.x, case.t, case.condition)
    expected = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    calls = 0

    def recompute(module, *arguments):
        nonlocal calls
        calls += 1
        return checkpoint(module, *arguments, use_reentrant=False)

    parts = anatomy(case.network)
    parts.model.enable_gradient_checkpointing(recompute)
    hidden, state = parts.last_state(case.x, case.t, case.condition)
    found = torch.autograd.grad(parts.head(hidden, state).square().sum(), parameters, allow_unused=True)
    assert calls >= 3
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)  # summed in another order


def test_decoder_can_be_run_in_pieces(case):
    parts = anatomy(case.network)
    state = parts.encode(case.x, case.t, case.condition)
    start = parts.middle(state)
    whole = parts.decode(start, state)
    pieces = parts.decode(parts.decode(start, state, stop=2), state, start=2)
    assert torch.equal(whole, pieces)
    assert torch.equal(whole, parts.last_hidden(case.x, case.t, case.condition))


def test_shallow_run_with_deep_features_kept_equals_the_full_run(deep_case):
    parts = anatomy(deep_case.network)
    full = parts.encode(deep_case.x, deep_case.t, deep_case.condition)
    hidden = parts.middle(full)
    count = len(full.skips)
    whole = parts.decode(hidden, full)
    for branch in range(count):
        kept = parts.decode(hidden, full, stop=count - 1 - branch)
        shallow = parts.encode(deep_case.x, deep_case.t, deep_case.condition, stop=branch)
        assert len(shallow.skips) == branch + 1
        assert torch.equal(parts.decode(kept, shallow, start=count - 1 - branch), whole)


def test_features_before_a_decoder_layer_have_the_size_of_its_skip(deep_case):
    parts = anatomy(deep_case.network)
    state = parts.encode(deep_case.x, deep_case.t, deep_case.condition)
    hidden = parts.middle(state)
    for index, skip in enumerate(reversed(state.skips)):
        assert hidden.shape[-2:] == skip.shape[-2:]
        hidden = parts.decode(hidden, state, start=index, stop=index + 1)


def test_one_encoder_run_decodes_under_another_condition(case):
    parts = anatomy(case.network)
    state = parts.encode(case.x, case.t, case.condition)
    hidden = parts.middle(state)
    same = replace(state, context=parts.embed(case.t, case.condition))
    other = replace(state, context=parts.embed(case.t + 1, case.condition))
    assert torch.equal(parts.decode(hidden, same), parts.decode(hidden, state))
    assert not torch.equal(parts.decode(hidden, other), parts.decode(hidden, state))


def test_text_unet_takes_sides_that_its_stride_does_not_divide(odd_text_case):
    case = odd_text_case
    parts = anatomy(case.network)
    hidden, state = parts.last_state(case.x, case.t, case.condition)
    assert hidden.shape[-1] == 7
    assert torch.equal(parts.head(hidden, state), case.network(case.x, case.t, case.condition))


def test_taps_equal_what_hooks_capture(case):
    parts = anatomy(case.network)
    caught: dict[str, torch.Tensor] = {}

    def catch(name):
        def hook(module, arguments, output):
            caught[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [parts.part(name)[-1].register_forward_hook(catch(name)) for name in parts.names()[:-1]]
    output = case.network(case.x, case.t, case.condition)
    for handle in handles:
        handle.remove()
    tapped = features(case.network, case.x, case.t, case.condition, names=parts.names())
    assert list(tapped) == parts.names()
    assert torch.equal(tapped["head"], output)
    for name, value in caught.items():
        assert torch.equal(tapped[name], parts.as_map(value)), name


def test_channels_levels_and_stride_are_those_of_the_taps(case):
    parts = anatomy(case.network)
    tapped = features(case.network, case.x, case.t, case.condition, names=parts.names())
    for name, value in tapped.items():
        assert value.shape == (3, parts.channels(name), 8 // parts.level(name), 8 // parts.level(name)), name
    assert parts.stride == max(parts.level(name) for name in parts.names())
    assert parts.embed(case.t, case.condition).embedding.shape == (3, parts.embedding_dim)


def test_nothing_after_the_last_tap_is_executed(case):
    parts = anatomy(case.network)
    names = parts.names()
    ran: list[str] = []
    for name in names:
        for module in parts.part(name):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for index, name in enumerate(names):
        ran.clear()
        features(case.network, case.x, case.t, case.condition, names=[name, names[0]])
        assert set(ran) == set(names[: index + 1])


def test_taps_are_differentiable_and_keep_the_asked_order(case):
    x = case.x.clone().requires_grad_(True)
    names = anatomy(case.network).names()
    tapped = features(case.network, x, case.t, case.condition, names=[names[3], names[1]])
    assert list(tapped) == [names[3], names[1]]
    (gradient,) = torch.autograd.grad(tapped[names[3]].square().sum(), x)
    assert gradient.abs().sum() > 0


def test_every_parameter_belongs_to_exactly_one_part(case):
    parts = anatomy(case.network)
    by_itself = "block.0" in parts.names()  # a DiT's blocks embed time and label by themselves
    owners = [*([] if by_itself else ["embedding"]), *parts.names()]
    counts = {id(parameter): 0 for parameter in case.network.parameters()}
    for name in owners:
        for module in parts.part(name):
            for parameter in module.parameters():
                counts[id(parameter)] += 1
    assert set(counts.values()) == {1}


def test_unknown_part_names_the_nearest(unet):
    x, t = torch.randn(1, 3, 8, 8), torch.ones(1)
    with pytest.raises(ConfigError, match=r"no part `encodr.1`. Did you mean `encoder.1`"):
        features(unet, x, t, names=["encodr.1"])
    with pytest.raises(ConfigError, match="no part was named"):
        features(unet, x, t, names=[])


def test_networks_without_anatomy_are_named():
    with pytest.raises(ConfigError, match=r"`Linear` has no anatomy; these have: .*`UNet2DModel`"):
        anatomy(torch.nn.Linear(2, 2))
    skipping = UNet2DModel(
        block_out_channels=(4, 4),
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
    )
    with pytest.raises(ConfigError, match="`SkipDownBlock2D` have no anatomy"):
        anatomy(skipping)


def test_free_u_is_refused_rather_than_ignored(text_unet):
    text_unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    parts = anatomy(text_unet)
    hidden = torch.zeros(1, 16, 4, 4)
    with pytest.raises(ConfigError, match="disable_freeu"):
        parts.decode(hidden, None)  # refused before the state is looked at


def test_replaced_modules_are_seen(unet):
    parts = anatomy(unet)
    new = torch.nn.Conv2d(3, 8, 3, padding=1)
    unet.conv_in = new
    assert parts.part("stem") == [new]
