"""The guidance weight as an input: nothing at first, seen by every part afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pagoda.diffusion.conditions import Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import Discriminator, OneStepGenerator, RandomFeatures, anatomy
from pagoda.networks.guidance import GuidanceEmbedding, shifted_state

Z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, -1, 4])
WEIGHTS = torch.tensor([1.0, 1.7, 3.0])


def wake(embedding: Any) -> None:
    with torch.no_grad():
        embedding.outer.weight.normal_(generator=torch.Generator().manual_seed(1))


def test_the_embedding_is_zero_until_it_is_trained_and_tells_weights_apart_after() -> None:
    embedding = GuidanceEmbedding(8)
    assert torch.equal(embedding(WEIGHTS), torch.zeros(3, 8))
    embedding(WEIGHTS).square().sum().backward()
    (embedding(WEIGHTS) - 1).square().sum().backward()
    assert float(embedding.outer.weight.grad.abs().max()) > 0  # type: ignore[union-attr]
    wake(embedding)
    with torch.no_grad():
        distances = torch.cdist(embedding(WEIGHTS), embedding(WEIGHTS))
    assert float(distances[~torch.eye(3, dtype=torch.bool)].min()) > 1e-2


def test_a_shift_of_zeros_is_no_shift_and_another_reaches_every_kind_of_network(teacher: nn.Module) -> None:
    parts, t = anatomy(teacher), torch.full((3,), 4.0)
    condition = Condition(label=LABELS)
    plain, _ = parts.last_state(Z, t, condition)
    zero = torch.zeros(3, parts.embedding_dim)
    same, _ = shifted_state(parts, Z, t, condition, zero)
    moved, _ = shifted_state(parts, Z, t, condition, zero + 0.5)
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, moved)
    again, _ = parts.last_state(Z, t, condition)
    assert torch.equal(plain, again)  # nothing stays behind


def test_the_weight_moves_every_row_by_itself(teacher: nn.Module) -> None:
    generator = OneStepGenerator.from_teacher(teacher, guidance_max=3.0).eval()
    wake(generator.guided)
    together = generator(Z, Condition(label=LABELS, guidance=WEIGHTS))
    for row in range(3):
        rows = slice(row, row + 1)
        alone = generator(Z[rows], Condition(label=LABELS[rows], guidance=WEIGHTS[rows]))
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, generator(Z, Condition(label=LABELS)))


def test_gradients_reach_the_embedding_and_growth_freezes_it(teacher: nn.Module) -> None:
    generator = OneStepGenerator.from_teacher(teacher, guidance_max=3.0)
    generator(Z, Condition(label=LABELS, guidance=WEIGHTS)).square().mean().backward()
    assert generator.guided is not None
    assert float(generator.guided.outer.weight.grad.abs().max()) > 0
    grown = generator.grow(channels=8)
    frozen = grown.freeze_below(16)
    assert all(name in frozen for name, _ in grown.named_parameters() if name.startswith("guided."))
    assert grown.guidance_max == 3.0
    wake(generator.guided)
    torch.testing.assert_close(
        grown.grow(channels=8)(Z, Condition(guidance=WEIGHTS), resolution=8),
        grown(Z, Condition(guidance=WEIGHTS), resolution=8),
    )


def test_a_generator_comes_back_from_disk_with_its_range(teacher: nn.Module, tmp_path: Any) -> None:
    generator = OneStepGenerator.from_teacher(teacher, guidance_max=3.0).eval()
    wake(generator.guided)
    generator.save_pretrained(tmp_path)
    again = OneStepGenerator.from_pretrained(tmp_path, use_safetensors=True).eval()
    condition = Condition(label=LABELS, guidance=WEIGHTS)
    assert torch.equal(again(Z, condition), generator(Z, condition))
    assert again.guidance_max == 3.0


def test_wrong_weights_are_refused(teacher: nn.Module) -> None:
    generator = OneStepGenerator.from_teacher(teacher, guidance_max=3.0)
    with pytest.raises(ConfigError, match=r"\[1, 3\], as in training \(1 is none\), got 3.5"):
        generator(Z, Condition(guidance=torch.tensor([1.0, 3.5, 2.0])))
    with pytest.raises(ShapeError, match="one per image"):
        generator(Z, Condition(guidance=torch.ones(3, 1)))
    with pytest.raises(ConfigError, match="above 1"):
        OneStepGenerator.from_teacher(teacher, guidance_max=1.0)


def test_a_guided_discriminator_starts_as_the_plain_one_and_then_sees_the_weight() -> None:
    def build(guided: bool) -> Discriminator:
        torch.manual_seed(3)
        stack = RandomFeatures(3, (8, 16))
        return Discriminator.for_stack(stack, image_size=8, num_classes=5, width=16, guided=guided).eval()

    plain, guided = build(False), build(True)
    condition = Condition(label=LABELS, guidance=WEIGHTS)
    assert torch.equal(guided(Z, condition), plain(Z, Condition(label=LABELS)))
    assert torch.equal(guided(Z, Condition(label=LABELS)), plain(Z, Condition(label=LABELS)))
    for head in guided.heads.heads:
        wake(head.guided)
    assert not torch.allclose(guided(Z, condition), guided(Z, Condition(label=LABELS)))
    with pytest.raises(ConfigError, match="no input for the condition `guidance`"):
        plain(Z, condition)
