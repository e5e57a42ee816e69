"""Laws of conditions: one batch size, null values, dropout in one place."""

from __future__ import annotations

import pytest
import torch

from pagoda.diffusion import NULL_LABEL, UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError


def full(batch: int = 64) -> Condition:
    generator = torch.Generator().manual_seed(0)
    return Condition(
        label=torch.arange(batch) % 7,
        tokens=torch.randn(batch, 5, 4, generator=generator),
        tokens_mask=torch.ones(batch, 5, dtype=torch.bool),
        pooled=torch.randn(batch, 4, generator=generator),
        image=torch.randn(batch, 1, 2, 2, generator=generator),
        guidance=torch.full((batch,), 3.0),
    )


def same(a: Condition, b: Condition) -> bool:
    return a.slots().keys() == b.slots().keys() and all(torch.equal(v, b.slots()[k]) for k, v in a.slots().items())


def test_slots_of_different_batch_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="'label': 3"):
        Condition(label=torch.zeros(3, dtype=torch.int64), pooled=torch.zeros(2, 4))


def test_batch_size_is_that_of_the_slots_and_none_without_any() -> None:
    assert full(5).batch_size == 5
    assert UNCONDITIONAL.batch_size is None


def test_null_values_are_those_of_the_table() -> None:
    null = full().null()
    assert (null.label == NULL_LABEL).all()
    assert not null.tokens.any()
    assert not null.tokens_mask.any()
    assert not null.pooled.any()
    assert not null.image.any()
    assert (null.guidance == 3).all()  # a setting, not a condition
    assert same(null.null(), null)


def test_dropout_of_zero_is_the_identity_and_draws_nothing() -> None:
    condition, generator = full(), torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert condition.drop(0.0, generator) is condition
    assert torch.equal(generator.get_state(), before)


def test_dropout_of_one_is_null() -> None:
    assert same(full().drop(1.0, torch.Generator().manual_seed(0)), full().null())


def test_dropout_takes_whole_samples_at_the_asked_rate() -> None:
    condition = full(2000)
    dropped = condition.drop(0.3, torch.Generator().manual_seed(0))
    lost = dropped.label == NULL_LABEL
    # 4 standard deviations of a binomial of 2,000 draws
    assert lost.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)
    assert same(dropped[lost], condition[lost].null())
    assert same(dropped[~lost], condition[~lost])


def test_dropout_draws_only_from_the_given_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = full().drop(0.5, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, full().drop(0.5, torch.Generator().manual_seed(3)))
    assert not same(first, full().drop(0.5, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_dropout_outside_the_unit_interval_is_refused(probability: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        full().drop(probability)


def test_parts_joined_again_are_the_whole() -> None:
    condition = full(10)
    assert same(Condition.cat([condition[:3], condition[3:]]), condition)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert same(condition[order][order.argsort()], condition)


def test_conditions_with_different_slots_do_not_join() -> None:
    with pytest.raises(ShapeError, match="same slots"):
        Condition.cat([Condition(label=torch.zeros(2, dtype=torch.int64)), Condition(pooled=torch.zeros(2, 4))])


def test_labels_make_a_condition_and_none_makes_none() -> None:
    assert Condition.of_labels([1, 2]).label.tolist() == [1, 2]
    assert Condition.of_labels(None).batch_size is None
