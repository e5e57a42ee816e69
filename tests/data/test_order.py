"""Order of the images: pure, complete, and independent of how it is asked for."""

from __future__ import annotations

import pytest
import torch

from pagoda.data import batch_indices, epoch_order
from pagoda.errors import ConfigError


@pytest.mark.parametrize("n", [1, 2, 17, 100])
def test_every_epoch_is_a_permutation_of_its_own(n: int) -> None:
    orders = [epoch_order(0, epoch, n) for epoch in range(3)]
    for order in orders:
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(n))
    if n == 100:
        assert not torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], epoch_order(1, 0, n))


@pytest.mark.parametrize(("batch_size", "n"), [(4, 10), (5, 10), (7, 3), (25, 10), (1, 1), (10, 10)])
def test_batches_cut_the_stream_of_epochs(batch_size: int, n: int) -> None:
    steps = 3 * n // batch_size + 2
    stream = torch.cat([epoch_order(5, epoch, n) for epoch in range(steps * batch_size // n + 1)])
    for step in reversed(range(steps)):  # not in the order of training
        expected = stream[step * batch_size : (step + 1) * batch_size]
        assert torch.equal(batch_indices(5, step, batch_size, n), expected)


def test_a_batch_can_be_written_to_without_changing_the_order() -> None:
    before = batch_indices(0, 0, 4, 10).clone()
    batch_indices(0, 0, 4, 10).zero_()
    epoch_order(0, 0, 10).zero_()
    assert torch.equal(batch_indices(0, 0, 4, 10), before)


def test_arguments_out_of_range_are_refused() -> None:
    for arguments in ((-1, 0, 4, 10), (0, -1, 4, 10), (0, 0, 0, 10), (0, 0, 4, 0)):
        with pytest.raises(ConfigError):
            batch_indices(*arguments)
