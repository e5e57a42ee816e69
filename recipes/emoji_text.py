"""Emoji from their names, 16 -> 64 px: an encoder of emoji and names first, then the whole way, all of it offline.

python -m recipes.emoji_text emoji_noto_128.zip --out runs/emoji-text

The archive holds images and a metadata.jsonl with `text`, `base_codepoints` and `skin_tone`. One in ten symbols is held out, with all
of its variants; their names are what the run is sampled from at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from pagoda.process import prepare_process

prepare_process()  # before PyTorch is imported

from pagoda.data import SourceConfig, open_source
from pagoda.data.filters import filter_rows
from pagoda.errors import DataError, PagodaError
from pagoda.files import write_bytes_atomic
from pagoda.images import save_image
from pagoda.stages.captions import prompt_condition
from pagoda.stages.config import RunConfig, override
from pagoda.stages.presets import preset_config
from pagoda.stages.provenance import sample_facts
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.text.pictures import draw_captions

HELD_OUT = 0.1
"""Share of the symbols that are not trained on."""
GROUP = "base_codepoints"
"""Column that says which images are variants of one symbol."""
SHOWN = 32
"""Images in the picture with captions."""


def split_archive(archive: Path, out: Path, *, filter: str = "skin_tone=", seed: int = 0) -> tuple[Path, Path]:
    """Two archives, `train.zip` and `held-out.zip`, which share no symbol; the same for the same seed on every machine.

    Args:
        archive: A zip of images with metadata.jsonl, which has the column `GROUP`.
        out: Folder of the two; archives that are there already are kept.
        filter: Rows of the metadata that are used.
        seed: Decides which symbols are held out.

    Raises:
        DataError: no such archive, or no such column.
    """
    parts = (out / "train.zip", out / "held-out.zip")
    if all(part.is_file() for part in parts):
        return parts
    try:
        with zipfile.ZipFile(archive) as file:
            lines = file.read("metadata.jsonl").decode("utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            rows = [rows[index] for index in filter_rows(rows, filter)]
            if any(GROUP not in row for row in rows):
                raise DataError(
                    f"`{archive}` has rows without `{GROUP}`, so that variants of one symbol cannot be told."
                )
            for part, held_out in zip(parts, (False, True), strict=True):
                chosen = [row for row in rows if is_held_out(row[GROUP], seed) is held_out]
                write_bytes_atomic(part, _pack(file, chosen))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:  # DataError is a ValueError, and says enough
        if isinstance(error, DataError):
            raise
        raise DataError(f"`{archive}` is not a zip of images with metadata.jsonl ({error}). Check the path.") from error
    return parts


def is_held_out(group: str, seed: int) -> bool:
    """Whether a symbol is held out, by the hash of its name alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:4], "big")
    return number < HELD_OUT * 2**32


def _pack(file: zipfile.ZipFile, rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        fixed = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is packed
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        packed.writestr(zipfile.ZipInfo("metadata.jsonl", fixed), text)
        for row in rows:
            packed.writestr(zipfile.ZipInfo(row["file_name"], fixed), file.read(row["file_name"]))
    return buffer.getvalue()


def emoji_text_config(data: str, *, seed: int = 0, condition: str = "text", budget: float = 1.0) -> RunConfig:
    """16 -> 64 px from names, or from group labels for comparison. Mirroring is off: names say left and right.

    Args:
        budget: Share of the steps of every stage, for trying it out.
    """
    config = preset_config("small", data, base=16, size=64)
    settings: dict[str, Any] = {"seed": seed, "mirror": False, "condition": condition}
    if condition == "text":
        settings |= {"distill.loss.image_text": 0.1, "grow.loss.image_text": 0.1}
    config = override(config, settings)
    if budget == 1:
        return config
    steps = {f"{stage}.loop.steps": getattr(config, stage).loop.steps for stage in ("teach", "distill")}
    if condition == "text":
        steps["text.two_tower.loop.steps"] = config.text.two_tower.loop.steps
    steps["distill.teacher_pairs.count"] = config.distill.teacher_pairs.count
    shorter: dict[str, Any] = {name: max(2, round(count * budget)) for name, count in steps.items()}
    shorter["grow.steps"] = [max(2, round(count * budget)) for count in config.grow.steps]
    return override(config, shorter)


def draw_held_out(run: RunFolder, held_out: Path, path: Path) -> None:
    """Write a picture of what the run makes of names that it never saw, the names under it."""
    source = open_source(held_out, options=SourceConfig(compact_labels=True))
    names = [text for text in (source.caption(index) for index in range(len(source))) if text]
    prompts = [names[index * len(names) // SHOWN] for index in range(min(SHOWN, len(names)))]
    generator = load_generator(run)
    seeds = list(range(len(prompts)))
    images = sample_images(generator, seeds, condition=prompt_condition(run, prompts))
    facts = sample_facts(generator, "captions", seeds, None, prompts=prompts, columns=8)
    save_image(draw_captions(images, prompts, columns=8), path, metadata=facts)


def main() -> int:
    """Split, train, and draw; run it again to continue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="zip of captioned emoji")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/emoji-text"), help="run folder (default runs/emoji-text)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")
    parser.add_argument("--condition", choices=("text", "label"), default="text", help="label: groups, to compare with")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the steps, for trying it out (default 1)")
    options = parser.parse_args()
    try:
        data = options.out.with_name(f"{options.out.name}-data")
        trained, held_out = split_archive(options.archive, data)
        config = emoji_text_config(str(trained), seed=options.seed, condition=options.condition, budget=options.budget)
        run = train(config, str(options.out))
        if options.condition == "text":
            draw_held_out(run, held_out, run.path / "samples" / "held-out.png")
            print(f"names it never saw  {run.path / 'samples' / 'held-out.png'}")
    except PagodaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"run     {run.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
