"""Reference statistics: round trips, published layouts, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pagoda.errors import ArtifactError, DataError, ShapeError
from pagoda.evaluation import FeatureMoments, StackFeatures, frechet_distance, load_stats, save_stats
from pagoda.networks import RandomFeatures

EXTRACTOR = StackFeatures(RandomFeatures(widths=(4, 8)), name="random")


def moments(seed: int = 0) -> FeatureMoments:
    x = torch.randn(100, EXTRACTOR.dim, generator=torch.Generator().manual_seed(seed))
    return FeatureMoments.from_features(x)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return moments().mean.numpy(), moments().covariance().numpy()


def close(found: FeatureMoments) -> None:
    assert found.count == 100
    torch.testing.assert_close(found.mean, moments().mean)
    torch.testing.assert_close(found.covariance(), moments().covariance(), rtol=1e-12, atol=1e-14)
    assert frechet_distance(found, moments()) < 1e-10


def test_our_own_files_come_back_with_their_provenance(tmp_path: Path) -> None:
    save_stats(tmp_path / "s.safetensors", moments(), EXTRACTOR, image_size=32, data="abc")
    found, facts = load_stats(tmp_path / "s.safetensors", extractor=EXTRACTOR, image_size=32)
    close(found)
    assert (facts.extractor, facts.data, facts.image_size) == ("random", "abc", 32)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "cov")])
def test_published_layouts_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    np.savez(tmp_path / "r.npz", **dict(zip(names, arrays(), strict=True)))
    close(load_stats(tmp_path / "r.npz", count=100)[0])


def test_spatial_statistics_beside_pooled_ones_are_told_apart(tmp_path: Path) -> None:
    mu, sigma = arrays()
    np.savez(tmp_path / "adm.npz", mu=mu + 1, sigma=sigma * 2, mu_s=mu, sigma_s=sigma)
    close(load_stats(tmp_path / "adm.npz", count=100, spatial=True)[0])
    assert not torch.equal(load_stats(tmp_path / "adm.npz", count=100)[0].mean, moments().mean)


def test_a_matrix_of_features_is_a_reference_with_its_count(tmp_path: Path) -> None:
    x = torch.randn(100, EXTRACTOR.dim, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "f.npz", x.numpy())
    close(load_stats(tmp_path / "f.npz")[0])


def test_an_unknown_count_is_asked_for(tmp_path: Path) -> None:
    mu, sigma = arrays()
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    with pytest.raises(DataError, match="does not say how many images"):
        load_stats(tmp_path / "r.npz")


class Foreign:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    import pickle

    trap = tmp_path / "trap"
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(Foreign(trap)))
    np.savez(tmp_path / "r.npz", mu=np.array([Foreign(trap)], dtype=object), sigma=np.zeros(1))
    for name in ("r.pkl", "r.npz"):
        with pytest.raises(ArtifactError):
            load_stats(tmp_path / name, count=5)
    assert not trap.exists()


def other(seed: int = 1, input_size: int | None = None) -> StackFeatures:
    return StackFeatures(RandomFeatures(widths=(4, 8), seed=seed), name="random", input_size=input_size)


def test_statistics_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_stats(path, moments(), EXTRACTOR, image_size=32)
    with pytest.raises(ArtifactError, match="another extractor"):
        load_stats(path, extractor=other())
    with pytest.raises(ArtifactError, match="images of 32 px, these have 64"):
        load_stats(path, image_size=64)
    with pytest.raises(ShapeError, match="12 features, `random` gives 4"):
        load_stats(path, extractor=StackFeatures(RandomFeatures(widths=(4,)), name="random"))


def bad_files(mu: np.ndarray, sigma: np.ndarray) -> list[tuple[dict[str, np.ndarray], type[Exception], str]]:
    return [
        ({"mu": mu}, ArtifactError, "wanted are mu and sigma"),
        ({"mu": mu, "sigma": sigma[:3]}, ShapeError, "a covariance"),
        ({"mu": mu * np.nan, "sigma": sigma}, DataError, "NaN"),
    ]


@pytest.mark.parametrize("case", range(3))
def test_damaged_statistics_are_refused(tmp_path: Path, case: int) -> None:
    content, error, match = bad_files(*arrays())[case]
    np.savez(tmp_path / "r.npz", **content)
    with pytest.raises(error, match=match):
        load_stats(tmp_path / "r.npz", count=100)
    with pytest.raises(ArtifactError, match="no file"):
        load_stats(tmp_path / "none.npz")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    mu, sigma = arrays()
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    (tmp_path / "r.npz").write_bytes((tmp_path / "r.npz").read_bytes()[:50])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_stats(tmp_path / "r.npz", count=100)


def test_ten_features_are_read_as_float64(tmp_path: Path) -> None:
    mu, sigma = arrays()
    np.savez(tmp_path / "r.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    found: Tensor = load_stats(tmp_path / "r.npz", count=100)[0].mean
    assert found.dtype == torch.float64
