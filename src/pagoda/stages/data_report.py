"""What the check of a run's images found, kept in its folder for whoever looks at the run later."""

from __future__ import annotations

import json
from typing import Any

from pagoda.data.check import CheckReport
from pagoda.errors import ArtifactError
from pagoda.files import write_text_atomic
from pagoda.stages.run_folder import RunFolder

NAME = "check.json"


def write_data_report(run: RunFolder, report: CheckReport) -> None:
    """Keep a report in the run, beside its small copies of the images."""
    write_text_atomic(run.images / NAME, json.dumps(report.to_json(), indent=1))


def read_data_report(run: RunFolder) -> dict[str, Any] | None:
    """What `write_data_report` wrote, see `CheckReport.to_json`; None in a run that keeps none.

    Raises:
        ArtifactError: the file was damaged, or is none of ours.
    """
    path = run.images / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        kinds = {
            "total": int,
            "usable": int,
            "size": int,
            "classes": dict,
            "sizes": dict,
            "bad": list,
            "duplicates": list,
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(found[name], kind)]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is no report of `pagoda data check` ({error!r}). Remove it.") from error
    if wrong:
        raise ArtifactError(
            f"{path} is no report of `pagoda data check`: `{wrong[0]}` is {found[wrong[0]]!r}. Remove it."
        )
    return dict(found)
