"""The two-tower encoder: its loss in closed form, training that resumes to the last bit, and what comes of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.text.tiny import WORDS, tiny_towers
from torch.nn import functional as F

from pagoda.data import ImageDataset
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.evaluation import retrieval_accuracy
from pagoda.text import (
    TransformersImageTextEncoder,
    TransformersTextEncoder,
    TwoTowerConfig,
    contrastive_loss,
    spherical_distance,
    train_tokenizer,
    train_two_tower,
)
from pagoda.text.image_text import prepare_pixels
from pagoda.text.two_tower import ContrastiveObjective, new_two_tower
from pagoda.training import LoopConfig, StepRandom
from pagoda.training.runtime import Runtime


def runtime() -> Runtime:
    return Runtime("cpu")


def test_with_different_captions_the_loss_is_the_cross_entropy_of_both_ways() -> None:
    logits = torch.randn(6, 6, dtype=torch.float64)
    rows = torch.arange(6)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.tensor([4, 9, 2, 0, 1, 7])), expected)


def test_equal_captions_are_right_answers_for_each_other() -> None:
    captions = torch.tensor([0, 0, 1])
    certain = torch.where(captions[:, None] == captions[None], 50.0, -50.0)
    loss = contrastive_loss(certain, captions)
    assert loss.item() == pytest.approx(
        2 / 3 * math.log(2), abs=1e-6
    )  # two answers of equal right, twice of three rows
    diagonal = 100 * torch.eye(3) - 50  # each finds its own, and takes its twin for another
    assert contrastive_loss(diagonal, torch.tensor([0, 1, 2])) < 1e-6
    assert contrastive_loss(diagonal, captions) > 10


def test_the_tokeniser_reads_any_text_and_gives_it_back() -> None:
    tokenizer = train_tokenizer(WORDS, vocab_size=300, max_tokens=16)
    text = "zürich's 5 ünïcödé 犬"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer("a red heart")["input_ids"]) < len("a red heart")
    again = train_tokenizer(WORDS, vocab_size=300, max_tokens=16)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_training_killed_and_resumed_ends_with_the_same_weights(shapes: ImageDataset, tmp_path: Path) -> None:
    config = tiny_towers()
    facts = train_two_tower(shapes, config, tmp_path / "whole", seed=0, mirror=False, runtime=runtime())
    assert facts["steps"] == 4
    assert not (tmp_path / "whole" / "work").exists()

    class Killed(Exception):
        pass

    class Status:
        def show(self, text: str) -> None:
            if "step 4/" in text:
                raise Killed

        def done(self) -> None:
            pass

    arguments = {"seed": 0, "mirror": False, "runtime": runtime()}
    with pytest.raises(Killed):
        train_two_tower(shapes, config, tmp_path / "parts", status=Status(), **arguments)  # type: ignore[arg-type]
    assert (tmp_path / "parts" / "work").is_dir()
    assert not (tmp_path / "parts" / "config.json").exists()
    train_two_tower(shapes, config, tmp_path / "parts", **arguments)  # type: ignore[arg-type]
    whole, parts = (TransformersImageTextEncoder(tmp_path / name).fingerprint for name in ("whole", "parts"))
    assert whole == parts
    assert train_two_tower(shapes, config, tmp_path / "whole", **arguments) == facts  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="trained with other settings"):
        train_two_tower(shapes, tiny_towers(dim=16), tmp_path / "whole", **arguments)  # type: ignore[arg-type]


def test_training_teaches_images_to_find_their_captions(shapes: ImageDataset, tmp_path: Path) -> None:
    loop = LoopConfig(steps=60, batch_size=32, checkpoint_every=100, log_every=50, preview_every=0)
    config = tiny_towers(loop=loop, dropout=0.0, augment=(), ema=0.9)
    facts = train_two_tower(shapes, config, tmp_path / "trained", seed=0, mirror=False, runtime=runtime())
    assert facts["retrieval"] > 4 / 32  # four times chance, on the images that it was trained on


@pytest.mark.parametrize("vision", ["vit", "convnext"])
def test_every_parameter_of_both_towers_learns(shapes: ImageDataset, vision: str) -> None:
    texts = sorted({str(caption) for caption in shapes.captions or []})
    rows = torch.tensor([texts.index(str(caption)) for caption in shapes.captions or []])
    model, tokenizer = new_two_tower(tiny_towers(vision=vision), texts)
    objective = ContrastiveObjective(
        model,
        tokenizer,
        texts,
        rows,
        lambda indices, flips: shapes.images(indices, 16, flips),
        config=tiny_towers(vision=vision),
        mirror=True,
    )
    random = StepRandom(0, 0, 8, slice(0, 8))
    losses = objective.losses("encoder", objective.batch(torch.arange(8), random), random, runtime())
    losses.total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Unseen positions are rows of a table that learns; a key's bias moves no softmax; BERT's second sentence never comes.
    assert not [name for name in silent if not name.endswith(("k_proj.bias", "key.bias"))]


class Half(Runtime):
    """One of two processes; what the other one has is known beforehand."""

    def __init__(self, rank: int, known: list[list[torch.Tensor]]) -> None:
        super().__init__("cpu")
        self._rank, self._known, self._calls = rank, known, 0

    rank = property(lambda self: self._rank)  # type: ignore[assignment]
    world_size = property(lambda self: 2)  # type: ignore[assignment]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._known[self._calls]
        parts[self._rank] = tensor.detach()
        self._calls += 1
        return torch.cat(parts)


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(shapes: ImageDataset) -> None:
    texts = sorted({str(caption) for caption in shapes.captions or []})
    rows = torch.tensor([texts.index(str(caption)) for caption in shapes.captions or []])
    config = tiny_towers(dropout=0.0)
    model, tokenizer = new_two_tower(config, texts)

    def gradients(rows_here: slice, place: Runtime) -> dict[str, torch.Tensor]:
        model.zero_grad()
        objective = ContrastiveObjective(
            model, tokenizer, texts, rows, lambda i, f: shapes.images(i, 16, f), config=config, mirror=True
        )
        random = StepRandom(0, 0, 8, rows_here)
        losses = objective.losses("encoder", objective.batch(torch.arange(8)[rows_here], random), random, place)
        losses.total.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"": losses.total}

    whole = gradients(slice(0, 8), runtime())
    known = [[torch.zeros(4, dtype=torch.int64)] * 2, [torch.zeros(4, 24)] * 2, [torch.zeros(4, 24)] * 2]
    known = [list(parts) for parts in known]
    for _ in range(2):  # the first round only tells each what the other has
        halves = [gradients(slice(4 * rank, 4 * rank + 4), Half(rank, known)) for rank in range(2)]
    for name, expected in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, expected, atol=1e-5, rtol=1e-3)


def test_retrieval_is_one_for_equal_vectors_chance_for_random_ones_and_nothing_for_ties() -> None:
    texts = F.normalize(torch.randn(200, 16), dim=1)
    rows = torch.arange(200)
    assert retrieval_accuracy(texts, texts, rows) == 1
    assert retrieval_accuracy(torch.ones(200, 4), torch.ones(200, 4), rows) == 0
    images, many = F.normalize(torch.randn(3000, 16), dim=1), torch.randint(200, (3000,))
    assert retrieval_accuracy(images, texts, many) == pytest.approx(1 / 32, abs=4 * math.sqrt(1 / 32 / 3000))
    with pytest.raises(DataError, match="there are 20"):
        retrieval_accuracy(texts[:20], texts[:20], rows[:20])
    with pytest.raises(ShapeError, match="rows"):
        retrieval_accuracy(texts, texts, rows[:5])


def test_the_spherical_distance_is_the_squared_angle_and_its_gradient_is_finite_everywhere() -> None:
    angles = torch.tensor([0.0, 0.5, 1.5, 3.0], dtype=torch.float64)
    a = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_(True)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    distance = spherical_distance(a, b)
    torch.testing.assert_close(distance, angles.square(), atol=1e-8, rtol=1e-6)
    distance.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_what_an_image_tower_reads_has_its_size_and_scale_whatever_the_image() -> None:
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    for side, channels in ((8, 1), (16, 3), (40, 3)):
        pixels = prepare_pixels(torch.full((2, channels, side, side), 0.5), 16, mean, std)
        assert pixels.shape == (2, 3, 16, 16)
        torch.testing.assert_close(pixels, torch.ones_like(pixels))  # 0.5 in [-1, 1] is 0.75 in [0, 1]
    with pytest.raises(ShapeError, match="1 or 3"):
        prepare_pixels(torch.zeros(2, 4, 8, 8), 16, mean, std)


def test_texts_have_the_same_vectors_by_themselves_and_beside_images(encoder_folders: dict[str, Path]) -> None:
    pair = TransformersImageTextEncoder(encoder_folders["vit"])
    pooled = TransformersTextEncoder(encoder_folders["vit"]).embed(WORDS).pooled
    torch.testing.assert_close(pair.embed_texts(WORDS), F.normalize(pooled, dim=1))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    images.requires_grad_(True)
    vectors = pair.embed_images(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    vectors[0, 0].backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0


def test_a_text_model_alone_is_no_encoder_of_images(encoder_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="pagoda text train"):
        TransformersImageTextEncoder(encoder_folders["bert"])


def test_settings_out_of_range_are_refused_with_the_value() -> None:
    for changes, message in (
        ({"width": 30, "heads": 4}, "does not divide the width 30"),
        ({"patch_size": 5}, "patch_size=5"),
        ({"vocab_size": 100}, "got 100"),
        ({"vision": "resnet"}, "resnet"),
        ({"dropout": 1.0}, "got 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TwoTowerConfig(**changes)  # type: ignore[arg-type]
