"""Switch masks and their prior by their laws."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.pretraining.tiny import make_network, make_trainer

from pagoda.errors import ConfigError
from pagoda.networks import DiffusersNetwork, switch_masks
from pagoda.networks.extended import extend_model, extension_of, merge_switch_masks
from pagoda.networks.parts import Context
from pagoda.networks.switch_masks import SwitchMasks
from pagoda.pretraining import SwitchDitConfig
from pagoda.pretraining.switch_dit import chosen_experts, jensen_shannon, match_columns, prior_table

DEPTH, DIM = 4, 16


def switch(num_experts: int = 3, top_k: int = 2) -> tuple[Any, SwitchMasks]:
    """A network with switch masks of random experts."""
    model = extend_model(make_network(random=True), "switch_masks", {"num_experts": num_experts, "top_k": top_k}).eval()
    masks = cast(SwitchMasks, extension_of(model, "switch_masks"))
    with torch.no_grad():
        masks.weight.normal_(0, 0.1)
        masks.bias.normal_(0, 0.1)
    return model, masks


def test_sparse_runs_equal_the_dense_sum() -> None:
    model, masks = switch()
    hidden, t = torch.randn(5, 16, DIM), torch.linspace(-50, 50, 5)
    gates = masks.probabilities(model, t, 1)
    everyone = torch.einsum("bnd,med->bmne", hidden, masks.weight[1]) + masks.bias[1][None, :, None]
    kept = torch.zeros_like(gates).scatter(1, gates.topk(2, dim=1).indices, 1.0) * gates
    torch.testing.assert_close(
        masks.mix(hidden, gates, 1), (kept[:, :, None, None] * everyone).sum(1), atol=1e-6, rtol=0
    )


def test_with_all_experts_and_equal_gates_it_is_their_mean() -> None:
    _, masks = switch(top_k=3)
    hidden, gates = torch.randn(2, 16, DIM), torch.full((2, 3), 1 / 3)
    mean = hidden @ masks.weight[0].mean(0).T + masks.bias[0].mean(0)
    torch.testing.assert_close(masks.mix(hidden, gates, 0), mean, atol=1e-6, rtol=0)


def test_the_gate_depends_on_the_noise_level_alone() -> None:
    model, masks = switch()
    t = torch.tensor([7.0, 7.0, -30.0])
    gates = masks.routing_map(model, t)
    assert gates.shape == (3, DEPTH, 3)
    assert torch.equal(gates[0], gates[1])
    torch.testing.assert_close(gates.sum(2), torch.ones(3, DEPTH))


def test_experts_that_were_not_chosen_have_no_gradient() -> None:
    model, masks = switch()
    t = torch.tensor([3.0])
    chosen = set(masks.probabilities(model, t, 0).topk(2).indices[0].tolist())
    masks.input_mask(model, "block.0", torch.randn(1, 16, DIM), Context(t, None, torch.zeros(1, DIM))).sum().backward()  # type: ignore[union-attr]
    assert masks.weight.grad is not None
    used = {e for e in range(3) if masks.weight.grad[0, e].any()}
    assert used == chosen
    assert not masks.weight.grad[1:].any()


def test_gradients_are_those_of_finite_differences() -> None:
    _, masks = switch()
    masks = masks.double()
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, p: masks.mix(h, p, 0), (hidden, gates))


def test_merged_experts_are_the_routed_network_at_that_noise_level() -> None:
    model, _ = switch()
    merged = merge_switch_masks(model, 12.5)
    x, t = torch.randn(3, 3, 8, 8), torch.full((3,), 12.5)
    torch.testing.assert_close(DiffusersNetwork(merged)(x, t), DiffusersNetwork(model)(x, t), atol=1e-5, rtol=0)
    assert not torch.allclose(DiffusersNetwork(merged)(x, -3 * t), DiffusersNetwork(model)(x, -3 * t), atol=1e-5)
    assert list(merged.config.extensions) == ["linear_masks"]  # type: ignore[union-attr]


def test_frozen_gates_are_the_computed_ones_bit_for_bit() -> None:
    model, masks = switch()
    times = torch.linspace(-60, 100, 6)
    x, t = torch.randn(2, 3, 8, 8), times[[1, 4]]
    network = DiffusersNetwork(model)
    with torch.no_grad():
        before = network(x, t)
        with masks.frozen(model, times):
            torch.testing.assert_close(network(x, t), before, atol=1e-6, rtol=0)
            assert torch.equal(network(x, t + 1), network(x, t + 1))
        assert torch.equal(network(x, t), before)


# The prior.


@pytest.mark.parametrize(("depth", "ones", "columns"), [(12, 24, 36), (24, 48, 72), (28, 56, 84)])
def test_the_prior_has_the_widths_of_the_papers_sizes(depth: int, ones: int, columns: int) -> None:
    table = prior_table(1000, depth, 3, 2, 4.0)
    assert table.shape == (1000, columns)
    assert table.sum(1).eq(ones).all()


def test_the_matching_is_the_cheapest_permutation() -> None:
    torch.manual_seed(0)
    gates = torch.rand(40, 2, 3).softmax(2)
    choices, prior = chosen_experts(gates, 2), prior_table(40, 2, 3, 2, 4.0)

    def cost(columns: torch.Tensor) -> float:
        return float((choices - prior[:, columns]).abs().sum())

    found = match_columns(choices, prior, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == list(range(6))
    assert cost(found) == min(cost(torch.tensor(order)) for order in itertools.permutations(range(6)))
    shuffled = torch.randperm(6)
    again = match_columns(choices[:, shuffled], prior, torch.Generator().manual_seed(1))
    assert float((choices[:, shuffled] - prior[:, again]).abs().sum()) == cost(found)


def test_the_divergence_keeps_its_bounds() -> None:
    a, b = torch.rand(50, 6).softmax(1), torch.rand(50, 6).softmax(1)
    assert jensen_shannon(a, a).abs().max() < 1e-5
    torch.testing.assert_close(jensen_shannon(a, b), jensen_shannon(b, a))
    apart = jensen_shannon(torch.eye(6)[:1], torch.eye(6)[1:2])
    assert 0.999 * math.log(2) < apart.item() < math.log(2) + 1e-6


def test_the_prior_teaches_the_gates_and_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer([SwitchDitConfig(num_tasks=20, prior_weight=1.0)], tmp_path)
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    prior = losses.named["switch_dit/prior"]
    assert prior.shape == (8,)
    assert (prior >= -1e-6).all()
    assert (prior <= math.log(2)).all()
    assert 1 <= float(losses.named["switch_dit/expert_sets"]) <= 20
    prior.mean().backward()
    learnt = {n for n, p in trainer.objective.network.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    assert any("gates" in name for name in learnt)
    assert any("timestep_embedder" in name for name in learnt)
    assert not any("attn1" in name for name in learnt)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k must lie in 1..num_experts \(3\), got 4"):
        SwitchDitConfig(top_k=4)
    with pytest.raises(ConfigError, match=r"top_k must lie in 1..num_experts \(3\), got 0"):
        SwitchDitConfig(top_k=0)
    with pytest.raises(ConfigError, match="num_tasks must be >= 2"):
        SwitchDitConfig(num_tasks=1)


def test_experts_merged_a_sample_are_the_experts_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, masks = switch()
    hidden, gates = torch.randn(5, 7, DIM, requires_grad=True), torch.randn(5, 3).softmax(1).requires_grad_()
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(switch_masks, "MERGED_UP_TO", limit)
        made = masks.mix(hidden, gates, 0)
        leaves = [hidden, gates, masks.weight, masks.bias]
        found.append([made.detach(), *torch.autograd.grad(made.square().sum(), leaves)])
    for merged, separate in zip(*found, strict=True):
        torch.testing.assert_close(merged, separate, atol=1e-5, rtol=1e-5)
