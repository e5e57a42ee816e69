"""Runs that start from the model's own arguments: bit-identical to its forward, split anywhere, over any tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tiny_diffusers import BATCH, NATIVE, TRANSFORMERS, UNETS, NativeCase, normal, text, text_arguments, text_unet

from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import KeptAttention, TokenRows, anatomy


@pytest.fixture(params=list(NATIVE))
def native(request: pytest.FixtureRequest) -> NativeCase:
    return NATIVE[request.param]()


@pytest.fixture(params=list(UNETS))
def native_unet(request: pytest.FixtureRequest) -> NativeCase:
    return UNETS[request.param]()


@pytest.fixture(params=list(TRANSFORMERS))
def transformer(request: pytest.FixtureRequest) -> NativeCase:
    return TRANSFORMERS[request.param]()


def test_a_run_from_the_models_own_arguments_is_its_forward_bit_for_bit(native: NativeCase) -> None:
    parts = anatomy(native.model)
    state = parts.advance(parts.enter(native.arguments))
    output = parts.head(parts.decode(parts.middle(state), state), state)
    assert torch.equal(output, native.call())


def test_the_decoder_enters_at_any_branch_with_features_kept(native_unet: NativeCase) -> None:
    parts, expected = anatomy(native_unet.model), native_unet.call()
    full = parts.advance(parts.enter(native_unet.arguments))
    middle, count = parts.middle(full), len(full.skips)
    assert count == len([name for name in parts.names() if name.startswith("decoder.")])
    for branch in range(count):
        start = count - 1 - branch
        kept = parts.decode(middle, full, stop=start)
        shallow = parts.advance(parts.enter(native_unet.arguments), stop=branch)
        assert len(shallow.skips) == branch + 1
        assert torch.equal(parts.head(parts.decode(kept, shallow, start=start), shallow), expected)


def test_the_encoder_goes_on_from_where_it_stopped(native_unet: NativeCase) -> None:
    parts = anatomy(native_unet.model)
    whole = parts.advance(parts.enter(native_unet.arguments))
    pieces = parts.advance(parts.advance(parts.enter(native_unet.arguments), stop=2))
    assert all(torch.equal(a, b) for a, b in zip(whole.skips, pieces.skips, strict=True))


def test_adapters_residuals_are_added_where_diffusers_adds_them() -> None:
    model = text_unet()
    given = [0.3 * normal(BATCH, c, s, s, seed=30 + c + s) for c, s in ((8, 16), (16, 8), (16, 4))]
    arguments = text_arguments(down_intrablock_additional_residuals=given)
    expected = model(
        **{**arguments, "down_intrablock_additional_residuals": [r.clone() for r in given]}, return_dict=False
    )[0]
    parts = anatomy(model)
    state = parts.advance(parts.enter(arguments))
    assert torch.equal(parts.head(parts.decode(parts.middle(state), state), state), expected)
    assert not torch.equal(expected, model(**text_arguments(), return_dict=False)[0])


@pytest.mark.parametrize(
    "name", [name for name in UNETS if name != "text-control"]
)  # residuals belong to the encoder's run
def test_several_times_decode_in_one_batch(name: str) -> None:
    """The decoder of three noise levels at once is what it gives one by one, the encoder's features kept."""
    native_unet = UNETS[name]()
    parts = anatomy(native_unet.model)
    state = parts.advance(parts.enter(native_unet.arguments))
    hidden, times = parts.middle(state), [501, 400, 3]
    single = []
    for time in times:
        at = replace(state, context=parts.context({**native_unet.arguments, "timestep": torch.tensor(time)}))
        single.append(parts.head(parts.decode(hidden, at), at))
    count = len(times)
    repeated = {
        name: value.repeat(count, *[1] * (value.ndim - 1))
        if isinstance(value, torch.Tensor) and value.ndim > 0
        else value
        for name, value in native_unet.arguments.items()
    }
    if "added_cond_kwargs" in repeated:
        added = repeated["added_cond_kwargs"]
        repeated["added_cond_kwargs"] = {name: value.repeat(count, 1) for name, value in added.items()}
    repeated["timestep"] = torch.tensor(times).repeat_interleave(BATCH)
    skips = tuple(skip.repeat(count, 1, 1, 1) for skip in state.skips)
    together = replace(state, skips=skips, context=parts.context(repeated))
    found = parts.head(parts.decode(hidden.repeat(count, 1, 1, 1), together), together)
    torch.testing.assert_close(found, torch.cat(single), atol=1e-5, rtol=1e-5)


