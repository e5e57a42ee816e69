"""Tables hold only what compares; what does not is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.errors import ArtifactError, DataError
from pagoda.evaluation import Score, check_comparable, load_scores, score_table

SCORE = Score(
    metric="FD[classifier]",
    value=2.5,
    floor=0.5,
    low=2.0,
    high=3.0,
    count_real=100,
    count_fake=50,
    extractor="classifier",
    extractor_fingerprint="aa",
    resize="none",
    reference_fingerprint="bb",
    image_size=32,
    seed=0,
    settings={"k": 5},
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("settings", {"k": 3}),
        ("count_real", 99),
        ("count_fake", 51),
        ("extractor", "random"),
        ("extractor_fingerprint", "cc"),
        ("resize", "torch bicubic"),
        ("reference_fingerprint", "dd"),
        ("image_size", 64),
    ],
)
def test_scores_that_differ_in_provenance_are_refused_a_common_table(field: str, value: object) -> None:
    other = replace(SCORE, **{field: value})  # type: ignore[arg-type]
    assert not SCORE.comparable_with(other)
    with pytest.raises(DataError, match=rf"FD\[classifier\] of `a` and of `b` do not compare: {field} is"):
        score_table({"a": [SCORE], "b": [other]})


def test_scores_of_other_models_seeds_and_floors_compare() -> None:
    other = replace(SCORE, value=1.0, low=None, high=None, made_by={"model": "x"}, notes=("n",))
    check_comparable({"a": [SCORE], "b": [other]})
    table = score_table({"a": [SCORE], "b": [other]}).splitlines()
    assert table[0] == "| | FD[classifier] ↓ |"
    assert table[2:] == ["| a | 2.5 [2, 3] |", "| b | 1 |", "| real against real | 0.5 |"]


def test_models_need_the_same_metrics() -> None:
    with pytest.raises(DataError, match=r"`a` was scored by FD\[classifier\], `b` by KD\[classifier\]"):
        score_table({"a": [SCORE], "b": [replace(SCORE, metric="KD[classifier]")]})
    with pytest.raises(DataError, match="no score"):
        score_table({})


def test_the_ratio_is_over_the_floor() -> None:
    assert SCORE.ratio == 5
    assert replace(SCORE, floor=None).ratio is None
    assert replace(SCORE, floor=-0.1).ratio is None  # an unbiased floor may fall below 0


def test_scores_survive_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"scores": [replace(SCORE, notes=("a", "b")).to_dict()]}))
    assert load_scores(tmp_path / "s.json") == [replace(SCORE, notes=("a", "b"))]


@pytest.mark.parametrize("text", ["", "[]", '{"scores": [{"metric": "FD"}]}', '{"scores": [{"unknown": 1}]}'])
def test_files_that_hold_no_scores_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ArtifactError):
        load_scores(tmp_path / "s.json")
