"""Similarity of features by its laws."""

from __future__ import annotations

import pytest
import torch
from tests.pretraining.tiny import load, make_network

from pagoda.diffusion import EDMDenoiser
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import RandomFeatures
from pagoda.pretraining.encoders import StackEncoder
from pagoda.pretraining.similarity import cknna, feature_similarity, linear_cka


def test_rotation_scale_and_shift_do_not_matter() -> None:
    a = torch.randn(40, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(a, 3 * a @ rotation + 5) == pytest.approx(1)
    assert cknna(a, 3 * a @ rotation + 5) == pytest.approx(1)


def test_unrelated_features_are_far_apart() -> None:
    a, b = torch.randn(500, 4), torch.randn(500, 4)
    assert linear_cka(a, b) < 0.05
    assert cknna(a, b) < 0.2
    assert linear_cka(a, b) == pytest.approx(linear_cka(b, a))


def test_cka_is_its_definition_by_kernels() -> None:
    a, b = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    centre = torch.eye(30).double() - 1 / 30
    k, kernel_b = (centre @ (x @ x.T) @ centre for x in (a, b))
    expected = (k * kernel_b).sum() / (k.norm() * kernel_b.norm())
    assert linear_cka(a, b) == pytest.approx(float(expected))


def test_a_table_has_a_row_for_every_part_and_noise_level() -> None:
    denoiser = EDMDenoiser(make_network(random=True).eval(), noise_scale=25.0)
    images, condition = load(torch.arange(20), torch.zeros(20, dtype=torch.bool))
    rows = feature_similarity(
        denoiser,
        StackEncoder(RandomFeatures(3)),
        images,
        condition.null(),
        parts=["block.0", "block.2"],
        sigmas=[0.1, 20.0],
        generator=torch.Generator().manual_seed(0),
        neighbours=3,
    )
    assert [(row["part"], row["sigma"]) for row in rows] == [
        (p, s) for s in (0.1, 20.0) for p in ("block.0", "block.2")
    ]
    assert float(rows[0]["cka"]) > float(rows[2]["cka"])  # noise hides the image


def test_bad_features_are_refused() -> None:
    with pytest.raises(ShapeError, match="same N >= 2 samples"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ConfigError, match=r"neighbours must lie in 1..3, got 4"):
        cknna(torch.zeros(4, 2), torch.zeros(4, 2), 4)
