"""What can go wrong, as a small tree.

    PagodaError
    ├── ConfigError      a setting: unknown, out of range, contradicting another
    ├── DataError        images, labels, captions that cannot be used as they are
    ├── ShapeError       sizes, channels or widths that do not fit each other
    ├── ArtifactError    a file or folder that pagoda or someone else wrote: truncated, foreign, of another run
    ├── ResourceError    not enough disk or memory for what was asked
    ├── TrainingError    a run that has stopped being healthy (non-finite loss, collapse)
    └── MissingExtraError   an optional package is not installed (also an ImportError)

Every message names the value seen, what is accepted, and the next step. `assert` is for our own invariants only.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PagodaError(Exception):
    """Root of everything that pagoda raises on purpose."""


class ConfigError(PagodaError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(PagodaError, ValueError):
    """Images, labels or captions cannot be used as they are."""


class ShapeError(PagodaError, ValueError):
    """Sizes, channels or widths do not fit each other."""


class ArtifactError(PagodaError, RuntimeError):
    """A file or folder is truncated, foreign, or belongs to another run."""


class ResourceError(PagodaError, RuntimeError):
    """Not enough disk or memory for what was asked."""


class TrainingError(PagodaError, RuntimeError):
    """A training run has stopped being healthy."""


class MissingExtraError(PagodaError, ImportError):
    """An optional package is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known name, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean `{near[0]}`?"
    return "Known: " + ", ".join(f"`{k}`" for k in known) + "."


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which `pip install` line brings it.

    Raises:
        MissingExtraError: `module` cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"`{module}` is needed here and cannot be imported ({error}). Run: pip install 'pagoda[{extra}]'"
        ) from error
