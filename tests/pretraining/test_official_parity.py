"""Golden arrays of the official code (made by `fixtures/make.py`): the same numbers from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pagoda.networks.experts import ExpertOptions, SparseExperts, choose, scores_of
from pagoda.networks.switch_masks import SwitchMasks
from pagoda.networks.task_masks import window_starts
from pagoda.pretraining.dit_moe import balance_loss
from pagoda.pretraining.repa import alignment_loss
from pagoda.pretraining.switch_dit import jensen_shannon, match_columns
from pagoda.training import single_process

FIXTURES = Path(__file__).parent / "fixtures"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


@pytest.mark.parametrize("channels", [384, 768, 1024, 1152])
@pytest.mark.parametrize("alpha", [1, 2, 4, 8])
def test_dtr_windows_start_where_the_papers_code_starts_them(channels: int, alpha: int) -> None:
    ours = window_starts(1000, channels - int(channels * 0.8), alpha)
    assert torch.equal(ours, golden("dtr")[f"starts_{channels}_{alpha}"].long())


def test_switch_experts_mask_as_in_the_papers_code() -> None:
    found = golden("switch-dit")
    masks = SwitchMasks(num_experts=3, top_k=2)
    weight = next(value for name, value in found.items() if name.startswith("expert_") and value.ndim == 3)
    bias = next((value for name, value in found.items() if name.startswith("expert_") and value.ndim == 2), None)
    masks.weight = torch.nn.Parameter(weight.mT[None].contiguous())
    masks.bias = torch.nn.Parameter((torch.zeros(3, 8) if bias is None else bias)[None])
    gates = F.linear(F.silu(found["tau"]), found["gate_weight"], found["gate_bias"]).softmax(1)
    torch.testing.assert_close(gates, found["probabilities"], atol=1e-6, rtol=0)
    torch.testing.assert_close(1 + masks.mix(found["x"], gates, 0), found["mask"], atol=1e-6, rtol=0)


def test_switch_matching_costs_what_the_papers_costs() -> None:
    found = golden("switch-dit")
    columns = match_columns(found["choices"], found["prior"], torch.Generator().manual_seed(0))
    assert (found["choices"] - found["prior"][:, columns]).abs().sum() == found["matched_cost"]


def test_switch_divergence_is_the_papers() -> None:
    found = golden("switch-dit")
    torch.testing.assert_close(
        jensen_shannon(found["a"], found["b"]).mean()[None], found["divergence"], atol=1e-6, rtol=0
    )


def moe_layer(found: dict[str, Tensor]) -> SparseExperts:
    """Ours with the official layer's weights."""
    layer = SparseExperts(8, ExpertOptions(num_experts=4))

    def swiglu(prefix: str) -> tuple[Tensor, Tensor]:
        up = torch.cat([found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"]])
        return up, found[f"{prefix}.down_proj.weight"]

    each = [swiglu(f"layer.experts.{i}") for i in range(4)]
    shared: Any = layer.shared
    with torch.no_grad():
        layer.router.weight.copy_(found["layer.gate.weight"])
        layer.experts.up.copy_(torch.stack([up for up, _ in each]))
        layer.experts.down.copy_(torch.stack([down for _, down in each]))
        shared.up.copy_(swiglu("layer.shared_experts")[0][None])
        shared.down.copy_(swiglu("layer.shared_experts")[1][None])
    return layer


def test_moe_layers_give_what_the_papers_code_gives_in_both_modes() -> None:
    found = golden("dit-moe")
    layer = moe_layer(found)
    torch.testing.assert_close(layer(found["x"]), found["trained"], atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.eval()(found["x"]), found["evaluated"], atol=1e-6, rtol=0)


def test_moe_balance_is_the_papers() -> None:
    found = golden("dit-moe")
    scores = scores_of(moe_layer(found).router(found["x"]))
    weights, chosen = choose(scores.flatten(0, 1), ExpertOptions(num_experts=4))
    assert torch.equal(chosen.sort(1).values, found["chosen"].sort(1).values)
    torch.testing.assert_close(weights.sort(1).values, found["weights"].sort(1).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(balance_loss(scores, chosen, "global", single_process())[None], found["balance"])


def test_repa_loss_is_the_papers() -> None:
    found = golden("repa")

    def as_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (4, 4))

    losses = [alignment_loss(as_map(found[f"projected_{i}"]), as_map(found[f"target_{i}"])) for i in range(2)]
    torch.testing.assert_close(torch.stack(losses).mean()[None], found["loss"], atol=1e-6, rtol=0)
