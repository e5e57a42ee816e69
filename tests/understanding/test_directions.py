"""Directions move what they were made for, leave the rest, carry over to other images, and add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.understanding.conftest import edm, make_network
from torch import Tensor

from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.files import save_tensors
from pagoda.understanding import (
    DenoiserJacobian,
    Directions,
    LowRankMixture,
    edit_images,
    find_directions,
    from_level,
    to_level,
)

SHAPE = (1, 4, 4)
SIGMA = 0.8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_halves() -> LowRankMixture:
    """One component whose directions live in the upper or the lower half of the image; the upper ones vary more."""
    upper = torch.linalg.qr(torch.randn(8, 2, generator=seeded(1), dtype=torch.float64)).Q
    lower = torch.linalg.qr(torch.randn(8, 2, generator=seeded(2), dtype=torch.float64)).Q
    basis = torch.zeros(16, 4, dtype=torch.float64)
    basis[:8, :2], basis[8:, 2:] = upper, lower
    return LowRankMixture(
        [basis], SHAPE, variances=[torch.tensor([4.0, 3.0, 1.0, 0.5], dtype=torch.float64)], noise=0.05
    )


def lower_mask() -> Tensor:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    return mask


def test_directions_are_the_singular_vectors_of_the_masked_rows() -> None:
    oracle = two_halves()
    x, _ = oracle.draw(1, seeded(3))
    found = find_directions(oracle, x, SIGMA, rank=2)
    overlap = (found.vectors.flatten(1) @ oracle.basis[:, :2]).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.gains, oracle.variance[:2] / (oracle.variance[:2] + SIGMA**2), atol=2e-3, rtol=0)
    local = find_directions(oracle, x, SIGMA, mask=lower_mask(), rank=1, null_rank=2)
    assert float((local.vectors.flatten(1) @ oracle.basis[:, 2]).abs()) > 0.999


def test_what_would_move_the_rest_is_projected_away() -> None:
    denoiser = edm(make_network("unet"))
    x = torch.randn(1, 3, 8, 8, generator=seeded(4))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 1:4] = True
    found = find_directions(denoiser, x, SIGMA, mask=mask, rank=1, null_rank=4)
    plain = find_directions(denoiser, x, SIGMA, mask=mask, rank=1, null_rank=0)
    outside = DenoiserJacobian(denoiser, x, SIGMA, mask=~mask)
    null = outside.svd(4, tolerance=1e-4).v
    vector = found.vectors.flatten(1).T.double()
    assert float((null.T @ vector).abs().max()) < 1e-2
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)

    def share(directions: Directions) -> float:
        v = directions.vectors.flatten(1).T.double()
        rest = outside.jvp(v).norm()
        return float(DenoiserJacobian(denoiser, x, SIGMA, mask=mask).jvp(v).norm() / rest)

    assert share(found) > share(plain)


def test_no_step_is_the_round_trip_bit_for_bit_and_the_round_trip_returns() -> None:
    denoiser = edm(make_network("unet"))
    images = torch.rand(2, 3, 8, 8, generator=seeded(5)) * 2 - 1
    directions = Directions(torch.randn(1, 3, 8, 8), torch.ones(1), SIGMA, torch.ones(3, 8, 8, dtype=torch.bool))
    edited = edit_images(denoiser, images, directions, [0.0, 1.0])
    back = from_level(denoiser, to_level(denoiser, images, SIGMA), SIGMA)
    assert torch.equal(edited[0], back)
    assert not torch.equal(edited[1], back)
    oracle = two_halves()
    x, _ = oracle.draw(3, seeded(6))
    again = from_level(oracle, to_level(oracle, x, SIGMA, steps=60), SIGMA, steps=60)
    torch.testing.assert_close(again, x, atol=2e-3, rtol=0)


def test_an_edit_moves_along_the_data_inside_the_mask_and_for_other_images_too() -> None:
    oracle = two_halves()
    x, _ = oracle.draw(4, seeded(3))
    found = find_directions(oracle, to_level(oracle, x[:1], SIGMA), SIGMA, mask=lower_mask(), rank=1, null_rank=2)
    edited = edit_images(oracle, x, found, [-1.0, 0.0, 1.0])
    change = edited[2] - edited[1]  # all four images, three of which the direction was not found at
    assert float(change[:, :, :2].abs().max()) < 1e-2 * float(change[:, :, 2:].abs().max())
    torch.testing.assert_close(edited[1] - edited[0], change, atol=1e-9, rtol=1e-6)  # linear for one component
    twice = edit_images(oracle, x, found * 2.0, [1.0])[0] - edited[1]
    torch.testing.assert_close(twice, 2 * change, atol=1e-9, rtol=1e-6)


def test_directions_add_and_are_saved(tmp_path: Path) -> None:
    oracle = two_halves()
    x, _ = oracle.draw(2, seeded(3))
    found = find_directions(oracle, x[:1], SIGMA, rank=2)
    both = found[0] + found[1]
    moved = edit_images(oracle, x, both, [0.0, 1.0])
    each = [edit_images(oracle, x, found[k], [0.0, 1.0]) for k in range(2)]
    torch.testing.assert_close(moved[1] - moved[0], sum(part[1] - part[0] for part in each), atol=1e-9, rtol=1e-6)
    found.save(tmp_path / "directions.safetensors")
    again = Directions.load(tmp_path / "directions.safetensors")
    assert torch.equal(again.vectors, found.vectors)
    assert torch.equal(again.mask, found.mask)
    assert again.sigma == found.sigma
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="no directions"):
        Directions.load(tmp_path / "other.safetensors")


def test_mistakes_are_named() -> None:
    oracle = two_halves()
    x, _ = oracle.draw(1, seeded(3))
    with pytest.raises(ConfigError, match="selects nothing"):
        find_directions(oracle, x, SIGMA, mask=torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="selects everything"):
        find_directions(oracle, x, SIGMA, mask=torch.ones(4, 4))
    a = find_directions(oracle, x, SIGMA, rank=1)
    with pytest.raises(ConfigError, match="do not add"):
        a + find_directions(oracle, x, 1.5, rank=1)
    with pytest.raises(ShapeError, match="do not fit images"):
        edit_images(oracle, torch.zeros(1, 1, 8, 8, dtype=torch.float64), a, [1.0])
    with pytest.raises(ConfigError, match="sigma_min < sigma_max"):
        to_level(oracle, x, 0.01)
