"""One score with its provenance, and tables that hold only scores that compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pagoda.errors import ArtifactError, DataError

_COMPARED = (
    "metric",
    "settings",
    "count_real",
    "count_fake",
    "extractor",
    "extractor_fingerprint",
    "resize",
    "reference_fingerprint",
    "image_size",
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score and everything that decides whether it may stand beside another one."""

    metric: str
    """What was measured, with the extractor in its name: "FD[classifier]"; "FID" only in FID's own features."""
    value: float
    """The score of the generated images."""
    floor: float | None
    """The same metric of real images in place of the generated ones, at the same counts; None where no real ones are left."""
    low: float | None = None
    """Lower end of the 95 % interval over the draw of the generated images; None where it was not estimated."""
    high: float | None = None
    """Upper end."""
    better: Literal["lower", "higher"] = "lower"
    """Which way is better."""
    count_real: int
    """Number of real images in the reference."""
    count_fake: int
    """Number of generated images, and of the real ones that stand in for them in the floor."""
    extractor: str
    """Name of the feature extractor."""
    extractor_fingerprint: str
    """Hash of its weights and settings."""
    resize: str
    """Kernel that brings images to the extractor's size."""
    reference_fingerprint: str
    """Hash of the features of the reference."""
    image_size: int
    """Height and width of the images that were compared, in pixels."""
    seed: int
    """Decides how the real images were split, which generated ones were taken, and the resampling."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the metric: k, degree, number of splits."""
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """What made the generated images: hash of the model, seeds, sampler."""
    notes: tuple[str, ...] = ()
    """What a reader should know before trusting the value."""

    @property
    def ratio(self) -> float | None:
        """Value over floor; None without a floor, or with one of 0 or below."""
        return None if self.floor is None or self.floor <= 0 else self.value / self.floor

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "settings": dict(self.settings), "made_by": dict(self.made_by)}

    def to_json(self) -> str:
        """The score as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Read what `to_dict` gave.

        Raises:
            ArtifactError: fields are missing or unknown.
        """
        try:
            return cls(**{**values, "notes": tuple(values.get("notes", ()))})
        except TypeError as error:
            raise ArtifactError(f"this is no score of this version of pagoda ({error}); evaluate again.") from error

    def differences(self, other: Score) -> list[str]:
        """Why the two values may not stand in one table, as readable facts; empty when they may."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in _COMPARED]
        return [f"{name} is {ours!r} and {theirs!r}" for name, ours, theirs in pairs if ours != theirs]

    def comparable_with(self, other: Score) -> bool:
        """Whether the two values may stand in one table: same metric, features, reference, size and counts."""
        return not self.differences(other)


def check_comparable(rows: Mapping[str, Sequence[Score]]) -> None:
    """Refuse scores of several models that may not stand in one table.

    Args:
        rows: By name of the model, its scores.

    Raises:
        DataError: a metric was measured in different ways, or not of every model; what differs is named.
    """
    names = list(rows)
    for name in names[1:]:
        ours, theirs = ({s.metric: s for s in rows[n]} for n in (names[0], name))
        if ours.keys() != theirs.keys():
            raise DataError(
                f"`{names[0]}` was scored by {', '.join(ours)}, `{name}` by {', '.join(theirs)}. "
                "Evaluate both with the same metrics and features."
            )
        for metric, score in ours.items():
            different = score.differences(theirs[metric])
            if different:
                raise DataError(
                    f"{metric} of `{names[0]}` and of `{name}` do not compare: {'; '.join(different)}. "
                    "Evaluate both against the same data, at the same size and count."
                )


def score_table(rows: Mapping[str, Sequence[Score]]) -> str:
    """A Markdown table of comparable scores: a row a model, a column a metric, the floor below.

    Raises:
        DataError: the scores do not compare (see `check_comparable`).
    """
    if not rows:
        raise DataError("there is no score to show.")
    check_comparable(rows)
    columns = next(iter(rows.values()))
    arrows = {"lower": "↓", "higher": "↑"}
    lines = ["| | " + " | ".join(f"{s.metric} {arrows[s.better]}" for s in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, scores in rows.items():
        by_metric = {s.metric: s for s in scores}
        lines.append(f"| {name} | " + " | ".join(_cell(by_metric[s.metric]) for s in columns) + " |")
    floors = ["" if s.floor is None else f"{s.floor:.4g}" for s in columns]
    lines.append("| real against real | " + " | ".join(floors) + " |")
    return "\n".join(lines)


def _cell(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.4g}"
    return f"{score.value:.4g} [{score.low:.4g}, {score.high:.4g}]"


def load_scores(path: Path | str) -> list[Score]:
    """Read scores that were written as a JSON list under `scores`.

    Raises:
        ArtifactError: missing, damaged, or of another version.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`{path}` holds no scores ({error}). Run `pagoda evaluate` first.") from error
    known = {f.name for f in fields(Score)}
    if not isinstance(values, list) or not all(isinstance(v, dict) and v.keys() <= known for v in values):
        raise ArtifactError(f"`{path}` holds no scores of this version of pagoda; evaluate again.")
    return [Score.from_dict(value) for value in values]
