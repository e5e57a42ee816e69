"""What `encode` tells and offers besides: moments, rates, renormalised latents, the fixed-point solver."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.data import LatentStore
from pagoda.errors import ArtifactError
from pagoda.stages.config import EncodeConfig
from pagoda.stages.encode import inversion_grid, renormalise
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train


def encoded(finished_run: RunFolder, folder: Path, **changes: object) -> RunFolder:
    """A run with the finished one's teacher, encoded anew under other settings."""
    copy = shutil.copytree(finished_run.path, folder / "run")
    for path in (copy / "latents", copy / "generator-8", copy / "generator-16", copy / "prior-gap"):
        shutil.rmtree(path)
    for stage in ("encode", "distill", "grow-16"):
        (copy / "stages" / f"{stage}.json").unlink()
    return train(tiny_config(**changes), str(copy), until="encode", quiet=True)


def test_the_record_tells_moments_distance_to_a_gaussian_and_rate(finished_run: RunFolder) -> None:
    record = finished_run.record("encode")
    assert record is not None
    results = record["results"]
    moments = LatentStore.open(finished_run.latents).moments()
    assert results["gaussian_distance"] == pytest.approx(moments.gaussian_distance)
    assert results["kurtosis"] == pytest.approx(moments.kurtosis)
    assert results["images_per_second"] == pytest.approx(80 / results["seconds"], rel=1e-6)
    assert "distance to the nearest Gaussian" in (finished_run.path / "report.html").read_text()


def test_renormalised_latents_have_a_root_mean_square_of_one_each(finished_run: RunFolder, tmp_path: Path) -> None:
    run = encoded(finished_run, tmp_path, encode__renormalise=True)
    store, plain = LatentStore.open(run.latents), LatentStore.open(finished_run.latents)
    rows = torch.arange(40)
    z = store.get(rows)
    torch.testing.assert_close(z.square().flatten(1).mean(1).sqrt(), torch.ones(40), atol=1e-3, rtol=0)
    torch.testing.assert_close(z, renormalise(plain.get(rows)), atol=4e-3, rtol=2e-3)
    assert store.provenance["renormalise"] is True


def test_settings_without_renormalisation_have_the_fingerprint_that_they_had(finished_run: RunFolder) -> None:
    assert "renormalise" not in stage_settings(tiny_config(), "encode")["encode"]
    assert stage_settings(tiny_config(encode__renormalise=True), "encode")["encode"]["renormalise"] is True
    assert "renormalise" not in LatentStore.open(finished_run.latents).provenance
    text = json.dumps(finished_run.record("encode"))
    assert "renormalise" not in text


def test_rho_crowds_the_levels_and_is_part_of_what_latents_are(finished_run: RunFolder, tmp_path: Path) -> None:
    grids = [inversion_grid(EncodeConfig(num_nodes=9, rho=rho), 80.0) for rho in (1.0, 7.0, 20.0)]
    for grid in grids:
        assert (float(grid[0]), float(grid[-1])) == (EncodeConfig.sigma_min, 80.0)
    assert float(grids[0].diff().std()) == pytest.approx(0, abs=1e-9)  # evenly spaced
    assert float(grids[0][4]) > float(grids[1][4]) > float(grids[2][4])  # denser near the image
    assert "rho" not in stage_settings(tiny_config(), "encode")["encode"]  # as in runs of earlier versions
    run = encoded(finished_run, tmp_path, encode__rho=20.0)
    assert LatentStore.open(run.latents).provenance["rho"] == 20.0
    with pytest.raises(ArtifactError, match="rho"):
        train(tiny_config(encode__rho=7.0), str(run.path), until="encode", quiet=True)


def test_a_latent_of_zeros_is_refused() -> None:
    with pytest.raises(ArtifactError, match="zero everywhere"):
        renormalise(torch.zeros(2, 1, 4, 4))


def test_the_fixed_point_solver_brings_images_back_more_exactly(finished_run: RunFolder, tmp_path: Path) -> None:
    psnr = []
    for solver in ("heun", "fixed_point"):
        run = encoded(finished_run, tmp_path / solver, encode__solver=solver, encode__num_nodes=6)
        record = run.record("encode")
        assert record is not None
        psnr.append(record["results"]["round_trip_psnr"])
    assert psnr[1] > psnr[0]
