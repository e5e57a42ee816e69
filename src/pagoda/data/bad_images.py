"""How unusable images are reported, in one form everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagoda.errors import DataError

_NAMED = 20  # in a message; a report lists all


@dataclass(frozen=True)
class BadImage:
    """One image that cannot be used, and why."""

    sample_id: str
    reason: str
    side: int | None = None
    """Smaller side in pixels of an image that is only too small; None for other reasons."""

    def __str__(self) -> str:
        return f"{self.sample_id} ({self.reason})"


def bad_images_error(bad: Sequence[BadImage], total: int) -> DataError:
    """The error that names the bad images, the first twenty of them, and the next step."""
    names = ", ".join(str(image) for image in bad[:_NAMED])
    more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    good = total - len(bad)
    skip = f', or set source.on_bad="skip" to train on the other {good:,}' if good else ""
    sides = [image.side for image in bad if image.side is not None]
    smaller = (
        f"  A size of {min(sides)} pixels or less takes the {len(sides):,} that are only too small.\n" if sides else ""
    )
    return DataError(
        f"{len(bad):,} of {total:,} images cannot be used: {names}{more}.\n{smaller}"
        f"  Run `pagoda data check DATA --move-bad FOLDER` to move them away{skip}."
    )


def label_gaps(labels: Iterable[int], num_classes: int) -> list[int]:
    """Classes of [0, num_classes) that no image has."""
    return sorted(set(range(num_classes)) - set(labels))


def label_gap_error(missing: Sequence[int], class_names: Sequence[str]) -> DataError:
    """The error for classes without a single image: a network would have a class that it never learns."""
    names = ", ".join(
        f"{label} ({class_names[label]})" if class_names[label] != str(label) else str(label) for label in missing
    )
    return DataError(
        f"labels have gaps: no image has class {names}, of {len(class_names)} classes 0 to {len(class_names) - 1}. "
        "Add images of these classes, choose another source.label_column or source.filter, "
        "or set source.compact_labels=true to number the classes that are there 0, 1, 2, ..."
    )
