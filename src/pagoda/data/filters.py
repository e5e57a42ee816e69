"""A row filter in one line of text: `skin_tone=, label in 0|3 and year>=2010`.

    filter  := clause (("," | " and ") clause)*        all must hold
    clause  := column op value | column "in" value ("|" value)*
    op      := "=" | "!=" | "<" | "<=" | ">" | ">="

A value in single or double quotes may hold commas, bars and " and "; an empty one is the empty text, which a missing
value equals too. `=` and `in` compare numbers as numbers and everything else as text; on a list they ask whether it
holds the value. `<` and its kin compare numbers; a row without a number does not pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import ConfigError, DataError, did_you_mean

_PIECE = re.compile(r"""("[^"]*"|'[^']*')|(,|\s+and\s+)|(.)""", re.DOTALL | re.IGNORECASE)
_CLAUSE = re.compile(r"\s*([^\s=!<>]+)\s*(?:(!=|<=|>=|=|<|>)|\s(in)\s)\s*(.*?)\s*", re.DOTALL | re.IGNORECASE)
_VALUE = re.compile(r"""\s*("[^"]*"|'[^']*'|[^|"']*?)\s*(?:\||$)""")


@dataclass(frozen=True)
class Clause:
    """One condition on one column; `values` has one entry unless `operator` is "in"."""

    column: str
    operator: str
    values: tuple[str, ...]

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether the row passes."""
        found = row.get(self.column)
        if self.operator in ("=", "in"):
            return any(_equal(found, value) for value in self.values)
        if self.operator == "!=":
            return not _equal(found, self.values[0])
        left, right = _number(found), float(self.values[0])
        if left is None:
            return False
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[self.operator]


def parse_filter(text: str) -> list[Clause]:
    """The clauses of a filter.

    Raises:
        ConfigError: the text does not follow the grammar.
    """
    clauses = []
    for part in _split_clauses(text):
        match = _CLAUSE.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"source.filter: cannot read {part.strip()!r} in {text!r}. "
                "Write column=value, column!=value, column<number or column in a|b, joined by commas; "
                "put a value that holds a comma in quotes."
            )
        column, operator, is_in, value = match.groups()
        operator = "in" if is_in else operator
        values = _split_values(value, text) if operator == "in" else [_unquote(value)]
        if operator in ("<", "<=", ">", ">=") and _number(values[0]) is None:
            raise ConfigError(f"source.filter: `{column}{operator}` needs a number, got {values[0]!r}.")
        clauses.append(Clause(column, operator, tuple(values)))
    return clauses


def filter_rows(rows: Sequence[Mapping[str, Any]], text: str) -> list[int]:
    """Indices of the rows that pass.

    Raises:
        ConfigError: the text is not a filter.
        DataError: a column is unknown, or no row passes.
    """
    clauses = parse_filter(text)
    columns = {column for row in rows for column in row}
    for clause in clauses:
        if clause.column not in columns:
            hint = did_you_mean(clause.column, columns) if columns else "These images have no metadata columns."
            raise DataError(f"source.filter: there is no column `{clause.column}`. {hint}")
    kept = [index for index, row in enumerate(rows) if all(clause.holds(row) for clause in clauses)]
    if not kept:
        raise DataError(
            f"source.filter: none of {len(rows):,} rows passes {text!r}. Check the values, or drop the filter."
        )
    return kept


def _split_clauses(text: str) -> list[str]:
    """Cut at commas and " and ", outside of quotes."""
    parts = [""]
    for quoted, separator, other in _PIECE.findall(text):
        if separator:
            parts.append("")
        else:
            parts[-1] += quoted or other
    return parts


def _split_values(text: str, whole: str) -> list[str]:
    """Cut at bars, outside of quotes."""
    values, position = [], 0
    while True:
        match = _VALUE.match(text, position)
        if match is None:
            raise ConfigError(f"source.filter: cannot read the values {text!r} in {whole!r}. Write a|b|c.")
        values.append(_unquote(match.group(1)))
        position = match.end()
        if not match.group(0).endswith("|"):
            return values


def _unquote(value: str) -> str:
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _equal(found: Any, value: str) -> bool:
    if isinstance(found, (list, tuple)):
        return any(_equal(element, value) for element in found) or (not found and value == "")
    text = "" if found is None else str(found)
    left, right = _number(found), _number(value)
    return text == value or (not isinstance(found, str) and left is not None and left == right)
