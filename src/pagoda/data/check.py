"""Open every image once, before the long work starts, and name all that is wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pagoda.data.bad_images import BadImage, bad_images_error, label_gap_error, label_gaps
from pagoda.data.decode import has_colour
from pagoda.data.folder import FolderSource
from pagoda.data.protocol import BadImageError, ImageSource
from pagoda.data.table import TableSource
from pagoda.errors import ConfigError, DataError

_LISTED = 20  # in the text for people; the JSON lists all


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found in a source of images."""

    total: int
    """Number of images looked at."""
    size: int
    """Side in pixels that every image must have at least."""
    min_images: int
    """Number of usable images that is needed at least."""
    bad: list[BadImage] = field(default_factory=list)
    """Every image that cannot be used."""
    classes: dict[str, int] = field(default_factory=dict)
    """Usable images of each class, by name; empty without labels."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Usable images of each size, "128x128", most frequent first."""
    modes: dict[str, int] = field(default_factory=dict)
    """Usable images with and without colour: "colour", "grey"."""
    channels: int = 3
    """1 when the images will be used as grey ones, 3 as RGB."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of images with exactly the same pixels."""
    missing_captions: list[str] = field(default_factory=list)
    """Usable images without a caption, when captions are needed."""
    need_captions: bool = False
    """Whether captions are needed."""
    skip_bad: bool = False
    """Whether bad images are to be left out (`on_bad="skip"`) rather than to stop the run."""

    @property
    def usable(self) -> int:
        """Number of images that can be used."""
        return self.total - len(self.bad)

    @property
    def empty_classes(self) -> list[str]:
        """Names of the classes without a usable image."""
        return [name for name, count in self.classes.items() if count == 0]

    @property
    def notice(self) -> str | None:
        """What becomes of images that are not square; None where all are."""
        sides = {tuple(map(int, name.split("x"))): count for name, count in self.sizes.items()}
        cut = sum(count for (width, height), count in sides.items() if width != height)
        if not cut:
            return None
        shares = [count * (1 - min(side) / max(side)) for side, count in sides.items()]
        return (
            f"{cut:,} of {self.usable:,} images are not square: their centre is used, which leaves out "
            f"{sum(shares) / cut:.0%} of each in the mean. source.pad=N centres images on a square of N pixels instead."
        )

    def raise_if_bad(self) -> None:
        """Stop here unless training could start.

        Raises:
            DataError: images cannot be used and are not to be skipped, too few are left, a class is empty, or captions
                are needed and missing.
        """
        if self.bad and not (self.skip_bad and self.usable):
            raise bad_images_error(self.bad, self.total)
        if self.usable < self.min_images:
            raise DataError(
                f"{self.usable:,} usable images are too few to train on; at least {self.min_images:,} are needed. "
                "Add images, or loosen source.filter."
            )
        if self.empty_classes:
            names = list(self.classes)
            present = [label for label, name in enumerate(names) if self.classes[name] > 0]
            raise label_gap_error(label_gaps(present, len(names)), names)
        if self.missing_captions:
            raise DataError(
                f"{len(self.missing_captions):,} of {self.usable:,} images have no caption, first "
                f"`{self.missing_captions[0]}`. Write one in the `text` column of the metadata, name another "
                "source.caption_column, or train on labels."
            )

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.total:,} images, {self.usable:,} usable, as {'grey' if self.channels == 1 else 'RGB'}"]
        if self.classes:
            lines.append(f"classes ({len(self.classes)}):")
            lines += [f"  {label:>4} {name}: {count:,}" for label, (name, count) in enumerate(self.classes.items())]
        else:
            lines.append("no labels")
        lines.append("sizes: " + _counts(self.sizes))
        if self.notice:
            lines.append(self.notice)
        if len(self.modes) > 1:
            lines.append(f"mixed modes: {_counts(self.modes)}")
        if self.duplicates:
            count = sum(len(group) - 1 for group in self.duplicates)
            lines.append(f"exact copies ({count:,}):")
            lines += ["  " + " = ".join(group) for group in self.duplicates[:_LISTED]]
        if self.missing_captions:
            lines.append(f"without caption ({len(self.missing_captions):,}):")
            lines += [f"  {name}" for name in self.missing_captions[:_LISTED]]
        if self.bad:
            lines.append(f"cannot be used ({len(self.bad):,}):")
            lines += [f"  {image}" for image in self.bad]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return dict(asdict(self), usable=self.usable, empty_classes=self.empty_classes)


