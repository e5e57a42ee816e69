"""Row filters and class numbers."""

from __future__ import annotations

from typing import Any

import pytest

from pagoda.data.filters import filter_rows
from pagoda.data.labels import read_labels
from pagoda.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"tone": "", "year": 1999, "tags": ["a", "b"], "name": "x"},
    {"tone": "light", "year": 2005, "tags": [], "name": "y"},
    {"tone": "light,dark", "year": "2010", "tags": ["b"], "name": "x and y"},
    {"tone": None, "year": None, "name": "a|b"},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tone=", [0, 3]),
        ("tone!=", [1, 2]),
        ("tone=light", [1]),
        ("tone='light,dark'", [2]),
        ('name="x and y"', [2]),
        ("year<2005", [0]),
        ("year<=2005", [0, 1]),
        ("year > 1999, tone=light", [1]),
        ("year>=1999 and tone=light", [1]),
        ("year=2010", [2]),
        ("year = 2005.0", [1]),
        ("name in x|y", [0, 1]),
        ("name in 'a|b'|y", [1, 3]),
        ("tone in |light", [0, 1, 3]),
        ("tags=b", [0, 2]),
        ("tags=", [1, 3]),
    ],
)
def test_filters_keep_the_rows_where_they_hold(text: str, expected: list[int]) -> None:
    assert filter_rows(ROWS, text) == expected


@pytest.mark.parametrize("text", ["", "tone", "tone light", "=3", "year<old", "tone=light, dark", "name in 'a"])
def test_what_is_not_a_filter_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.filter"):
        filter_rows(ROWS, text)


def test_unknown_columns_and_empty_results_are_named() -> None:
    with pytest.raises(DataError, match=r"no column `yaer`\. Did you mean `year`"):
        filter_rows(ROWS, "yaer=3")
    with pytest.raises(DataError, match="none of 4 rows passes 'year>3000'"):
        filter_rows(ROWS, "year>3000")
    with pytest.raises(DataError, match="no metadata columns"):
        filter_rows([{}], "year>3000")


def labels(values: list[Any], *, kept: list[int] | None = None, compact: bool = False, **extra: list[Any]) -> Any:
    rows = [{"label": value, **{k: v[i] for k, v in extra.items()}} for i, value in enumerate(values)]
    return read_labels(rows, range(len(rows)) if kept is None else kept, column=None, compact=compact)


def test_whole_numbers_are_kept_and_text_is_numbered_in_sorted_order() -> None:
    assert labels([2, 0, 1]).values == [2, 0, 1]
    assert labels(["10", *map(str, range(10))]).values == [10, *range(10)]  # not in the order of text
    found = labels(["dog", "cat", "dog"])
    assert (found.values, found.names) == ([1, 0, 1], ["cat", "dog"])
    assert read_labels([{"a": 1}], [0], column=None, compact=False) is None


def test_a_column_that_says_the_same_in_words_names_the_classes() -> None:
    assert labels([1, 0, 1], group=["b", "a", "b"]).names == ["a", "b"]
    assert labels([1, 0, 1], group=["b", "a", "c"]).names == ["0", "1"]
    assert labels([1, 0, 2], group=["b", "a", "b"]).names == ["0", "1", "2"]


def test_gaps_are_refused_with_the_missing_classes_or_closed_when_asked() -> None:
    with pytest.raises(DataError, match=r"no image has class 1, 2, of 4 classes .*compact_labels"):
        labels([0, 3, 0])
    found = labels([0, 3, 0], compact=True)
    assert (found.values, found.names) == ([0, 1, 0], ["0", "3"])


def test_a_filter_that_empties_a_class_leaves_a_gap() -> None:
    for values in ([0, 1, 2], ["a", "b", "c"]):
        with pytest.raises(DataError, match="no image has class 2"):
            labels(values, kept=[0, 1])
        assert labels(values, kept=[0, 1], compact=True).values == [0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, -1], "must be 0, 1, 2"),
        ([0, "a"], "all whole numbers or all text, got int, str"),
        ([0.5, 1.0], "all whole numbers or all text"),
        ([0, None], "1 of 2 rows have no value"),
        ([0, 10**9], "Choose a column of classes"),
    ],
)
def test_unusable_labels_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels(values)


def test_an_unknown_label_column_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no column `labl`\. Did you mean `label`"):
        read_labels([{"label": 1}], [0], column="labl", compact=False)
