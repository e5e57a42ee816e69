"""Which model made an image, and whether it makes the same pixels again."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, PagodaError
from pagoda.images import encode_image, make_grid, read_metadata, to_pil
from pagoda.networks import OneStepGenerator, model_hash, open_codec
from pagoda.networks.loading import WEIGHTS
from pagoda.stages.captions import prompt_condition
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.text_export import open_exported
from pagoda.stages.watermark import MarkReading, mark_images, mark_picture, read_mark
from pagoda.text import draw_captions

REMADE = ("sample", "grid", "octaves", "captions")
"""Kinds of image that a generator and the facts in the image determine."""


def sample_facts(
    generator: OneStepGenerator,
    kind: str,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    *,
    prompts: Sequence[str] | None = None,
    resolution: int | None = None,
    batch_size: int = 64,
    model: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What makes an image again: the model, its inputs and its settings.

    Args:
        generator: What made it.
        kind: "sample" (one image; `settings` has its `row` in the batch of these seeds), "grid", "octaves", or "captions" (a
            grid with the prompts under the images).
        seeds: Of all images that were made in one go: a batch of another size moves the last bits.
        labels: One per seed, or None for a generator without classes.
        prompts: One per seed, or None for a generator that reads no texts.
        resolution: Side in pixels; the largest when None.
        batch_size: Images a call.
        model: The generator's hash; calculated when None.
        **settings: `columns` and `scale` of a grid, `row` of a sample, `guidance` where a weight was asked for, `watermark` of what
            was marked: its `psnr`.
    """
    parameter = next(generator.parameters())
    facts: dict[str, Any] = {
        "kind": kind,
        "model": model_hash(generator) if model is None else model,
        "resolution": generator.size if resolution is None else resolution,
    }
    if kind == "sample":
        row = settings["row"]
        start = row - row % batch_size
        seeds, labels = (
            seeds[start : start + batch_size],
            None if labels is None else labels[start : start + batch_size],
        )
        prompts = None if prompts is None else prompts[start : start + batch_size]
        settings["row"] = row - start
        facts |= {"seed": seeds[row - start], "label": None if labels is None else labels[row - start]}
    if prompts is not None:
        facts["prompts"] = list(prompts)
    return {
        **facts,
        "seeds": list(seeds),
        "labels": None if labels is None else list(labels),
        "batch_size": batch_size,
        **settings,
        "torch": torch.__version__,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An image beside the one that was made again.

    Attributes:
        equal: Whether every pixel is the same.
        pixels: How many are not.
        largest: Largest difference, in levels of 255.
        reasons: Circumstances that differ from those of the first time.
    """

    equal: bool
    pixels: int
    largest: int
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.equal:
            return "equal: the run makes the same pixels"
        reasons = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"not equal: {self.pixels} pixels differ, by {self.largest} of 255 at most{reasons}"


def compare_with_run(
    path: Path | str, run: Path | str, *, watermark: str | None = None, device: torch.device | str = "cpu"
) -> Comparison:
    """Make an image again and compare every pixel. A JPEG is compressed again in the way that it was.

    Args:
        path: An image that pagoda wrote.
        run: The run folder that made it, or a folder that `pagoda export --to diffusers` wrote.
        watermark: Key of its watermark, where it has one: the image is marked again too.
        device: Where to compute.

    Raises:
        ConfigError: the image was marked and no key is given.
        ArtifactError: the file is no image of pagoda's, its facts were tampered with, it is of a kind that no model alone
            makes again, or the run holds another model.
    """
    facts = read_metadata(path)
    if facts is None:
        raise ArtifactError(
            f"{path} does not say what made it: it is not an image of pagoda, or its metadata was removed."
        )
    if facts.get("kind") not in REMADE:
        raise ArtifactError(
            f"{path} is of the kind {facts.get('kind')!r}, which a model and seeds alone do not make; "
            f"made again are {', '.join(REMADE)}."
        )
    _check_facts(facts, path)
    if facts.get("watermark") is not None and not watermark:
        raise ConfigError(f"{path} was marked: give the key of its watermark (--watermark KEY) to have it made again.")
    generator = _find_generator(Path(run), str(facts["model"]), path)
    torch.nn.Module.to(generator, device)
    with Image.open(path) as image:
        format, size, shown = str(image.format), image.size, np.asarray(image.convert("RGB"), dtype=np.int16)
    try:
        again = remake(generator, facts, _texts_of(Path(run), facts, path), watermark=watermark)
    except (PagodaError, IndexError, OverflowError) as error:
        raise ArtifactError(f"{path} says what its model cannot do ({error}): it was tampered with.") from error
    if again.size != size:
        raise ArtifactError(
            f"{path} is {size[0]} x {size[1]} px, by its metadata it was {again.size[0]} x {again.size[1]}: "
            "it was resized, cropped or tampered with."
        )
    if format == "JPEG":  # lossy, and alike only where it is compressed alike
        again = Image.open(io.BytesIO(encode_image(again, format, quality=int(facts["quality"]))))
    difference = np.abs(shown - np.asarray(again.convert("RGB"), dtype=np.int16)).max(axis=-1)
    now = {"torch": torch.__version__, "device": torch.device(device).type}
    reasons = tuple(f"{key} was {facts.get(key)}, is {value}" for key, value in now.items() if facts.get(key) != value)
    return Comparison(
        equal=not difference.any(),
        pixels=int((difference > 0).sum()),
        largest=int(difference.max()),
        reasons=reasons,
    )


def read_mark_of(path: Path | str, key: str, *, cropped_from: tuple[int, int] | None = None) -> MarkReading:
    """What `read_mark` reads from an image file.

    Raises:
        ArtifactError: the file is no image.
        ConfigError: an empty key.
        ShapeError: see `read_mark`.
    """
    read_metadata(path)  # names a file that is no image in our words
    with Image.open(path) as image:
        return read_mark(image, key, cropped_from=cropped_from)


def remake(
    generator: OneStepGenerator,
    facts: Mapping[str, Any],
    condition: Condition | None = None,
    *,
    watermark: str | None = None,
) -> Image.Image:
    """The image that `sample_facts` describes, marked by `watermark` where the facts say that it was.

    `condition` are its prompts, embedded.

    Raises:
        ConfigError: facts that the generator cannot follow.
        ShapeError: a resolution that it does not have.
    """
    seeds, labels, size = facts["seeds"], facts["labels"], facts["resolution"]
    marked = facts.get("watermark")
    if facts["kind"] == "octaves":
        return draw_octaves(generator, seeds, labels, columns=facts["columns"], condition=condition)
    images = sample_images(
        generator,
        seeds,
        labels=labels,
        condition=condition,
        resolution=size,
        batch_size=facts["batch_size"],
        guidance=facts.get("guidance"),
    )
    if facts["kind"] == "sample":
        image = images[facts["row"]][None]
        return to_pil(image if marked is None else mark_images(image, watermark or "", psnr=marked["psnr"]))[0]
    if facts["kind"] == "captions":
        grid = draw_captions(images, facts["prompts"], columns=facts["columns"])
    else:
        grid = make_grid(images, columns=facts["columns"], scale=facts.get("scale", 1))
    return grid if marked is None else mark_picture(grid, watermark or "", psnr=marked["psnr"])


def draw_octaves(
    generator: OneStepGenerator,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    *,
    columns: int,
    condition: Condition | None = None,
) -> Image.Image:
    """The same seeds at every size below each other, enlarged to the largest."""
    rows = [
        sample_images(generator, seeds, labels=labels, condition=condition, resolution=size) for size in generator.sizes
    ]
    side = rows[-1].shape[-2:]
    return make_grid(torch.cat([F.interpolate(row, size=side, mode="nearest") for row in rows]), columns=columns)


def _texts_of(run: Path, facts: Mapping[str, Any], path: Path | str) -> Condition | None:
    """The prompts in the facts, embedded by the run's encoder; None where there are none.

    Raises:
        ArtifactError: an exported folder without an encoder.
    """
    if facts.get("prompts") is None:
        return None
    if (run / "config.yaml").is_file():
        return prompt_condition(RunFolder.open(run), facts["prompts"])
    read = open_exported(run)
    if read is None:
        raise ArtifactError(
            f"{path} was made from texts, and {run} has no text encoder; give the run folder that made it."
        )
    return read(facts["prompts"])


def _check_facts(facts: Mapping[str, Any], path: Path | str) -> None:
    """Types and bounds of what was read from a file that anyone may have written.

    Raises:
        ArtifactError: naming the fact.
    """

    def fits(name: str) -> bool:
        value = facts.get(name)
        if name in ("seeds", "labels"):
            listed = (
                isinstance(value, list) and len(value) > 0 and all(type(v) is int and abs(v) < 2**63 for v in value)
            )
            return listed or (name == "labels" and value is None)
        if name == "prompts":
            texts = isinstance(value, list) and all(isinstance(v, str) and v.strip() and len(v) < 10_000 for v in value)
            return texts and len(value or ()) == len(facts.get("seeds") or ())
        if name == "model":
            return isinstance(value, str)
        if name == "columns" and value is None:
            return True
        if name == "guidance":
            return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf
        if name == "watermark":
            psnr = value.get("psnr") if isinstance(value, dict) else None
            return isinstance(psnr, int | float) and not isinstance(psnr, bool) and 20 <= psnr <= 60
        return type(value) is int and (0 if name == "row" else 1) <= value <= 2**16

    wanted = ["model", "seeds", "labels", "resolution", "batch_size"]
    wanted += ["row"] if facts["kind"] == "sample" else ["columns"]
    wanted += [name for name in ("scale", "guidance", "watermark", "prompts") if name in facts]
    wanted += ["prompts"] if facts["kind"] == "captions" and "prompts" not in facts else []
    with Image.open(path) as image:
        wanted += ["quality"] if image.format == "JPEG" else []
    wrong = [name for name in wanted if not fits(name)]
    if wrong:
        said = ", ".join(f"{name} = {facts.get(name)!r}"[:80] for name in wrong)
        raise ArtifactError(f"{path} says {said}, which pagoda does not write: it was tampered with.")
    if (
        facts["kind"] in ("grid", "captions")
        and facts["columns"] is not None
        and facts["columns"] > max(4 * len(facts["seeds"]), 1024)
    ):
        raise ArtifactError(
            f"{path} says columns = {facts['columns']} for {len(facts['seeds'])} images: it was tampered with."
        )


def _find_generator(folder: Path, wanted: str, path: Path | str) -> OneStepGenerator:
    """The generator with a hash, among those of a run: it may have grown since.

    Raises:
        ArtifactError: none of them has it.
    """
    seen = []
    for generator in _generators(folder):
        digest = model_hash(generator)
        if digest == wanted:
            return generator
        seen.append(digest[:12])
    raise ArtifactError(
        f"{path} was made by the model {wanted[:12]}..., {folder} holds {', '.join(seen) or 'none'}: "
        "it is of another run, or one of both was changed."
    )


def _generators(folder: Path) -> Iterator[OneStepGenerator]:
    if (folder / "model_index.json").is_file():
        if not (folder / "generator" / WEIGHTS).is_file():
            raise ArtifactError(f"{folder} is a pipeline without generator/{WEIGHTS}; give one that pagoda exported.")
        generator: OneStepGenerator = OneStepGenerator.from_pretrained(
            folder, subfolder="generator", use_safetensors=True, local_files_only=True
        )
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if (folder / "vae").is_dir():
            codec = open_codec(folder / "vae", scale=float(index["codec_scale"]), shift=float(index["codec_shift"]))
            if index.get("codec_tile"):
                codec.use_tiles(int(index["codec_tile"]), int(index["codec_overlap"]))
            generator.use_codec(codec)
        yield generator.eval()
        return
    run = RunFolder.open(folder)
    sizes = run.generator_sizes()
    if not sizes:
        raise ConfigError(f"{folder} has no generator yet. Run `pagoda train DATA --out {folder}` to its end first.")
    for size in reversed(sizes):
        yield load_generator(run, size)
