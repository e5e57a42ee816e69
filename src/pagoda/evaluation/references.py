"""Reference statistics in files: our own with their provenance, and the `.npz` files that papers' code has published."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pagoda.errors import ArtifactError, DataError, ShapeError
from pagoda.evaluation.extractors import FeatureExtractor
from pagoda.evaluation.frechet import FeatureMoments
from pagoda.files import load_tensors, refuse_foreign, save_tensors

_KEY = "reference"


@dataclass(frozen=True)
class ReferenceFacts:
    """What a file of statistics says of itself; None where it is silent, as published ones are."""

    count: int
    """Number of images."""
    extractor: str | None = None
    extractor_fingerprint: str | None = None
    resize: str | None = None
    image_size: int | None = None
    """Side of the images in pixels."""
    data: str | None = None
    """Fingerprint of the data set."""


def save_stats(
    path: Path | str, moments: FeatureMoments, extractor: FeatureExtractor, *, image_size: int, data: str | None = None
) -> None:
    """Write statistics (safetensors) with what made them, for `load_stats`.

    Args:
        image_size: Side of the images in pixels.
        data: Fingerprint of the data set.
    """
    facts = ReferenceFacts(moments.count, extractor.name, extractor.fingerprint, extractor.resize, image_size, data)
    tensors = {"mu": moments.mean, "sigma": moments.covariance()}
    save_tensors(Path(path), tensors, {_KEY: json.dumps(asdict(facts))})


def load_stats(
    path: Path | str,
    *,
    count: int | None = None,
    extractor: FeatureExtractor | None = None,
    image_size: int | None = None,
    spatial: bool = False,
) -> tuple[FeatureMoments, ReferenceFacts]:
    """Read statistics of features.

    | file | holds |
    |---|---|
    | `.safetensors` | what `save_stats` writes |
    | `.npz` | `mu`, `sigma` (pytorch-fid, EDM, clean-fid, ADM); ADM's `mu_s`, `sigma_s` with `spatial` |
    | `.npz` | `mean`, `cov`, or the features themselves (one matrix) |

    Args:
        count: Number of images behind them, for files that do not say it (50,000 for CIFAR-10's training set).
        extractor: What they are to be compared in; refused when the file names another one or its width differs.
        image_size: Side of the images they are to be compared with; refused when the file names another one.
        spatial: The statistics of sFID in a file that holds both.

    Raises:
        ArtifactError: missing, damaged, a pickle, or of another extractor, kernel or resolution.
        DataError: the number of images is not known, or statistics that are not finite.
        ShapeError: mean and covariance, or features and extractor, do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file of statistics `{path}`.")
    if path.suffix == ".npz":
        mean, covariance, found = _read_npz(path, spatial)
        facts = ReferenceFacts(count or found or 0)
    else:
        refuse_foreign(path)
        tensors, metadata = load_tensors(path)
        if _KEY not in metadata or not {"mu", "sigma"} <= tensors.keys():
            raise ArtifactError(
                f"`{path}` holds no statistics of `save_stats`: it lacks mu, sigma or their description."
            )
        mean, covariance, facts = tensors["mu"], tensors["sigma"], ReferenceFacts(**json.loads(metadata[_KEY]))
    if facts.count < 2:
        raise DataError(
            f"`{path}` does not say how many images it stands for; give count= (50,000 for CIFAR-10's training set)."
        )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ShapeError(f"`{path}` holds a mean {tuple(mean.shape)} and a covariance {tuple(covariance.shape)}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise DataError(f"`{path}` holds NaN or infinity.")
    _check(path, facts, len(mean), extractor, image_size)
    return FeatureMoments(facts.count, mean.double(), covariance.double() * (facts.count - 1)), facts


def _check(
    path: Path, facts: ReferenceFacts, dim: int, extractor: FeatureExtractor | None, image_size: int | None
) -> None:
    if extractor is not None:
        if extractor.dim != dim:
            raise ShapeError(f"`{path}` holds {dim} features, `{extractor.name}` gives {extractor.dim}.")
        for name, theirs, ours in (
            ("extractor", facts.extractor_fingerprint, extractor.fingerprint),
            ("resize kernel", facts.resize, extractor.resize),
        ):
            if theirs is not None and theirs != ours:
                raise ArtifactError(
                    f"`{path}` was made with another {name}: {theirs} ({facts.extractor}) there, {ours} ({extractor.name}) here. "
                    "Distances between them mean nothing; make the statistics again."
                )
    if image_size is not None and facts.image_size not in (None, image_size):
        raise ArtifactError(
            f"`{path}` stands for images of {facts.image_size} px, these have {image_size}. Make statistics of that size."
        )


def _read_npz(path: Path, spatial: bool) -> tuple[Tensor, Tensor, int | None]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"`{path}` cannot be read as arrays ({error}). Pickled statistics are not opened; save mu and sigma with numpy.savez."
        ) from error
    for mean, covariance in [("mu_s", "sigma_s")] if spatial else [("mu", "sigma"), ("mean", "cov")]:
        if {mean, covariance} <= arrays.keys():
            known = next(
                (int(arrays[name]) for name in ("num", "count", "n") if name in arrays and arrays[name].ndim == 0), None
            )
            return torch.from_numpy(arrays[mean]), torch.from_numpy(arrays[covariance]), known
    matrices = [array for array in arrays.values() if array.ndim == 2 and array.dtype.kind == "f"]
    if len(arrays) == 1 and matrices and not spatial:
        moments = FeatureMoments.from_features(torch.from_numpy(matrices[0]))
        return moments.mean, moments.covariance(), moments.count
    wanted = "mu_s and sigma_s" if spatial else "mu and sigma, mean and cov, or one matrix of features"
    raise ArtifactError(f"`{path}` holds {sorted(arrays)}; wanted are {wanted}.")
