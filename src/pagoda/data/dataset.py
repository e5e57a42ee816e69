"""What training reads: every image decoded once, at every size that the run needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pagoda.data.bad_images import BadImage, bad_images_error, label_gap_error, label_gaps
from pagoda.data.downsample import Downsampler
from pagoda.data.protocol import BadImageError, ImageSource
from pagoda.errors import ConfigError, DataError, ShapeError
from pagoda.files import atomic_path, check_disk, hash_json, write_text_atomic

_CACHE_VERSION = 1
_IN_MEMORY_BYTES = 1 << 30  # up to this much in all, pixels are kept in memory rather than read through the page cache
_logger = logging.getLogger(__name__)


class ImageDataset:
    """Images at several sizes with labels, captions and stable ids; made by `prepare_images`.

    Attributes:
        class_names: One name per label, or None without labels.
        captions: One text (or None) per image, or None when no image has one.
        sample_ids: One stable name per image.
        skipped: Images that were left out because they cannot be used (`on_bad="skip"`).
        channels: 1 or 3; of a set that networks see as latents, the channels of these.
        fingerprint: 16 hexadecimal characters over the content, the labels, the downsampler and which images were left
            out, but not over the list of sizes: asking for one more size leaves the latents of the others valid.
    """

    def __init__(
        self,
        pixels: Mapping[int, np.ndarray],
        rows: np.ndarray,
        *,
        source: ImageSource,
        downsampler: Downsampler,
        skipped: Sequence[BadImage] = (),
    ) -> None:
        """Use `prepare_images`.

        Args:
            pixels: By size, uint8 (N, C, size, size) with one row for each image of the source.
            rows: int64 (n,), the rows that may be used.
        """
        self._pixels = dict(pixels)
        self._rows = rows
        self.channels = source.channels
        self.class_names = source.class_names
        self.num_classes = source.num_classes
        self.skipped = list(skipped)
        self.sample_ids = [source.sample_id(row) for row in rows.tolist()]
        captions = [source.caption(row) for row in rows.tolist()]
        self.captions = captions if any(caption is not None for caption in captions) else None
        self._labels = _collect_labels(source, rows.tolist())
        self.fingerprint = hash_json(
            [source.fingerprint, downsampler.fingerprint, [image.sample_id for image in self.skipped]]
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes that `images` can be asked for, ascending."""
        return tuple(sorted(self._pixels))

    def images(self, indices: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
        """A batch of images.

        Args:
            indices: int64 (B,), in [0, len).
            size: One of `sizes`.
            flip: bool (B,); True mirrors the image left to right.

        Returns:
            float32 (B, C, size, size) in [-1, 1], on the CPU.

        Raises:
            ConfigError: `size` was not prepared.
            DataError: an index is out of range.
            ShapeError: `flip` has another length.
        """
        if size not in self._pixels:
            raise ConfigError(f"size {size} was not prepared; there are {self.sizes}. Ask prepare_images for it.")
        self._check_range(indices)
        batch = torch.from_numpy(self._pixels[size][self._rows[indices.numpy()]])
        if flip is not None:
            if flip.shape != indices.shape:
                raise ShapeError(
                    f"flip must have the shape of indices, {tuple(indices.shape)}, got {tuple(flip.shape)}."
                )
            batch = torch.where(flip.bool()[:, None, None, None], batch.flip(-1), batch)
        return batch.float().div_(127.5).sub_(1)

    def pictures(self, indices: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
        """What people and judges look at: `images`, unless networks see latents."""
        return self.images(indices, size, flip)

    def inputs_of(self, pictures: Tensor) -> Tensor:
        """What networks see of other pictures (B, C, H, W) in [-1, 1]: these, unless networks see latents."""
        return pictures

    @property
    def picture_channels(self) -> int:
        """Channels of `pictures`."""
        return self.channels

    def picture_size(self, size: int) -> int:
        """Side in pixels of `pictures` of a size."""
        return size

    def labels(self, indices: Tensor) -> Tensor | None:
        """Classes of images, int64 (B,), or None without labels.

        Raises:
            DataError: an index is out of range.
        """
        self._check_range(indices)
        return None if self._labels is None else self._labels[indices]

    def drop_labels(self) -> None:
        """Go on as a set without labels; the fingerprint stays that of the images with their labels."""
        self._labels, self.class_names, self.num_classes = None, None, 0

    def _check_range(self, indices: Tensor) -> None:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise DataError(
                f"image indices must lie in [0, {len(self)}), got {int(indices.min())}..{int(indices.max())}."
            )


def prepare_images(
    source: ImageSource,
    *,
    sizes: Sequence[int],
    downsampler: Downsampler,
    cache_dir: Path | str | None,
    progress: bool = True,
) -> ImageDataset:
    """Decode every image once and reduce it to every size, each directly from the original.

    Args:
        sizes: Sides in pixels.
        cache_dir: Folder for `images-<size>.npy` and its description; a later call with equal content, downsampler and
            options reads them instead of the images. None keeps everything in memory.
        progress: Show a progress bar.

    Raises:
        DataError: images cannot be used or are too small (all are named; with `on_bad="skip"` they are left out), none
            is left, or a class has no image.
        ConfigError: a size is not positive, or there is none.
        ResourceError: the cache does not fit on the disk.
    """
    wanted = sorted(set(sizes))
    if not wanted or wanted[0] < 1:
        raise ConfigError(f"sizes must be one or more positive numbers of pixels, got {list(sizes)}.")
    if len(source) == 0:
        raise DataError("the source has no images. Check the path, the split and source.filter.")
    directory = None if cache_dir is None else Path(cache_dir)
    keys = {size: _cache_key(source, downsampler, size, max(wanted)) for size in wanted}
    shapes = {size: (len(source), source.channels, size, size) for size in wanted}
    pixels: dict[int, np.ndarray] = {}
    bad: list[BadImage] = []
    if directory is not None:
        in_memory = sum(int(np.prod(shape)) for shape in shapes.values()) < _IN_MEMORY_BYTES
        for size in wanted:
            found = _read_cache(directory, size, keys[size], shapes[size], in_memory=in_memory)
            if found is not None:
                pixels[size], bad = found
    missing = {size: shapes[size] for size in wanted if size not in pixels}
    if missing:
        if directory is None:
            fresh = {size: np.zeros(shape, dtype=np.uint8) for size, shape in missing.items()}
            bad = _fill(fresh, source, downsampler, max(wanted), progress)
            pixels.update(fresh)
        else:
            bad = _write_cache(directory, missing, keys, source, downsampler, max(wanted), progress)
            for size in missing:
                written = _read_cache(directory, size, keys[size], shapes[size], in_memory=in_memory)
                assert written is not None, "the cache was written a moment ago"
                pixels[size] = written[0]
    if bad:
        _logger.warning(
            "%d of %d images are left out (source.on_bad=skip), first: %s. `pagoda data check` lists all.",
            len(bad),
            len(source),
            bad[0],
        )
    lost = {image.sample_id for image in bad}
    rows = np.array([row for row in range(len(source)) if source.sample_id(row) not in lost], dtype=np.int64)
    return ImageDataset(pixels, rows, source=source, downsampler=downsampler, skipped=bad)


def _fill(
    pixels: Mapping[int, np.ndarray], source: ImageSource, downsampler: Downsampler, largest: int, progress: bool
) -> list[BadImage]:
    """Write all images into the arrays; the rows of bad ones stay as they are.

    An image smaller than the largest size of the run is bad for all sizes, so that they share one list of rows.
    """
    bad = []
    for row in tqdm(range(len(source)), desc="reading images", unit=" images", disable=not progress, delay=1):
        try:
            image = source.image(row)
        except BadImageError as error:
            bad.append(BadImage(error.sample_id, error.reason))
            continue
        if min(image.size) < largest:
            reason = f"{image.width}x{image.height} pixels, smaller than {largest}"
            bad.append(BadImage(source.sample_id(row), reason, side=min(image.size)))
            continue
        for size, array in pixels.items():
            array[row] = downsampler(image, size).transpose(2, 0, 1)
    if bad and (source.options.on_bad == "raise" or len(bad) == len(source)):
        raise bad_images_error(bad, len(source))
    return bad


def _cache_key(source: ImageSource, downsampler: Downsampler, size: int, largest: int) -> str:
    parts: list[Any] = [_CACHE_VERSION, source.fingerprint, downsampler.fingerprint, source.channels, size]
    if source.options.on_bad == "skip":  # which images are left out depends on the largest size
        parts.append(largest)
    return hash_json(parts)


def _write_cache(
    directory: Path,
    shapes: Mapping[int, tuple[int, ...]],
    keys: Mapping[int, str],
    source: ImageSource,
    downsampler: Downsampler,
    largest: int,
    progress: bool,
) -> list[BadImage]:
    """Write `images-<size>.npy` for each size, then the descriptions that make them valid."""
    check_disk(directory, sum(int(np.prod(shape)) + 4096 for shape in shapes.values()), "the image cache")
    for size in shapes:  # an old description must not vouch for new pixels
        _sidecar(directory, size).unlink(missing_ok=True)
    with ExitStack() as stack:
        arrays = {}
        for size, shape in shapes.items():
            temporary = stack.enter_context(atomic_path(_array_file(directory, size)))
            arrays[size] = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        bad = _fill(arrays, source, downsampler, largest, progress)
        for array in arrays.values():
            array.flush()
        arrays.clear()
    for size, shape in shapes.items():
        content = {
            "key": keys[size],
            "shape": list(shape),
            "source": source.fingerprint,
            "downsampler": downsampler.kind,
            "options": source.options.content_fields(),
            "bad": [[image.sample_id, image.reason] for image in bad],
        }
        write_text_atomic(_sidecar(directory, size), json.dumps(content, indent=1))
    return bad


def _read_cache(
    directory: Path, size: int, key: str, shape: tuple[int, ...], *, in_memory: bool
) -> tuple[np.ndarray, list[BadImage]] | None:
    """The cached pixels of one size and the images left out, or None when they have to be made (again)."""
    array_file = _array_file(directory, size)
    try:
        content = json.loads(_sidecar(directory, size).read_text("utf-8"))
        if content["key"] != key:
            return None
        bad = [BadImage(sample_id, reason) for sample_id, reason in content["bad"]]
        array = np.load(array_file, mmap_mode=None if in_memory else "r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, EOFError) as error:
        _logger.warning("the cached `%s` is damaged (%s) and is made again.", array_file, error)
        return None
    return (array, bad) if array.shape == shape and array.dtype == np.uint8 else None


def _array_file(directory: Path, size: int) -> Path:
    return directory / f"images-{size}.npy"


def _sidecar(directory: Path, size: int) -> Path:
    return directory / f"images-{size}.json"


def _collect_labels(source: ImageSource, rows: Sequence[int]) -> Tensor | None:
    """Labels of the rows as one tensor; a class that no row has is refused."""
    if source.num_classes == 0:
        return None
    labels = [source.label(row) for row in rows]
    known = [label for label in labels if label is not None]
    assert len(known) == len(labels), "a source with classes labels every image"
    missing = label_gaps(known, source.num_classes)
    if missing:
        raise label_gap_error(missing, source.class_names or [str(label) for label in range(source.num_classes)])
    return torch.tensor(known, dtype=torch.int64)
