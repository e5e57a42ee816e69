"""Features of a whole set, by part and noise level: read batch by batch, in memory or straight to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, DataError, did_you_mean
from pagoda.files import atomic_path, check_disk, hash_json, write_text_atomic
from pagoda.understanding.taps import FeatureSpec, Taps, check_features

_DESCRIPTION = "features.json"
_DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Features:
    """Features of images at one part and noise level: (N, ...) and where they come from."""

    values: Tensor
    spec: FeatureSpec

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Features:
        """Some of the images, by index."""
        return Features(self.values[rows], self.spec)


class FeatureTable:
    """Features of the same images at several parts and noise levels; made by `read_features`, opened by `open`."""

    def __init__(self, values: Mapping[FeatureSpec, np.ndarray]) -> None:
        self._values = dict(values)
        self.specs = list(self._values)

    def __len__(self) -> int:
        return len(next(iter(self._values.values())))

    @property
    def taps(self) -> list[str]:
        """Parts, in the order in which they were asked for."""
        return list(dict.fromkeys(spec.tap for spec in self.specs))

    @property
    def sigmas(self) -> list[float]:
        """Noise levels, in the order in which they were asked for."""
        return list(dict.fromkeys(spec.sigma for spec in self.specs))

    def features(self, tap: str, sigma: float) -> Features:
        """The features of one part at one noise level.

        Raises:
            ConfigError: the table has no such part or noise level.
        """
        if tap not in self.taps:
            raise ConfigError(f"the table has no part `{tap}`. {did_you_mean(tap, self.taps)}")
        found = [spec for spec in self.specs if spec.tap == tap and abs(spec.sigma - sigma) <= 1e-9 * spec.sigma]
        if not found:
            raise ConfigError(f"the table has no noise level {sigma:.4g}; it has {self.sigmas}.")
        return Features(torch.from_numpy(np.array(self._values[found[0]], dtype=np.float32)), found[0])

    @classmethod
    def open(cls, path: Path | str) -> FeatureTable:
        """A table that `read_features` wrote; values stay on disk until they are asked for.

        Raises:
            ArtifactError: no such table, or a file of it is missing or damaged.
        """
        path = Path(path)
        content = _description(path)
        if content is None:
            raise ArtifactError(f"{path} holds no table of features. Make one with `read_features(..., out={path})`.")
        values = {}
        for entry in content["features"]:
            file = path / entry["file"]
            try:
                values[FeatureSpec(**entry["spec"])] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ArtifactError(
                    f"`{file}` cannot be read ({error}). Delete {path / _DESCRIPTION} and read the features again."
                ) from error
        return cls(values)


def read_features(
    taps: Taps,
    load: Callable[[Tensor], Tensor],
    count: int,
    sigmas: Sequence[float],
    *,
    data: str,
    condition: Callable[[Tensor], Condition] | None = None,
    batch_size: int = 128,
    out: Path | str | None = None,
    dtype: str = "float32",
    progress: Callable[[int], None] | None = None,
) -> FeatureTable:
    """Features of images 0 to count - 1 at every part and noise level, each image read once.

    Args:
        taps: What to read. Image i has the noise of number i.
        load: Indices (b,) int64 -> images (b, C, H, W).
        sigmas: Noise levels.
        data: Fingerprint of the images; part of the cache's key.
        condition: Indices -> what the images are conditioned on; None gives the model no class.
        batch_size: Images a network call.
        out: Folder to stream into; memory then holds one batch. A table there that was made from the same model, settings and
            images is opened instead of being made again. None keeps the features in memory.
        dtype: float32, or float16 for half of the disk.
        progress: Called with the number of images done.

    Raises:
        ConfigError: an unknown `dtype`, or no image.
        DataError: features that are not finite.
        ResourceError: the table does not fit on the disk.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r} for features. {did_you_mean(dtype, _DTYPES)}")
    if count < 1 or batch_size < 1:
        raise DataError(f"there must be at least one image and one image a batch, got {count} and {batch_size}.")
    specs = {(name, float(sigma)): taps.spec(name, sigma) for name in taps.names for sigma in sigmas}
    key = hash_json([[asdict(spec) for spec in specs.values()], data, count, dtype])
    folder = None if out is None else Path(out)
    if folder is not None:
        content = _description(folder)
        if content is not None and content["key"] == key:
            return FeatureTable.open(folder)
        (folder / _DESCRIPTION).unlink(missing_ok=True)  # an old description must not vouch for new features
    device = next(taps.network.parameters()).device
    with ExitStack() as stack:
        arrays: dict[FeatureSpec, np.ndarray] = {}
        for rows in torch.arange(count).split(batch_size):
            given = Condition() if condition is None else condition(rows)
            found = taps(load(rows).to(device), list(sigmas), seeds=rows.tolist(), condition=given.to(device))
            if not arrays:
                arrays = _allocate(folder, specs, found, count, dtype, stack)
            for (name, sigma), spec in specs.items():
                batch = found[name][list(map(float, sigmas)).index(sigma)].cpu()
                check_features(batch, f"features of `{name}` at sigma={sigma:.4g}")
                arrays[spec][rows[0] : rows[-1] + 1] = batch.numpy()
            if progress is not None:
                progress(int(rows[-1]) + 1)
        for array in arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
    if folder is None:
        return FeatureTable(arrays)
    entries = [{"file": f"{index}.npy", "spec": asdict(spec)} for index, spec in enumerate(specs.values())]
    write_text_atomic(folder / _DESCRIPTION, json.dumps({"key": key, "data": data, "features": entries}, indent=1))
    return FeatureTable.open(folder)


