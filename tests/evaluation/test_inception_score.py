"""Laws of the Inception Score."""

from __future__ import annotations

import pytest
import torch

from pagoda.errors import DataError
from pagoda.evaluation import inception_score


def test_sure_and_balanced_predictions_score_the_number_of_classes() -> None:
    logits = 1000 * torch.eye(7).repeat(20, 1)
    found = inception_score(logits, splits=1)
    assert found.mean == pytest.approx(7, rel=1e-12)


def test_equal_predictions_score_one() -> None:
    found = inception_score(torch.randn(1, 5).repeat(100, 1))
    assert found.mean == pytest.approx(1, abs=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_the_score_lies_between_one_and_the_number_of_classes_and_ignores_constants() -> None:
    logits = 3 * torch.randn(500, 6, dtype=torch.float64)
    found = inception_score(logits)
    assert 1 < found.mean < 6
    shifted = logits + torch.randn(500, 1, dtype=torch.float64)
    assert inception_score(shifted).mean == pytest.approx(found.mean, rel=1e-12)


def test_it_is_the_formula_on_probabilities() -> None:
    logits = torch.randn(40, 4, dtype=torch.float64)
    p = logits.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert inception_score(logits, splits=1, seed=None).mean == pytest.approx(float(expected), rel=1e-12)


def test_the_order_does_not_matter_for_one_part_and_a_seed_fixes_the_parts() -> None:
    logits = torch.randn(100, 4)
    assert inception_score(logits.flip(0), splits=1).mean == pytest.approx(inception_score(logits, splits=1).mean)
    assert inception_score(logits) == inception_score(logits)


def test_samples_class_after_class_are_shuffled_before_they_are_parted() -> None:
    logits = 1000 * torch.eye(10).repeat_interleave(50, 0)
    assert inception_score(logits, splits=10, seed=None).mean == pytest.approx(1)
    assert inception_score(logits, splits=10).mean > 9


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="3 images cannot be scored in 10 parts"):
        inception_score(torch.randn(3, 4))
