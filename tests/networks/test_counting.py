"""Counts of what running networks takes, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pagoda.networks import BackboneConfig, MultiplyAdds, SavedMemory, build_backbone, num_parameters


@pytest.mark.parametrize("batch", [1, 5])
def test_a_convolution_takes_its_closed_form(batch: int) -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1)
    with MultiplyAdds() as counter:
        layer(torch.randn(batch, 4, 6, 10))
    assert counter.total == batch * 6 * 10 * 8 * 4 * 9


def test_a_strided_convolution_counts_its_outputs() -> None:
    with MultiplyAdds() as counter:
        nn.Conv2d(4, 8, 4, stride=2, padding=1)(torch.randn(1, 4, 8, 8))
    assert counter.total == 4 * 4 * 8 * 4 * 16


def test_a_linear_layer_takes_its_closed_form() -> None:
    with MultiplyAdds() as counter:
        nn.Linear(7, 11)(torch.randn(3, 7))
    assert counter.total == 3 * 7 * 11


def test_attention_takes_two_products() -> None:
    query, key = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 9, 16)
    with MultiplyAdds() as counter:
        nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.total == 2 * (2 * 3 * 5 * 9 * 16)


def test_the_backward_pass_takes_twice_the_forward_pass_of_what_needs_both_gradients() -> None:
    layer, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 6, 6, requires_grad=True)
    with MultiplyAdds() as forward:
        y = layer(x)
    with MultiplyAdds() as backward:
        y.sum().backward()
    assert backward.total == 2 * forward.total


def test_kept_memory_is_what_the_backward_pass_needs() -> None:
    """A chain of products with a fixed number keeps nothing; squaring keeps its input, here 4,000 bytes each of three times."""
    x = torch.randn(1000, requires_grad=True)
    with SavedMemory() as nothing:
        (x * 2.0 * 3.0).sum().backward()
    with SavedMemory() as three:
        x.square().square().square().sum().backward()
    assert nothing.peak_bytes == 0
    assert three.peak_bytes == 3 * 4000


def test_a_tensor_that_is_kept_twice_counts_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedMemory() as saved:
        (x.square() + x.square()).sum().backward()
    assert saved.peak_bytes == 4000


def test_memory_of_graphs_one_after_another_does_not_add_up() -> None:
    x = torch.randn(1000, requires_grad=True)
    with SavedMemory() as saved:
        for _ in range(3):
            x.square().sum().backward()
    assert saved.peak_bytes == 4000


def test_counting_changes_no_gradient() -> None:
    network = build_backbone(BackboneConfig(channels=(16, 32), head_dim=16), image_size=8)
    nn.init.normal_(network.conv_out.weight)
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(x, t).sample.square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    with MultiplyAdds(), SavedMemory():
        counted = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_parameters_count_once_and_by_whether_they_are_trained() -> None:
    shared, frozen = nn.Linear(3, 4), nn.Linear(4, 5).requires_grad_(False)
    modules = [nn.Sequential(shared, frozen), shared]
    assert num_parameters(modules) == 16 + 25
    assert num_parameters(modules, trained=True) == 16
    assert num_parameters(modules, trained=False) == 25