def labels_of(labels: Tensor | None, num_classes: int, count: int) -> Tensor:
    """Labels that a head can be fitted to.

    Raises:
        DataError: no labels, another number of them, fewer than two classes, or a label out of range.
    """
    if labels is None:
        raise DataError("the images have no labels; a head needs them. Give class subfolders or a label column.")
    if len(labels) != count:
        raise DataError(f"{len(labels)} labels for {count} images.")
    if num_classes < 2:
        raise DataError(f"the images have {num_classes} class; there is nothing to tell apart. Give two or more.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}.")
    return labels.long()


def _allocate(
    folder: Path | None,
    specs: Mapping[tuple[str, float], FeatureSpec],
    found: Mapping[str, Tensor],
    count: int,
    dtype: str,
    stack: ExitStack,
) -> dict[FeatureSpec, np.ndarray]:
    """One array for each part and level, in memory or as a file that takes its name when the block ends."""
    shapes = {spec: (count, *found[name].shape[2:]) for (name, _), spec in specs.items()}
    if folder is None:
        return {spec: np.empty(shape, dtype=_DTYPES[dtype]) for spec, shape in shapes.items()}
    itemsize = np.dtype(_DTYPES[dtype]).itemsize
    check_disk(folder, sum(int(np.prod(shape)) * itemsize + 4096 for shape in shapes.values()), "the table of features")
    arrays: dict[FeatureSpec, np.ndarray] = {}
    for index, (spec, shape) in enumerate(shapes.items()):
        temporary = stack.enter_context(atomic_path(folder / f"{index}.npy"))
        arrays[spec] = np.lib.format.open_memmap(temporary, mode="w+", dtype=_DTYPES[dtype], shape=shape)
    return arrays


def _description(folder: Path) -> dict | None:
    """The description of a table, or None where there is none.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = folder / _DESCRIPTION
    if not path.is_file():
        return None
    try:
        content: dict = json.loads(path.read_text(encoding="utf-8"))
        if not {"key", "features"} <= set(content):
            raise ValueError("keys are missing")
    except ValueError as error:
        raise ArtifactError(f"`{path}` cannot be read ({error}). Delete it and read the features again.") from error
    return content
