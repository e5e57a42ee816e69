"""From a metadata column to class numbers without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.data.bad_images import label_gap_error, label_gaps
from pagoda.errors import DataError, did_you_mean

_NAME_COLUMNS = ("label_name", "class_name", "class", "category", "group")


@dataclass(frozen=True)
class Labels:
    """Class of each row that passed the filter, and a name for each class."""

    values: list[int]
    names: list[str]


def read_labels(
    rows: Sequence[dict[str, Any]],
    kept: Sequence[int],
    *,
    column: str | None,
    compact: bool,
    names: Sequence[str] | None = None,
) -> Labels | None:
    """Labels of the kept rows.

    Whole numbers (also as text) are taken as they are, and their names are the numbers, or the values of a column such
    as `group` that says the same in words. Other text is numbered in sorted order. Classes are those of *all* rows: a
    filter that empties one leaves a gap, which is refused unless `compact`.

    Args:
        rows: All rows.
        kept: Which of them passed the filter.
        column: Where the labels are; None takes `label` if there is one.
        compact: Number the classes of the kept rows 0, 1, 2, ... in order.
        names: Class names, known beforehand; then labels are these names, or indices into them.

    Returns:
        None when there are no labels.

    Raises:
        DataError: the column is unknown, a row has no label, a label is negative or of another type, or labels have gaps.
    """
    columns = {name for row in rows for name in row}
    if column is None and "label" not in columns:
        return None
    column = column or "label"
    if column not in columns:
        raise DataError(f"source.label_column: there is no column `{column}`. {did_you_mean(column, columns)}")
    found = [row.get(column) for row in rows]
    empty = [index for index in kept if found[index] is None or found[index] == ""]
    if empty:
        raise DataError(
            f"{len(empty):,} of {len(kept):,} rows have no value in the label column `{column}`, first row {empty[0]}. "
            f"Fill it in, or leave them out with source.filter: `{column}!=`."
        )
    numbers = [_whole_number(value) for value in found]
    if names is not None:
        place = {name: label for label, name in enumerate(names)}
        values = [place.get(value) if isinstance(value, str) else _whole_number(value) for value in found]
        class_names = list(names)
    elif all(numbers[index] is not None for index in kept):
        values = numbers
        least = min(value for value in values if value is not None)
        if least < 0:
            raise DataError(
                f"labels in `{column}` must be 0, 1, 2, ..., got {least}. Filter these rows out: `{column}>=0`."
            )
        count = 1 + max(value for value in values if value is not None)
        if count > 100 * len(rows) + 1000:  # ids rather than classes; a table of this size would not fit in memory
            raise DataError(
                f"labels in `{column}` go up to {count - 1:,}, with {len(rows):,} rows. Choose a column of classes."
            )
        class_names = _names_in_words(rows, values, count)
    elif all(isinstance(found[index], str) for index in kept):
        class_names = sorted({value for value in found if isinstance(value, str) and value})
        place = {name: label for label, name in enumerate(class_names)}
        values = [place.get(value) if isinstance(value, str) else None for value in found]
    else:
        kinds = sorted({type(found[index]).__name__ for index in kept})
        raise DataError(
            f"labels in `{column}` must be all whole numbers or all text, got {', '.join(kinds)}. Choose another column."
        )
    chosen = [values[index] for index in kept]
    labels = [value for value in chosen if value is not None and 0 <= value < len(class_names)]
    if len(labels) < len(chosen):
        raise DataError(f"a label in `{column}` is not one of the {len(class_names)} classes. Correct the metadata.")
    missing = label_gaps(labels, len(class_names))
    if missing and not compact:
        raise label_gap_error(missing, class_names)
    present = [label for label in range(len(class_names)) if label not in set(missing)]
    renumber = {label: number for number, label in enumerate(present)}
    return Labels([renumber[label] for label in labels], [class_names[label] for label in present])


def _whole_number(value: Any) -> int | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    return None


def _names_in_words(rows: Sequence[dict[str, Any]], labels: Sequence[int | None], count: int) -> list[str]:
    """Class names from a column with one text per label and one label per text, else the numbers themselves."""
    for column in _NAME_COLUMNS:
        pairs = {(label, row.get(column)) for label, row in zip(labels, rows, strict=True) if label is not None}
        texts = {text for _, text in pairs}
        if len(pairs) == len({label for label, _ in pairs}) == len(texts) and all(
            isinstance(t, str) and t for t in texts
        ):
            named = {label: str(text) for label, text in pairs}
            return [named.get(label, str(label)) for label in range(count)]
    return [str(label) for label in range(count)]