def check_source(
    source: ImageSource,
    *,
    size: int,
    min_images: int = 16,
    need_captions: bool = False,
    progress: bool = True,
) -> CheckReport:
    """Open every image of a source.

    Args:
        size: Side in pixels that images must have at least, usually the largest size of the run.
        min_images: Number of usable images that is needed at least.
        need_captions: Whether an image without a caption is a fault.
        progress: Show a progress bar.

    Returns:
        The report, also when there is much to complain about: `raise_if_bad` is the judgement.

    Raises:
        ConfigError: `size` or `min_images` is not positive.
    """
    if size < 1 or min_images < 1:
        raise ConfigError(f"the check needs size >= 1 and min_images >= 1, got size={size}, min_images={min_images}.")
    bad: list[BadImage] = []
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    copies: dict[bytes, list[str]] = {}
    missing_captions = []
    for index in tqdm(range(len(source)), desc="checking images", unit=" images", disable=not progress, delay=1):
        name = source.sample_id(index)
        try:
            image = source.image(index)
            coloured = _is_coloured(source, index, image)
        except BadImageError as error:
            bad.append(BadImage(error.sample_id, error.reason))
            continue
        if min(image.size) < size:
            reason = f"{image.width}x{image.height} pixels, smaller than {size}"
            bad.append(BadImage(name, reason, side=min(image.size)))
            continue
        sizes[f"{image.width}x{image.height}"] += 1
        modes["colour" if coloured else "grey"] += 1
        label = source.label(index)
        if label is not None:
            classes[label] += 1
        digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
        copies.setdefault(digest, []).append(name)
        if need_captions and source.caption(index) is None:
            missing_captions.append(name)
    return CheckReport(
        total=len(source),
        size=size,
        min_images=min_images,
        bad=bad,
        classes=_by_name(classes, source.class_names),
        sizes=dict(sizes.most_common()),
        modes=dict(modes.most_common()),
        channels=source.channels,
        duplicates=[group for group in copies.values() if len(group) > 1],
        missing_captions=missing_captions,
        need_captions=need_captions,
        skip_bad=source.options.on_bad == "skip",
    )


def move_bad(report: CheckReport, source: ImageSource, folder: Path | str) -> list[Path]:
    """Move the files of the bad images out of a folder of images, keeping their subfolders.

    Rows of a metadata file stay as they are, so the file is to be mended by hand; missing files are left out.

    Returns:
        Where the files lie now.

    Raises:
        DataError: the source is not a folder, or `folder` holds a file of the same name, or lies inside of the source.
    """
    if not isinstance(source, FolderSource):
        raise DataError(
            f"bad images can only be moved out of a folder, not out of {type(source).__name__}. "
            'Unpack it first, or set source.on_bad="skip".'
        )
    target = Path(folder)
    if target.resolve().is_relative_to(source.path.resolve()):
        raise DataError(
            f"`{target}` lies inside of `{source.path}`, where its images would count. Choose another folder."
        )
    place = {source.sample_id(index): source.file_path(index) for index in range(len(source))}
    moves = [(place[image.sample_id], target / image.sample_id) for image in report.bad]
    moves = [(old, new) for old, new in moves if old.exists()]
    taken = [new for _, new in moves if new.exists()]
    if taken:
        raise DataError(f"`{taken[0]}` is there already, and nothing was moved. Choose an empty folder.")
    for old, new in moves:
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(os.fspath(old), os.fspath(new))
    return [new for _, new in moves]


def _is_coloured(source: ImageSource, index: int, image: Image.Image) -> bool:
    """Whether the image had colour before all were made alike."""
    if image.mode == "L" and isinstance(source, TableSource):
        return source.original_mode(index) == "RGB"
    return has_colour(image)


def _by_name(classes: Counter[int], names: list[str] | None) -> dict[str, int]:
    """Counts by class name; two classes of one name are told apart by their number."""
    if names is None:
        return {}
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return {
        (f"{name} ({label})" if name in repeated else name): classes.get(label, 0) for label, name in enumerate(names)
    }


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name}: {count:,}" for name, count in list(counts.items())[:_LISTED])
    return shown + (f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else "") if counts else "none"
