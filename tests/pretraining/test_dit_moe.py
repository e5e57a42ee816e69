"""Layers of experts by their laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pretraining.tiny import make_network, make_trainer

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError, TrainingError
from pagoda.networks import DiffusersNetwork
from pagoda.networks.experts import (
    ExpertOptions,
    Experts,
    SparseExperts,
    choose,
    count_parameters,
    expert_layers,
    record_routing,
    scores_of,
    soft_routing,
)
from pagoda.networks.extended import extend_model
from pagoda.pretraining import DitMoeConfig
from pagoda.pretraining.dit_moe import balance_loss
from pagoda.training import single_process

DIM = 16
CALL = (torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8), torch.tensor([-20.0, 9.0]))


def layer(**options: Any) -> SparseExperts:
    torch.manual_seed(1)
    return SparseExperts(DIM, ExpertOptions(**{"num_experts": 4, "width": 2.0, **options}))


def of_expert(experts: Experts, number: int, tokens: torch.Tensor) -> torch.Tensor:
    """One feed-forward network by its formula."""
    inner = tokens @ experts.up[number].T
    if experts.kind == "gelu":
        inner = torch.nn.functional.gelu(inner + experts.up_bias[number], approximate="tanh")
        return inner @ experts.down[number].T + experts.down_bias[number]
    gate, value = inner.chunk(2, dim=-1)
    return (gate * gate.sigmoid() * value) @ experts.down[number].T


def dense(experts: SparseExperts, hidden: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, then the weighted sum: the definition."""
    tokens = hidden.reshape(-1, DIM)
    scores = (tokens @ experts.router.weight.T).softmax(1)
    weights, chosen = scores.topk(experts.options.top_k)
    if experts.options.norm_topk:
        weights = weights / weights.sum(1, keepdim=True)
    made = torch.stack([of_expert(experts.experts, e, tokens) for e in range(experts.options.num_experts)], 1)
    total = (weights[..., None] * made.gather(1, chosen[..., None].expand(-1, -1, DIM))).sum(1)
    if experts.shared is not None:
        total = total + of_expert(experts.shared, 0, tokens)
    return total.reshape(hidden.shape)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_grouped_runs_equal_the_definition(kind: str, norm_topk: bool, num_shared: int) -> None:
    experts, hidden = layer(kind=kind, norm_topk=norm_topk, num_shared=num_shared), torch.randn(3, 7, DIM)
    output, expected = experts(hidden), dense(experts, hidden)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    parameters = list(experts.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(output.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_flow_in_both_modes(training: bool) -> None:
    experts, hidden = layer().double().train(training), torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(experts, (hidden,))
    experts(hidden).sum().backward()
    assert experts.router.weight.grad is not None
    assert experts.router.weight.grad.any()


def test_no_token_sees_another_sample() -> None:
    for routing in ("token", "expert"):
        experts, hidden = layer(routing=routing), torch.randn(4, 8, DIM)
        alone = torch.cat([experts(hidden[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(experts(hidden), alone, atol=1e-6, rtol=0)
        turned = torch.randperm(8)
        torch.testing.assert_close(experts(hidden[:, turned]), experts(hidden)[:, turned], atol=1e-6, rtol=0)


def test_experts_that_choose_are_used_alike() -> None:
    experts, hidden = layer(routing="expert", num_shared=0), torch.randn(2, 8, DIM)
    scores = (hidden @ experts.router.weight.T).softmax(-1)
    expected = torch.zeros_like(hidden)
    for b in range(2):
        for e in range(4):
            for row in scores[b, :, e].topk(4).indices:  # 8 tokens * 2 / 4 experts
                expected[b, row] += scores[b, row, e] * of_expert(experts.experts, e, hidden[b, row][None])[0]
    torch.testing.assert_close(experts(hidden), expected, atol=1e-5, rtol=0)


def test_experts_without_tokens_do_no_harm() -> None:
    experts = layer()
    with torch.no_grad():
        experts.router.weight[2:] = 0
        experts.router.weight[:2] = 0
        experts.router.weight[:, 0] = torch.tensor([5.0, 4.0, -5.0, -5.0])
    hidden = torch.randn(1, 5, DIM)
    hidden[..., 0] = 3.0
    torch.testing.assert_close(experts(hidden), dense(experts, hidden), atol=1e-5, rtol=0)
    experts(hidden).sum().backward()
    assert experts.experts.up.grad is not None
    assert not experts.experts.up.grad[2:].any()


def test_routers_that_have_diverged_are_named() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        scores_of(torch.tensor([[float("nan"), 1.0]]))


def test_the_balance_is_one_when_all_are_used_alike_and_grows_with_collapse() -> None:
    runtime = single_process()
    even = torch.full((1, 8, 4), 0.25)
    chosen = torch.arange(8)[:, None].add(torch.arange(2)).remainder(4)
    for scope in ("global", "batch", "sequence"):
        assert balance_loss(even, chosen, scope, runtime).item() == pytest.approx(1.0)
    one = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(1, 8, 4)
    only = torch.zeros(8, 1, dtype=torch.int64)
    assert balance_loss(one, only, "global", runtime).item() == pytest.approx(4 * 0.97)


def test_the_balance_is_logged_and_teaches_the_router_only(tmp_path: Path) -> None:
    trainer = make_trainer([DitMoeConfig(num_experts=4, width=1.0, balance_weight=0.1)], tmp_path)
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    balance = losses.named["dit_moe/balance"]
    assert 4 * 0.9 <= float(balance.detach()) <= 4 * 4  # a sum over four layers
    assert float(losses.named["dit_moe/largest_load"]) >= 1
    torch.testing.assert_close(losses.total, losses.named["denoising"].mean() + 0.1 * balance)
    balance.backward()
    learnt = {n for n, p in trainer.objective.network.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    assert any("router" in name for name in learnt)


def test_soft_routing_uses_all_experts_and_is_undone() -> None:
    model = extend_model(make_network(random=True), "experts", {"num_experts": 4, "width": 1.0}).eval()
    network = DiffusersNetwork(model)
    before = network(*CALL)
    with soft_routing(model):
        soft = network(*CALL)
    assert torch.equal(network(*CALL), before)
    assert not torch.allclose(soft, before, atol=1e-5)
    full = SparseExperts(DIM, ExpertOptions(num_experts=4, top_k=4, width=2.0))
    full.load_state_dict(layer().state_dict())
    hidden, half = torch.randn(2, 5, DIM), layer()
    half.soft = True
    torch.testing.assert_close(half(hidden), full(hidden))


def test_upcycling_starts_where_the_dense_network_was() -> None:
    plain = make_network(random=True).eval()
    options = {"num_experts": 4, "kind": "gelu", "norm_topk": True, "upcycle": True}
    model = extend_model(plain, "experts", options)
    torch.testing.assert_close(DiffusersNetwork(model)(*CALL), plain(*CALL), atol=2e-6, rtol=0)
    with pytest.raises(ConfigError, match="upcycle needs kind=gelu, width=4, routing=token and norm_topk=true"):
        DitMoeConfig(upcycle=True)


@pytest.mark.parametrize(("layers", "blocks"), [("all", [0, 1, 2, 3]), ("deep_half", [2, 3]), ([1], [1])])
def test_experts_stand_where_they_were_asked_for(layers: Any, blocks: list[int]) -> None:
    model: Any = extend_model(make_network(), "experts", {"num_experts": 2, "top_k": 1, "layers": layers})
    assert [i for i, block in enumerate(model.transformer_blocks) if isinstance(block.ff, SparseExperts)] == blocks
    with pytest.raises(ConfigError, match="there is no block 9; blocks are 0 to 3"):
        extend_model(make_network(), "experts", {"layers": [9]})


def test_parameters_are_those_of_the_papers_smallest_model() -> None:
    """S/2-8E2A: 12 blocks of width 384; 199 M in all, 71 M active, latents of 4 channels, 1,000 classes and one time embedder."""
    per_block = 8 * 3 * 384 * 1536 + 3 * 384 * 768 + 8 * 384
    experts = SparseExperts(384, ExpertOptions())
    assert sum(p.numel() for p in experts.parameters()) == per_block
    total, active = count_parameters(experts)
    assert total - active == 6 * 3 * 384 * 1536
    rest = 12 * (4 + 6) * (384 * 384 + 384) + 1001 * 384  # attention, modulations, labels
    assert round((12 * total + rest) / 1e6) == 199
    assert round((12 * active + rest) / 1e6) == 71


def test_recorded_logits_have_gradients_and_nothing_stays_behind() -> None:
    model = extend_model(make_network(random=True), "experts", {"num_experts": 4, "width": 1.0})
    with record_routing(model) as logits:
        DiffusersNetwork(model)(*CALL, Condition.of_labels([0, 1]))
    assert [tuple(value.shape) for value in logits] == [(2, 16, 4)] * 4
    assert all(value.requires_grad for value in logits)
    DiffusersNetwork(model)(*CALL)
    assert len(logits) == len(expert_layers(model)) == 4
    weights, chosen = choose(scores_of(logits[0]).flatten(0, 1), ExpertOptions(num_experts=4))
    assert weights.shape == chosen.shape == (32, 2)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k must lie in 1..num_experts \(8\), got 9"):
        DitMoeConfig(top_k=9)
    with pytest.raises(ConfigError, match="layers must be all, deep_half, none, or numbers"):
        DitMoeConfig(layers="shallow")
    with pytest.raises(ConfigError, match="balance_scope one of"):
        DitMoeConfig(balance_scope="rank")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kind must be one of"):
        DitMoeConfig(kind="relu")  # type: ignore[arg-type]
