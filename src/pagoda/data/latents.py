"""The store of encoded images: one unit-scale latent for each image and, when asked for, for its mirror image.

A folder of safetensors shards beside a `store.json`. Each shard is whole or absent and carries the provenance of the
store, so that encoding can stop anywhere and go on, and latents of two teachers can never be mixed. A store can hold the latents of
some images of a data set only; images are then still asked for by their place in the data set:

    store.json                              provenance, shape, count, flips, shard size, dtype
    latents-00001-of-00012.safetensors      z (R, C, H, W), index (R,), flip (R,), guidance (R,) when there is one

UNIT SCALE: `z` is the ODE state at sigma_max divided by sigma_max, so its standard deviation is about 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagoda.data.latent_layout import (
    STORE_FILE,
    LatentDtype,
    StoreLayout,
    read_layout,
    require_equal,
    require_equal_layouts,
)
from pagoda.data.moments import LatentMoments, MomentSums
from pagoda.errors import ArtifactError, DataError, ShapeError
from pagoda.files import check_disk, load_tensors, refuse_foreign, save_tensors, write_text_atomic

_METADATA_KEY = "pagoda_latents"
_IN_MEMORY_BYTES = 1 << 30  # as for images: more is read through the page cache
_FOREIGN_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".npz", ".npy"}


class LatentStore:
    """Latents by (image, mirrored or not). Made by `create` and filled, or opened whole and verified by `open`.

    Row `r` of the store is image `images[r // 2]`, mirrored when `r % 2` is 1; without flips it is image `images[r]`.
    """

    def __init__(self, path: Path | str, layout: StoreLayout, images: Tensor | None = None) -> None:
        """Use `create` or `open`."""
        self.path = Path(path)
        self.layout = layout
        self._images = images
        self._latents: list[Tensor] | None = None  # in one piece, or a mapped file for each shard
        self._guidance: Tensor | None = None
        self._moments: LatentMoments | None = None

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        provenance: Mapping[str, Any],
        shape: tuple[int, int, int],
        count: int,
        flips: bool,
        shard_size: int = 2048,
        dtype: LatentDtype = "float16",
        images: Tensor | None = None,
    ) -> LatentStore:
        """Start a store in the folder `path`, or continue the one that is there.

        Args:
            provenance: What the latents are made with; plain JSON values. Must be equal to continue.
            shape: (C, H, W) of one latent.
            count: Number of images in the data set.
            flips: Whether mirrored images are encoded too.
            images: Rising int64 (K,), the images that get latents; None for all.

        Raises:
            ArtifactError: the folder holds a store of something else (the keys that differ are named), or other files.
            ResourceError: the whole store does not fit on the disk.
            ConfigError, ShapeError: an argument is out of range.
        """
        if images is not None:
            _check_images(images, count)
        layout = StoreLayout(
            provenance=json.loads(json.dumps(dict(provenance), allow_nan=False)),  # tuples become lists, as when read
            shape=(int(shape[0]), int(shape[1]), int(shape[2])),
            count=count if images is None else len(images),
            flips=flips,
            shard_size=shard_size,
            dtype=dtype,
            of=None if images is None else count,
        )
        store = cls(path, layout, images)
        if (store.path / STORE_FILE).is_file():
            require_equal_layouts(read_layout(store.path), layout, str(store.path))
        store._refuse_foreign_files()
        values = layout.shape[0] * layout.shape[1] * layout.shape[2]
        missing = min(len(store.missing_shards()) * layout.shard_size, layout.num_rows)
        check_disk(store.path, missing * (values * layout.torch_dtype.itemsize + 13), "the store of latents")
        if not (store.path / STORE_FILE).is_file():
            write_text_atomic(store.path / STORE_FILE, layout.to_text())
        return store

    @classmethod
    def open(cls, path: Path | str, expect: Mapping[str, Any] | None = None) -> LatentStore:
        """Open a complete store, after reading and checking every shard.

        Up to a gibibyte of latents is kept in memory; more stay in their files and are read through the page cache.

        Args:
            expect: Provenance values that the store must have; it may have others besides.

        Raises:
            ArtifactError: there is no store; shards are missing, truncated, foreign, or of another store; a value is not
                finite; or the provenance is not the expected one.
        """
        store = cls(path, read_layout(Path(path)))
        if expect is not None:
            wanted = json.loads(json.dumps(dict(expect)))
            found = {key: value for key, value in store.provenance.items() if key in wanted}
            require_equal(found, wanted, f"the latents in `{store.path}`")
        store._refuse_foreign_files()
        missing = store.missing_shards()
        if missing:
            raise ArtifactError(
                f"`{store.path}` is not complete: {len(missing)} of {store.num_shards} shards are missing, first "
                f"`{store.shard_path(missing[0]).name}`. Run the same encoding again; it makes only the missing ones."
            )
        store._load()
        return store

    @property
    def provenance(self) -> dict[str, Any]:
        """What the latents were made with."""
        return self.layout.provenance

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.layout.shape

    @property
    def flips(self) -> bool:
        """Whether mirrored images are encoded too."""
        return self.layout.flips

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return self.layout.num_shards

    @property
    def images(self) -> Tensor:
        """Places in the data set of the images that have latents, rising int64 (len,)."""
        if self._images is None:
            self._images = torch.arange(len(self)) if self.layout.of is None else self._read_images()
        return self._images

    def __len__(self) -> int:
        """Number of images that have latents, not counting mirror images."""
        return self.layout.count

    def shard_path(self, shard: int) -> Path:
        """File of shard `shard`, counted from 0 here and from 1 in the name.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} is outside of the {self.num_shards} shards of `{self.path}`.")
        return self.path / f"latents-{shard + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def shard_rows(self, shard: int) -> tuple[Tensor, Tensor]:
        """Which (image, mirrored) each row of a shard holds: int64 (R,), uint8 (R,)."""
        rows = shard * self.layout.shard_size + torch.arange(self.num_rows(shard))
        if not self.flips:
            return self.images[rows], torch.zeros(len(rows), dtype=torch.uint8)
        return self.images[rows // 2], (rows % 2).to(torch.uint8)

    def num_rows(self, shard: int) -> int:
        """Number of latents in a shard."""
        return min(self.layout.shard_size, self.layout.num_rows - shard * self.layout.shard_size)

    def missing_shards(self) -> list[int]:
        """Shards that are still to be written.

        Raises:
            ArtifactError: one that is there is truncated, foreign, or of another store.
        """
        missing = []
        for shard in range(self.num_shards):
            if self.shard_path(shard).is_file():
                self._check_header(shard)
            else:
                missing.append(shard)
        return missing

    @property
    def complete(self) -> bool:
        """Whether every shard has been written."""
        return not self.missing_shards()

    def write_shard(self, shard: int, z: Tensor, guidance: Tensor | None = None) -> None:
        """Write one shard, atomically.

        Args:
            z: (R, C, H, W), unit scale, rows in the order of `shard_rows(shard)`.
            guidance: (R,) guidance weight that each latent was made with, when the encoder was guided.

        Raises:
            ShapeError: a tensor has another shape.
            DataError: a latent is not finite, in the stored precision.
        """
        index, flip = self.shard_rows(shard)
        if z.shape != (len(index), *self.shape):
            raise ShapeError(f"shard {shard} holds z of shape {(len(index), *self.shape)}, got {tuple(z.shape)}.")
        if guidance is not None and guidance.shape != (len(index),):
            raise ShapeError(f"shard {shard} holds {len(index)} guidance weights, got shape {tuple(guidance.shape)}.")
        stored = z.detach().to("cpu", self.layout.torch_dtype).contiguous()
        bad = (~stored.flatten(1).isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise DataError(
                f"{len(bad)} of {len(index)} latents are not finite as {self.layout.dtype}, first that of image "
                f"{int(index[bad[0]])}. The teacher diverges on it: look at the image, or use more solver steps."
            )
        tensors = {"z": stored, "index": index, "flip": flip}
        if guidance is not None:
            tensors["guidance"] = guidance.detach().to("cpu", torch.float32)
        # One metadata key only: safetensors writes several in random order, and a resumed store is to be bit-identical.
        save_tensors(self.shard_path(shard), tensors, {_METADATA_KEY: self.layout.to_text()})

    def get(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Latents of images.

        Args:
            indices: int64 (B,), places in the data set.
            flips: bool or integer (B,), True for the mirror image; None for none.

        Returns:
            (B, C, H, W) float32 of unit scale.

        Raises:
            DataError: an index is out of range, or an image, or mirror images, were not encoded.
        """
        latents, rows = self._opened(), self.rows(indices, flips)
        if len(latents) == 1:
            return latents[0][rows].float()
        found = torch.empty((len(rows), *self.shape), dtype=torch.float32)
        shards = rows // self.layout.shard_size
        for shard in shards.unique().tolist():
            own = shards == shard
            found[own] = latents[shard][rows[own] - shard * self.layout.shard_size].float()
        return found

    def guidance(self, indices: Tensor, flips: Tensor | None = None) -> Tensor | None:
        """Guidance weights (B,) float32 that the latents were made with, or None when the encoder was not guided."""
        self._opened()
        return None if self._guidance is None else self._guidance[self.rows(indices, flips)]

    def moments(self) -> LatentMoments:
        """Statistics over the whole store."""
        self._opened()
        assert self._moments is not None
        return self._moments

    def check_moments(self, low: float = 0.5, high: float = 2.0) -> None:
        """Refuse latents that are not of unit scale; a wrong factor would only show as washed-out images.

        Raises:
            ArtifactError: the root mean square over the store is outside [low, high].
        """
        rms = self.moments().rms
        if not low <= rms <= high:
            raise ArtifactError(
                f"the latents in `{self.path}` have a root mean square of {rms:.4g}; accepted is {low:g} to {high:g}. "
                "Stored latents have unit scale: z / sigma_max. If they were made elsewhere, divide by sigma_max; if they were made "
                "by `encode`, the teacher is too weak: train it for longer (teach.loop.steps), with another --out."
            )

    def _opened(self) -> list[Tensor]:
        if self._latents is None:
            raise ArtifactError(f"`{self.path}` is being written. Read it with LatentStore.open, once it is complete.")
        return self._latents

    def rows(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Rows of the store, int64 (B,), that hold images and their mirrors.

        Raises:
            DataError: as `get`.
        """
        indices = indices.to("cpu", torch.int64)
        total = len(self) if self.layout.of is None else self.layout.of
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < total:
            raise DataError(f"image indices must lie in [0, {total}), got {int(indices.min())}..{int(indices.max())}.")
        if self.layout.of is not None:
            found = torch.searchsorted(self.images, indices).clamp(max=len(self) - 1)
            missing = indices[self.images[found] != indices]
            if len(missing):
                raise DataError(
                    f"image {int(missing[0])} has no latent in `{self.path}`: {len(self)} of {total} images were encoded. Raise "
                    "encode.share, or ask for others (`images`)."
                )
            indices = found
        if not self.flips:
            if flips is not None and bool(flips.any()):
                raise DataError(
                    f"`{self.path}` has no latents of mirror images. Encode with flips, or train without them."
                )
            return indices
        return 2 * indices if flips is None else 2 * indices + flips.to("cpu").bool().long()

    def _read_images(self) -> Tensor:
        """What the shards say of which images they hold.

        Raises:
            ArtifactError: not rising places in the data set.
        """
        parts = [load_tensors(self.shard_path(shard))[0]["index"] for shard in range(self.num_shards)]
        images = torch.cat(parts)[:: 2 if self.flips else 1].clone()  # not a view of a mapped file
        try:
            assert self.layout.of is not None
            _check_images(images, self.layout.of)
        except DataError as error:
            raise ArtifactError(f"the shards in `{self.path}` do not fit together ({error}). Encode again.") from error
        return images

    def _load(self) -> None:
        """Read and check every shard, and keep it or where it lies."""
        layout, kind = self.layout, self.layout.torch_dtype
        small = layout.num_rows * math.prod(self.shape) * kind.itemsize <= _IN_MEMORY_BYTES
        whole = torch.empty((layout.num_rows, *self.shape), dtype=kind) if small else None
        mapped: list[Tensor] = []
        guidance: list[Tensor | None] = []
        sums = MomentSums(self.shape[0])
        for shard in range(self.num_shards):
            path = self.shard_path(shard)
            tensors, _ = load_tensors(path)
            index, flip = self.shard_rows(shard)
            if not (torch.equal(tensors["index"], index) and torch.equal(tensors["flip"], flip)):
                raise ArtifactError(f"`{path}` holds other images than its place says. Delete it and encode again.")
            z = tensors["z"]
            if not bool(z.isfinite().all()):
                raise ArtifactError(f"`{path}` holds values that are not finite. Delete it and encode again.")
            if whole is None:
                mapped.append(z)  # safetensors maps the file: nothing of it stays in memory that is needed elsewhere
            else:
                start = shard * layout.shard_size
                whole[start : start + len(z)] = z
            sums.add(z)
            guidance.append(tensors.get("guidance"))
        weights = [weight for weight in guidance if weight is not None]
        if len(weights) not in (0, len(guidance)):
            raise ArtifactError(
                f"only some shards of `{self.path}` carry guidance weights. Delete the folder, encode again."
            )
        self._latents, self._moments = mapped if whole is None else [whole], sums.result()
        self._guidance = torch.cat(weights) if weights else None

    def _check_header(self, shard: int) -> None:
        """A shard's file is whole, of this store, and of the right shapes; its values are not read."""
        path = self.shard_path(shard)
        refuse_foreign(path)
        rows = self.num_rows(shard)  # which images these are is known once all shards are there
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArtifactError(
                f"`{path}` is truncated or not a safetensors file ({error}). Delete it and run the same encoding again."
            ) from error
        if text is None:
            raise ArtifactError(f"`{path}` was not written as a shard of latents. Move it away and encode again.")
        require_equal_layouts(StoreLayout.from_text(text, str(path)), self.layout, str(path))
        expected = {"z": (rows, *self.shape), "index": (rows,), "flip": (rows,)}
        if {name: found.get(name) for name in expected} != expected:
            raise ArtifactError(f"`{path}` holds {found} where {expected} belongs. Delete it and encode again.")

    def _refuse_foreign_files(self) -> None:
        """No other shards and no pickles in the folder: they would be taken for part of the store by people."""
        if not self.path.is_dir():
            return
        refuse_pickles(self.path)
        own = {self.shard_path(shard).name for shard in range(self.num_shards)}
        for entry in sorted(self.path.glob("[!.]*.safetensors")):
            if entry.name not in own:
                raise ArtifactError(
                    f"`{entry}` does not belong to the store of latents in its folder, which has {self.num_shards} shards. "
                    "Move it away."
                )


def _check_images(images: Tensor, count: int) -> None:
    """Raise a DataError unless these are rising places in a data set of `count` images, one at least."""
    if not len(images) or int(images[0]) < 0 or int(images[-1]) >= count or not bool((images.diff() > 0).all()):
        raise DataError(f"the images that get latents must be different, rising, and lie in [0, {count}).")


def refuse_pickles(path: Path) -> None:
    """Look through a folder of latents, which need not exist yet, for files that are never read.

    Raises:
        ArtifactError: there is a pickle, an archive of arrays, or the like; it is named.
    """
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.suffix in _FOREIGN_SUFFIXES and not entry.name.startswith("."):
            raise ArtifactError(
                f"`{entry}` does not belong into a store of latents, whose shards are safetensors. Move it away; pickles are never "
                "read."
            )
