"""Self-conditioning and contrastive self-distillation by their laws."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.pretraining.tiny import DIT, UNET, make_network, make_setup, make_trainer

from pagoda.diffusion import Condition
from pagoda.errors import ConfigError
from pagoda.networks import BackboneConfig, DiffusersNetwork, anatomy
from pagoda.networks.anatomy import features
from pagoda.networks.extended import extend_model, extension_of
from pagoda.pretraining import BottleneckLearning, DdaePlusConfig
from pagoda.pretraining.ddae_plus import contrastive_loss, default_bottleneck

CALL = (torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8), torch.tensor([-20.0, 9.0]))
CASES = [pytest.param(DIT, "block.1", id="dit"), pytest.param(UNET, "decoder.0", id="unet")]


def conditioned(backbone: BackboneConfig, after: str, source: str = "self") -> DiffusersNetwork:
    model = extend_model(make_network(backbone, random=True), "self_conditioning", {"after": after, "source": source})
    with torch.no_grad():
        for parameter in extension_of(model, "self_conditioning").parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return DiffusersNetwork(model.eval())


@pytest.mark.parametrize(("backbone", "after"), CASES)
def test_only_later_parts_know_of_it(backbone: BackboneConfig, after: str) -> None:
    plain, network = make_network(backbone, random=True).eval(), conditioned(backbone, after)
    names = anatomy(network).names()
    ours, theirs = (features(n, *CALL, Condition.of_labels([0, 1]), names=names) for n in (network, plain))
    split = names.index(after) + 1
    assert all(torch.equal(ours[name], theirs[name]) for name in names[:split])
    assert all(not torch.allclose(ours[name], theirs[name], atol=1e-5) for name in names[split:-1])


@pytest.mark.parametrize(("backbone", "after"), CASES)
def test_the_loss_reaches_the_bottleneck_through_the_condition(backbone: BackboneConfig, after: str) -> None:
    """With the feature detached, the gradient of earlier parts is another one."""
    gradients = []
    for source in ("self", "detached"):
        torch.manual_seed(2)
        network = conditioned(backbone, after, source)
        network(*CALL).square().sum().backward()
        gradients.append(anatomy(network).part("stem")[0])
    weights = [next(iter(part.parameters())).grad for part in gradients]
    assert weights[0] is not None
    assert not torch.allclose(weights[0], weights[1], atol=1e-6)  # type: ignore[arg-type]


def test_where_things_are_does_not_matter_to_the_condition() -> None:
    network = conditioned(DIT, "block.1")
    extension = extension_of(network, "self_conditioning")
    parts = anatomy(network)
    context = parts.embed(CALL[1], Condition.of_labels([0, 1]))
    tokens = torch.randn(2, 16, 16)
    shifts = []
    for order in (torch.arange(16), torch.randperm(16)):
        extension.after(network.model, "block.1", tokens[:, order], context)
        shifts.append(context.carried["self_conditioning"])
    torch.testing.assert_close(shifts[0], shifts[1])


def test_a_run_that_starts_too_late_says_so() -> None:
    network = conditioned(DIT, "block.1")
    parts = anatomy(network)
    state = parts.encode(*CALL)
    with pytest.raises(
        ConfigError, match=r"`block.3` is conditioned on what `block.1` saw, and this run has not passed there"
    ):
        parts.decode(state.hidden, state, start=3)
    hidden = parts.decode(state.hidden, state, stop=3)
    assert torch.equal(parts.head(parts.decode(hidden, state, start=3), state), network(*CALL))
    fresh = replace(state, context=parts.embed(CALL[1]))
    with pytest.raises(ConfigError, match="has not passed there"):
        parts.decode(hidden, fresh, start=3)


def test_it_costs_little() -> None:
    """Added multiply-adds of a DiT of the paper's base size, per image of 256 tokens: two layers of width 768 on one vector."""
    dense = 12 * 256 * 12 * 768**2
    added = 2 * 768**2 + 768
    assert added / dense < 0.02


@pytest.mark.parametrize("after", ["stem", "head", "block.3"])
def test_a_bottleneck_needs_something_before_and_after_it(after: str) -> None:
    with pytest.raises(ConfigError, match=r"choose one of block.0 to block.2"):
        extend_model(make_network(), "self_conditioning", {"after": after})


def test_unknown_bottlenecks_and_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no part `block.9`"):
        DdaePlusConfig(after="block.9").build().prepare(make_network(), make_setup())
    with pytest.raises(ConfigError, match=r"there is no part `blok.1`"):
        extend_model(make_network(), "self_conditioning", {"after": "blok.1"})
    with pytest.raises(ConfigError, match="source must be one of"):
        extend_model(make_network(), "self_conditioning", {"after": "block.1", "source": "other"})
    with pytest.raises(ConfigError, match="temperature > 0"):
        DdaePlusConfig(temperature=0.0)
    with pytest.raises(ConfigError, match="unknown augmentation `crop`"):
        DdaePlusConfig(views=("crop",))


def test_the_default_bottleneck_is_near_the_middle() -> None:
    assert default_bottleneck(anatomy(make_network(DIT))) == "block.1"
    assert default_bottleneck(anatomy(make_network(UNET))) == "decoder.0"


# Contrastive self-distillation.


def test_equal_views_and_orthogonal_images_give_the_closed_form() -> None:
    for n, tau in ((4, 0.2), (8, 0.5)):
        loss = contrastive_loss(torch.eye(n), torch.eye(n), tau)
        torch.testing.assert_close(loss, torch.full((n,), 2 * tau * math.log(1 + (n - 1) * math.exp(-1 / tau))))


def test_the_keys_of_other_processes_are_negatives() -> None:
    queries, keys = torch.randn(6, 5), torch.randn(6, 5)
    whole = contrastive_loss(queries, keys, 0.2)
    parts = [contrastive_loss(queries[i : i + 3], keys, 0.2, first=i) for i in (0, 3)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_teacher_has_no_gradient_and_later_parts_learn_nothing(tmp_path: Path) -> None:
    trainer = make_trainer([DdaePlusConfig(contrastive=1.0, head_dim=8)], tmp_path)
    batch, random = next(trainer._batches())[0]
    losses = trainer.objective.losses("teacher", batch, random, trainer.runtime)
    assert losses is not None
    losses.named["ddae_plus/contrastive"].mean().backward()
    state = trainer.states["teacher"]
    learnt = " ".join(name for name, p in state.module.named_parameters() if p.grad is not None and p.grad.any())
    assert "beside.ddae_plus.predict" in learnt
    assert "transformer_blocks.1." in learnt
    assert "transformer_blocks.2." not in learnt
    assert state.ema is not None
    assert all(p.grad is None for p in state.ema.module.parameters())


def test_without_an_average_there_is_no_teacher(tmp_path: Path) -> None:
    trainer = make_trainer([DdaePlusConfig(contrastive=1.0, head_dim=8)], tmp_path, ema=None)
    with pytest.raises(ConfigError, match=r"set teach\.ema"):
        trainer.run()


def test_views_carry_noise_and_differ(tmp_path: Path) -> None:
    technique = DdaePlusConfig(contrastive=1.0, head_dim=8).build()
    assert isinstance(technique, BottleneckLearning)
    trainer = make_trainer([DdaePlusConfig()], tmp_path)
    batch, random = next(trainer._batches())[0]
    draws = [technique._draw(random.fork(name)) for name in ("first", "second")]
    assert all(not torch.equal(draws[0][key], draws[1][key]) for key in draws[0])
    assert batch.images.shape == (8, 3, 8, 8)
