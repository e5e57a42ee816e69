"""What all shards of a store of latents agree on, and how two stores are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pagoda.errors import ArtifactError, ConfigError, ShapeError

LatentDtype = Literal["float16", "float32"]

STORE_FILE = "store.json"
"""File beside the shards that describes the store."""


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """What every shard of a store must agree on."""

    provenance: dict[str, Any]
    """What the latents were made with, as plain JSON: teacher, solver, downsampler, data set, sigma_max, ..."""
    shape: tuple[int, int, int]
    """(C, H, W) of one latent."""
    count: int
    """Number of images that have latents."""
    flips: bool
    """Whether each image's mirror image is encoded too."""
    shard_size: int
    """Rows per shard; the last one may hold fewer."""
    dtype: LatentDtype
    of: int | None = None
    """Number of images in the data set, where only `count` of them have latents; None where all have."""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ShapeError(f"the shape of a latent must be three positive numbers (C, H, W), got {self.shape}.")
        if self.count < 1 or self.shard_size < 1:
            raise ConfigError(
                f"a store needs count >= 1 and shard_size >= 1, got count={self.count}, shard_size={self.shard_size}."
            )
        if self.of is not None and self.of < self.count:
            raise ConfigError(f"{self.count} of {self.of} images cannot have latents.")
        if self.dtype not in get_args(LatentDtype):
            raise ConfigError(f"latents are stored as {' or '.join(get_args(LatentDtype))}, got {self.dtype!r}.")

    @property
    def num_rows(self) -> int:
        """Number of latents: count, or twice that with flips."""
        return self.count * (2 if self.flips else 1)

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return -(-self.num_rows // self.shard_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch has it."""
        return torch.float16 if self.dtype == "float16" else torch.float32

    def to_text(self) -> str:
        """The layout as JSON with sorted keys."""
        fields = dict(vars(self), shape=list(self.shape))
        if self.of is None:  # absent, as in stores of earlier versions
            del fields["of"]
        return json.dumps(fields, sort_keys=True)

    @staticmethod
    def from_text(text: str, name: str) -> StoreLayout:
        """The layout that `to_text` wrote.

        Raises:
            ArtifactError: it is not one; `name` says whose.
        """
        try:
            fields = json.loads(text)
            return StoreLayout(**dict(fields, shape=tuple(fields["shape"])))
        except (ValueError, KeyError, TypeError) as error:  # ConfigError and ShapeError are ValueErrors
            raise ArtifactError(
                f"`{name}` does not describe a store of latents ({error}). Delete the folder and encode again."
            ) from error


def read_layout(path: Path) -> StoreLayout:
    """The layout of the store in a folder.

    Raises:
        ArtifactError: the folder holds no store, or its description is damaged.
    """
    file = path / STORE_FILE
    if not file.is_file():
        raise ArtifactError(
            f"`{path}` holds no store of latents: `{STORE_FILE}` is missing. Run `pagoda encode` first."
        )
    try:
        return StoreLayout.from_text(file.read_text("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ArtifactError(f"`{file}` is not a text file. Delete the folder and encode again.") from error


def require_equal_layouts(found: StoreLayout, wanted: StoreLayout, name: str) -> None:
    """Raise an ArtifactError that names what differs between the layout in the file `name` and the wanted one."""
    require_equal(found.provenance, wanted.provenance, f"`{name}`")
    require_equal(
        {key: value for key, value in vars(found).items() if key != "provenance"},
        {key: value for key, value in vars(wanted).items() if key != "provenance"},
        f"`{name}`",
    )


def require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise an ArtifactError that names the keys with different values."""
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if keys:
        differences = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys)
        raise ArtifactError(
            f"{what} was made with other settings ({differences}). Use the settings it was made with, "
            "or another folder, or delete it to encode again."
        )
