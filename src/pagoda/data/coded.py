"""A data set that networks see as latents of an image codec, and people as pictures: encoded once, at every size of the run.

The down-sampled image is encoded, each size by itself: the mean of a larger image's latents is not the latent of the smaller image.
Mirrors have latents of their own, since a codec's latents of a mirrored image are not the mirrored latents.

    latents-<size>.npy     float16 (N, 1 or 2, c, size, size): image, and mirror
    latents-<size>.json    what it was made from; without it the array is not whole, and is continued

Source: Kim et al. 2024, PaGoDA, arXiv:2405.14822; the latents are the means of Rombach et al. 2022, LDM, arXiv:2112.10752.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagoda.data.dataset import ImageDataset
from pagoda.errors import DataError, ShapeError
from pagoda.files import check_disk, hash_json, write_text_atomic
from pagoda.networks.codecs import ImageCodec

_CACHE_VERSION = 1
_IN_MEMORY_BYTES = 1 << 30
_BATCH = 32
"""Images that are encoded at once. Fixed: a batch of another size moves last bits, and an interrupted table would show it."""
_SAVE_EVERY = 32
"""Batches after which a table that is being made can be continued."""
_LARGEST = 1e4
"""Beyond this, latents are broken or have the wrong scale (and half precision ends at 65,504)."""
_logger = logging.getLogger(__name__)


class CodedDataset(ImageDataset):
    """Images as latents; made by `prepare_latents`. Sizes are sides of latents.

    Attributes:
        codec: What makes them.
        fingerprint: Of the pictures and the codec with its tiles.
    """

    def __init__(
        self,
        pixels: ImageDataset,
        codec: ImageCodec,
        tables: Mapping[int, np.ndarray] | None = None,
        *,
        mirrors: bool = False,
    ) -> None:
        """Use `prepare_latents`; without tables every batch is encoded when it is asked for.

        Args:
            pixels: The pictures, at `codec.factor` times the sizes.
            tables: By size, latents (N, 1 or 2, c, size, size), N = len(pixels).
            mirrors: Whether tables hold mirrors.

        Raises:
            ShapeError: pictures of other channels than the codec's.
        """
        if pixels.channels != codec.image_channels:
            raise ShapeError(
                f"the codec is for images of {codec.image_channels} channels, the data have {pixels.channels}. "
                "Set source.mode to rgb or grey, or train a codec on these images."
            )
        self.codec = codec
        self.channels = codec.latent_channels
        self.class_names, self.num_classes = pixels.class_names, pixels.num_classes
        self.skipped, self.sample_ids, self.captions = pixels.skipped, pixels.sample_ids, pixels.captions
        self.fingerprint = hash_json([pixels.fingerprint, codec.latents_fingerprint])
        self._images = pixels
        self._labels = pixels.labels(torch.arange(len(pixels)))
        self._tables = dict(tables or {})
        self._mirrors = mirrors

    def __len__(self) -> int:
        return len(self._images)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size // self.codec.factor for size in self._images.sizes)

    def images(self, indices: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
        """Latents (B, c, size, size), float32, on the CPU; of the mirrored image where `flip` is True.

        Raises:
            ConfigError: `size` was not prepared.
            DataError: an index is out of range.
            ShapeError: `flip` has another length.
        """
        table = self._tables.get(size)
        mirrored = flip is not None and bool(flip.any())
        if table is None or (mirrored and not self._mirrors):
            return self.inputs_of(self.pictures(indices, size, flip))
        self._check_range(indices)
        if flip is not None and flip.shape != indices.shape:
            raise ShapeError(f"flip must have the shape of indices, {tuple(indices.shape)}, got {tuple(flip.shape)}.")
        column = np.zeros(len(indices), dtype=np.int64) if flip is None else flip.long().numpy()
        return torch.from_numpy(table[indices.numpy(), column]).float()

    def pictures(self, indices: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
        """The pictures themselves, (B, C, size x factor, size x factor) in [-1, 1]; raises as `images`."""
        return self._images.images(indices, self.picture_size(size), flip)

    def inputs_of(self, pictures: Tensor) -> Tensor:
        """Latents of other pictures, on the CPU."""
        return encode_pictures(self.codec, pictures)

    @property
    def picture_channels(self) -> int:
        return self._images.channels

    def picture_size(self, size: int) -> int:
        return size * self.codec.factor


@torch.no_grad()
def encode_pictures(codec: ImageCodec, pictures: Tensor) -> Tensor:
    """Latents of pictures (B, C, H, W) in [-1, 1], some at once; float32, on the CPU."""
    parameter = next(codec.parameters(), None)  # a codec of pixels has none
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.cat([codec.encode(part.to(device)).float().cpu() for part in pictures.split(_BATCH)])


def prepare_latents(
    pixels: ImageDataset,
    codec: ImageCodec,
    *,
    sizes: Sequence[int],
    mirror: bool,
    cache_dir: Path,
    progress: bool = True,
) -> CodedDataset:
    """Encode every picture, and its mirror, at every size; continues where it was interrupted.

    Args:
        pixels: Prepared at `codec.factor` times the sizes.
        codec: Where it shall compute.
        sizes: Sides of the latents.
        mirror: Whether mirrors are asked for too.
        cache_dir: Where the tables are kept; tables of the same pictures, codec and sizes are read instead of made.
        progress: Show a progress bar.

    Raises:
        ShapeError: pictures of other channels than the codec's.
        DataError: latents that are not finite, or of a wrong scale.
        ResourceError: the tables do not fit on the disk.
    """
    data = CodedDataset(pixels, codec)
    shapes = {size: (len(pixels), 2 if mirror else 1, *codec.latent_shape(size * codec.factor)) for size in sizes}
    keys = {size: hash_json([_CACHE_VERSION, data.fingerprint, list(shapes[size])]) for size in sizes}
    missing = [size for size in sizes if not _is_whole(cache_dir, size, keys[size])]
    needed = sum(2 * int(np.prod(shapes[size])) for size in missing)
    check_disk(cache_dir, needed, "the latents of the images")
    for size in missing:
        _fill(data, size, shapes[size], keys[size], cache_dir, progress=progress)
    in_memory = sum(2 * int(np.prod(shape)) for shape in shapes.values()) < _IN_MEMORY_BYTES
    tables = {
        size: np.load(_array_file(cache_dir, size), mmap_mode=None if in_memory else "r", allow_pickle=False)
        for size in sizes
    }
    return CodedDataset(pixels, codec, tables, mirrors=mirror)


def _is_whole(folder: Path, size: int, key: str) -> bool:
    found = _read_facts(folder / f"latents-{size}.json")
    return found.get("key") == key and "done" not in found and _array_file(folder, size).is_file()


def _fill(data: CodedDataset, size: int, shape: tuple[int, ...], key: str, folder: Path, *, progress: bool) -> None:
    """Encode in order; every so often what is on the disk is made to last and its count written beside it."""
    path, facts = _array_file(folder, size), folder / f"latents-{size}.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = _read_facts(facts)
    done = int(before.get("done", 0)) if before.get("key") == key and path.is_file() else 0
    if done:
        array = np.load(path, mmap_mode="r+", allow_pickle=False)
    else:
        facts.unlink(missing_ok=True)  # an old description must not vouch for new latents
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    bar = tqdm(
        total=shape[0],
        initial=done,
        desc=f"encoding images of {data.picture_size(size)} px",
        unit=" images",
        disable=not progress,
    )
    for number, rows in enumerate(torch.arange(done, shape[0]).split(_BATCH), 1):
        for column in range(shape[1]):
            flip = torch.full(rows.shape, bool(column))
            latents = data.images(rows, size, flip)
            largest = float(latents.abs().amax())
            if not largest < _LARGEST:
                raise DataError(
                    f"the codec gives latents up to {largest:.3g} at {size * data.codec.factor} px; they should be near 1. Measure its "
                    "scale anew (`pagoda codec scale CODEC DATA`, or `ImageCodec.fit_scale`), or use another codec."
                )
            array[rows.numpy(), column] = latents.numpy()
        bar.update(len(rows))
        if number % _SAVE_EVERY == 0:
            array.flush()
            write_text_atomic(facts, json.dumps({"key": key, "done": int(rows[-1]) + 1}))
    array.flush()
    bar.close()
    write_text_atomic(facts, json.dumps({"key": key, "shape": list(shape), "codec": data.codec.fingerprint}))


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _logger.warning("%s cannot be read (%s): the latents are made again.", path, error)
        return {}


def _array_file(folder: Path, size: int) -> Path:
    return folder / f"latents-{size}.npy"
