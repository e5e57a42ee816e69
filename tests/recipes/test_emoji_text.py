"""Emoji from their names: no symbol on both sides of the split, and the whole way by the command line on a small made archive."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes.emoji_text import HELD_OUT, emoji_text_config, is_held_out, split_archive
from tests.conftest import TEXT, TINY

from pagoda.errors import DataError
from pagoda.images import read_metadata
from pagoda.stages.config import override, to_dict
from pagoda.stages.run_folder import RunFolder
from recipes import emoji_text

TONES = ("", "light", "dark")


def made_rows(symbols: int = 60) -> list[dict[str, Any]]:
    """Each symbol in three skin tones, of which the first is none."""
    return [
        {
            "file_name": f"{symbol}-{tone or 'none'}.png",
            "text": f"symbol number {symbol}",
            "base_codepoints": f"U+{symbol:04X}",
            "skin_tone": tone,
            "label": symbol % 3,
        }
        for symbol in range(symbols)
        for tone in TONES
    ]


def made_archive(path: Path, rows: list[dict[str, Any]], side: int = 64) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
        for index, row in enumerate(rows):
            buffer = io.BytesIO()
            Image.new("RGB", (side, side), (index % 256, 3 * index % 256, 90)).save(buffer, "PNG")
            file.writestr(row["file_name"], buffer.getvalue())
    return path


def rows_of(archive: Path) -> list[dict[str, Any]]:
    with zipfile.ZipFile(archive) as file:
        rows = [json.loads(line) for line in file.read("metadata.jsonl").decode().splitlines()]
        assert sorted(file.namelist()) == sorted(["metadata.jsonl", *(row["file_name"] for row in rows)])
    return rows


def test_no_symbol_is_on_both_sides_with_any_of_its_variants(tmp_path: Path) -> None:
    rows = made_rows()
    archive = made_archive(tmp_path / "emoji.zip", rows, side=4)
    trained, held_out = (
        rows_of(part) for part in split_archive(archive, tmp_path / "all", filter="skin_tone in ''|light|dark")
    )
    symbols = [{row["base_codepoints"] for row in part} for part in (trained, held_out)]
    assert not symbols[0] & symbols[1]
    assert symbols[1] == {row["base_codepoints"] for row in rows if is_held_out(row["base_codepoints"], 0)} != set()
    assert sorted(row["file_name"] for row in trained + held_out) == sorted(row["file_name"] for row in rows)
    share = sum(is_held_out(f"U+{symbol:04X}", 0) for symbol in range(20_000)) / 20_000
    assert abs(share - HELD_OUT) < 0.01


def test_the_split_is_the_same_bytes_again_and_another_one_for_another_seed(tmp_path: Path) -> None:
    archive = made_archive(tmp_path / "emoji.zip", made_rows(), side=4)
    first, second = (split_archive(archive, tmp_path / name) for name in ("a", "b"))
    other = split_archive(archive, tmp_path / "c", seed=1)
    assert [part.read_bytes() for part in first] == [part.read_bytes() for part in second]
    assert first[1].read_bytes() != other[1].read_bytes()
    first[0].write_bytes(b"kept")
    assert split_archive(archive, tmp_path / "a") == first
    assert first[0].read_bytes() == b"kept"


def test_rows_that_the_filter_leaves_out_are_on_neither_side(tmp_path: Path) -> None:
    archive = made_archive(tmp_path / "emoji.zip", made_rows(), side=4)
    for filter, tone in (("skin_tone=", ""), ("skin_tone=dark", "dark")):
        parts = split_archive(archive, tmp_path / f"tone-{tone}", filter=filter)
        found = [row for part in parts for row in rows_of(part)]
        assert len(found) == 60
        assert {row["skin_tone"] for row in found} == {tone}


def test_archives_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    rows = made_rows(3)
    nameless = [{key: value for key, value in row.items() if key != "base_codepoints"} for row in rows]
    with pytest.raises(DataError, match="without `base_codepoints`"):
        split_archive(made_archive(tmp_path / "nameless.zip", nameless, side=4), tmp_path / "out")
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as file:
        file.writestr("a.png", b"")
    with zipfile.ZipFile(tmp_path / "torn.zip", "w") as file:
        file.writestr("metadata.jsonl", json.dumps(rows[0]))  # and no such image
    for name in ("text.zip", "bare.zip", "torn.zip", "missing.zip"):
        with pytest.raises(DataError, match=rf"{name}.*is not a zip of images with metadata.jsonl"):
            split_archive(tmp_path / name, tmp_path / name.removesuffix(".zip"))
    assert not list(tmp_path.glob("*/held-out.zip"))


def test_a_budget_shortens_every_stage_and_changes_nothing_else() -> None:
    whole, short = (to_dict(emoji_text_config("emoji.zip", budget=budget)) for budget in (1.0, 0.01))

    def leaves(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: tree}
        return {key: value for k, part in tree.items() for key, value in leaves(part, f"{name}.{k}".strip(".")).items()}

    a, b = leaves(whole), leaves(short)
    changed = {name: (a[name], b[name]) for name in a if a[name] != b[name]}
    counts = ["teach.loop.steps", "distill.loop.steps", "text.two_tower.loop.steps", "distill.teacher_pairs.count"]
    assert sorted(changed) == sorted([*counts, "grow.steps"])
    assert all(changed[name][1] == round(0.01 * changed[name][0]) for name in counts)
    assert list(changed["grow.steps"][1]) == [max(2, round(0.01 * steps)) for steps in changed["grow.steps"][0]]


def test_the_command_goes_the_whole_way_and_draws_names_that_it_never_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = made_archive(tmp_path / "emoji.zip", [row for row in made_rows(26) if not row["skin_tone"]])
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["emoji_text", str(archive), "--out", str(out), "--budget", "0.0001"])
    # The recipe's own networks and batches take a minute even for two steps.
    small = {**TINY, **TEXT, "base": 8, "size": 16, "evaluation.gap.count": 0, "distill.matching.weight": 1.0}
    monkeypatch.setattr(
        emoji_text, "emoji_text_config", lambda data, **options: override(emoji_text_config(data, **options), small)
    )
    assert emoji_text.main() == 0
    run = RunFolder.open(out)
    assert run.generator_sizes() == [8, 16]
    assert run.config().data == str(tmp_path / "run-data" / "train.zip")
    assert run.config().distill.loss.image_text == 0.1
    facts = read_metadata(out / "samples" / "held-out.png")
    held_out = [f"symbol number {symbol}" for symbol in range(26) if is_held_out(f"U+{symbol:04X}", 0)]
    assert facts["prompts"] == held_out != []
    assert "names it never saw" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["emoji_text", str(tmp_path / "none.zip"), "--out", str(tmp_path / "no")])
    assert emoji_text.main() == 1
    assert "DataError" in capsys.readouterr().err
