"""Laws of the scores of images and texts in one space."""

from __future__ import annotations

import pytest
import torch

from pagoda.errors import ShapeError
from pagoda.evaluation import clip_scores, directional_similarity


def test_a_matching_pair_scores_100_a_foreign_one_0_an_opposite_one_0() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_scores(images, texts), torch.tensor([100.0, 0.0, 0.0, 50 * 2**0.5]).double())


def test_lengths_do_not_matter() -> None:
    images, texts = torch.randn(2, 9, 4).double()
    torch.testing.assert_close(clip_scores(3 * images, texts / 7), clip_scores(images, texts))


def test_a_change_along_the_text_is_1_and_against_it_minus_1() -> None:
    before, change = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    texts = torch.randn(6, 4).double()
    along = directional_similarity(before, before + change, texts, texts + 2 * change)
    against = directional_similarity(before, before + change, texts, texts - change)
    torch.testing.assert_close(along, torch.ones(6).double())
    torch.testing.assert_close(against, -torch.ones(6).double())


def test_as_many_texts_as_images_are_needed() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4\) and \(2, 4\)"):
        clip_scores(torch.zeros(3, 4), torch.zeros(2, 4))