def test_a_transformer_can_be_cut_between_any_two_blocks(transformer: NativeCase) -> None:
    parts, expected = anatomy(transformer.model), transformer.call()
    state = parts.enter(transformer.arguments)
    for cut in range(len(parts.names()) - 1):
        kept = parts.decode(state.hidden, state, stop=cut)
        assert torch.equal(parts.head(parts.decode(kept, state, start=cut), state), expected)


def test_a_run_that_keeps_keys_and_values_is_the_forward_bit_for_bit(transformer: NativeCase) -> None:
    parts, kept = anatomy(transformer.model), KeptAttention()
    state = parts.enter(transformer.arguments)
    output = parts.head(parts.decode_tokens(state.hidden, state, kept=kept), state)
    assert torch.equal(output, transformer.call())
    assert kept.bytes > 0


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_active_tokens_with_kept_keys_give_the_full_run(transformer: NativeCase, fraction: float) -> None:
    """At the same input, the rows of a sparse run are those of the full run: gather, keys kept and scatter at once."""
    parts, kept = anatomy(transformer.model), KeptAttention()
    state = parts.enter(transformer.arguments)
    full = parts.head_tokens(parts.decode_tokens(state.hidden, state, kept=kept), state)
    total = full.shape[1]
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(fraction * total))
    index = torch.stack([torch.randperm(total, generator=generator)[:count] for _ in range(BATCH)])
    rows = TokenRows(index, total)
    active = parts.take(state.hidden, rows)
    found = parts.head_tokens(parts.decode_tokens(active, state, kept=kept, rows=rows), state)
    torch.testing.assert_close(found, rows.gather(full), atol=1e-5, rtol=1e-5)
    merged = full.clone()
    rows.write(found, merged)
    torch.testing.assert_close(merged, full, atol=1e-5, rtol=1e-5)


def test_writing_rows_leaves_the_others_untouched() -> None:
    rows = TokenRows(torch.tensor([[3, 0], [1, 2]]), 4)
    into = torch.zeros(2, 4, 3)
    rows.write(torch.ones(2, 2, 3), into)
    assert into[:, :, 0].tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert torch.equal(rows.gather(into), torch.ones(2, 2, 3))
    heads = torch.zeros(2, 5, 4, 3)
    rows.write(torch.ones(2, 5, 2, 3), heads, dim=2)
    assert torch.equal(heads[:, 1], into)
    with pytest.raises(ShapeError, match=r"\(B, m\)"):
        TokenRows(torch.zeros(3, dtype=torch.int64), 4)


def test_a_part_of_the_tokens_needs_a_full_run_before(transformer: NativeCase) -> None:
    parts = anatomy(transformer.model)
    state = parts.enter(transformer.arguments)
    rows = TokenRows(torch.zeros(BATCH, 1, dtype=torch.int64), 48)
    with pytest.raises(ConfigError, match="needs a full one before"):
        parts.decode_tokens(parts.take(state.hidden, rows), state, kept=KeptAttention(), rows=rows)


def test_attention_that_cannot_be_split_is_refused_by_name() -> None:
    case = TRANSFORMERS["dit"]()
    case.model.transformer_blocks[1].attn1.processor = object()
    parts = anatomy(case.model)
    state = parts.enter(case.arguments)
    with pytest.raises(ConfigError, match="attention by `object`"):
        parts.decode_tokens(state.hidden, state, kept=KeptAttention())


def test_embeddings_without_a_slot_in_a_condition_say_what_to_use() -> None:
    from pagoda.diffusion import Condition

    case = UNETS["text-sizes"]()
    with pytest.raises(ConfigError, match="use `enter`"):
        anatomy(case.model).encode(
            case.sample, torch.ones(2), Condition(tokens=case.arguments["encoder_hidden_states"])
        )
    video = UNETS["video"]()
    with pytest.raises(ConfigError, match="use `enter`"):
        anatomy(video.model).embed(torch.ones(2))


def test_half_precision_runs_are_the_forward_bit_for_bit() -> None:
    case = text()
    model = case.model.to(torch.bfloat16)
    arguments = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in case.arguments.items()
    }
    parts = anatomy(model)
    state = parts.advance(parts.enter(arguments))
    output = parts.head(parts.decode(parts.middle(state), state), state)
    assert torch.equal(output, model(**arguments, return_dict=False)[0])
