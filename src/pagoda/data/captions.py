"""A file of captions beside the images: one JSON object a line with `file_name` and `text`, as `pagoda data caption` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pagoda.errors import DataError


def read_captions(path: Path | str, names: Sequence[str]) -> dict[str, str]:
    """Captions by the name of their image.

    Args:
        path: The file.
        names: Of the images that are there.

    Raises:
        DataError: the file is missing or unreadable, a line has no `file_name` and `text`, a name repeats, or none of them is
            of an image here.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"source.captions: `{path}` cannot be read ({error}). Check the path.") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'line {number} of `{path}` is not {{"file_name": ..., "text": ...}} ({error}). Write one JSON object a line.'
            ) from error
        if name in found:
            raise DataError(f"`{path}` has more than one caption of `{name}`. Keep one.")
        found[name] = str(text or "").strip()
    if not set(found) & set(names):
        raise DataError(
            f"`{path}` has captions of {len(found):,} images, none of which is here; the first image here is "
            f"`{names[0] if names else '(none)'}`. Check that it was written for these images."
        )
    return found
