"""Edits in the model server: which runs can be edited with, and an edit pipeline that says how far it is and stops when told to."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from pagoda.app.catalog import RunCatalog
from pagoda.app.jobs import Job
from pagoda.app.uploads import UploadLimits, read_upload
from pagoda.diffusion import Condition
from pagoda.edit_pipeline import PagodaEditPipeline
from pagoda.errors import ConfigError, DataError, PagodaError
from pagoda.files import hash_json
from pagoda.stages.amortise import STAGE as AMORTISE
from pagoda.stages.editing import Edited, OneCallEncoder, TeacherEncoder, load_encoder

EditKind = Literal["reconstruct", "inpaint", "upscale", "transfer"]
KINDS: tuple[EditKind, ...] = ("reconstruct", "inpaint", "upscale", "transfer")


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """An edit of an uploaded image.

    Args:
        run: Name in the catalog.
        kind: Which edit.
        image: As `read_upload` gives it.
        keep: Of an inpainting, bool (H, W) of the image's size: False where the hole is.
        label: What the image shows; guessed when None (`Editor.guess_labels`).
        prompt: What it shows in words, in a run of texts; nothing in particular when None.
        to: Of a transfer, the other class, or the text in a run of texts.
        strength: How far the latent moves towards fresh noise, in [0, 1].
        seed: Of that noise.
        encoder: teacher, the exact inversion; amortised, one call of what `pagoda amortise` trained.
    """

    run: str
    kind: EditKind
    image: Image.Image
    keep: np.ndarray | None = None
    label: int | None = None
    prompt: str | None = None
    to: int | str | None = None
    strength: float = 0.0
    seed: int = 0
    encoder: Literal["teacher", "amortised"] = "teacher"


def can_edit(catalog: RunCatalog, name: Any) -> bool:
    """Whether a run has what an edit needs: a generator, and its teacher as the encoder."""
    try:
        run = catalog.open(name)
        return bool(run.generator_sizes()) and (run.teacher / "denoiser.json").is_file()
    except (PagodaError, OSError):
        return False


def can_encode_in_one_call(catalog: RunCatalog, name: Any) -> bool:
    """Whether a run has an encoder that `pagoda amortise` has finished."""
    try:
        return catalog.open(name).is_done(AMORTISE)
    except (PagodaError, OSError):
        return False


class EditDesk:
    """Keeps the pipeline of the run and encoder that was edited with last. Called in the server's thread only.

    Args:
        catalog: Which runs there are.
        device: Where to compute.
    """

    def __init__(self, catalog: RunCatalog, device: str) -> None:
        self._catalog, self._device = catalog, device
        self._kept: tuple[str, PagodaEditPipeline, _WatchedEncoder] | None = None

    def edit(self, job: Job, request: EditRequest) -> Edited:
        """Do it.

        Raises:
            PagodaError: a run or an image that cannot be edited, settings out of range.
            JobCancelledError: nobody wants it any more; noticed before each inversion.
        """
        pipeline, encoder = self._pipeline(request.run, request.encoder)
        guesses = pipeline.editor.generator.num_classes > 0 and request.label is None
        encoder.watch(job, 2 if guesses else 1)
        if request.kind == "upscale":
            return pipeline.upscale(request.image, label=request.label, prompt=request.prompt)
        common: dict[str, Any] = {"label": request.label, "prompt": request.prompt}
        common |= {"strength": request.strength, "seed": request.seed}
        if request.kind == "inpaint":
            if request.keep is None:
                raise ConfigError("where is the hole? Paint it on the image, or type its boxes.")
            mask = Image.fromarray(request.keep.astype(np.uint8) * 255)
            return pipeline.inpaint(request.image, mask, **common)
        if request.kind == "transfer":
            if request.to is None:
                raise ConfigError("what shall it show? Choose a class, or say it in words.")
            return pipeline.transfer(request.image, request.to, **common)
        return pipeline.reconstruct(request.image, **common)

    def _pipeline(self, name: str, kind: str) -> tuple[PagodaEditPipeline, _WatchedEncoder]:
        run = self._catalog.open(name)
        sizes = run.generator_sizes()
        files = [run.teacher / "denoiser.json", *(run.generator(size) / "config.json" for size in sizes)]
        files += [run.encoder / "config.json"] if kind == "amortised" else []
        stamp = hash_json([name, kind, *(path.stat().st_mtime_ns for path in files if path.is_file())])
        if self._kept is None or self._kept[0] != stamp:
            self._kept = None
            encoder = _WatchedEncoder(load_encoder(run, kind, device=self._device))
            self._kept = (stamp, PagodaEditPipeline.from_pretrained(run, encoder=encoder, device=self._device), encoder)
        return self._kept[1], self._kept[2]


class _WatchedEncoder:
    """An encoder that tells a job of each call before it is made."""

    def __init__(self, inner: TeacherEncoder | OneCallEncoder) -> None:
        self._inner = inner
        self.fingerprint = inner.fingerprint
        self._job: Job | None = None
        self._calls, self._total = 0, 1

    def watch(self, job: Job, total: int) -> None:
        """From now on for this job, which takes about so many calls."""
        self._job, self._calls, self._total = job, 0, total
        job.advance(0, total)

    def __call__(self, images: Tensor, condition: Condition) -> Tensor:
        assert self._job is not None, "an edit is watched before it begins"
        self._job.advance(min(self._calls, self._total), self._total)
        self._calls += 1
        return self._inner(images, condition)


def parse_mask(painted: str, boxes: str, size: tuple[int, int], limits: UploadLimits) -> np.ndarray | None:
    """What is kept of an image, bool (H, W), from strokes and from boxes; None where neither was given.

    Args:
        painted: Data URL of a PNG of the strokes, of any size: what is not black was painted over.
        boxes: "left, top, width, height" in pixels of the image; several with a semicolon between them.
        size: Width and height of the image.
        limits: Of the PNG.

    Raises:
        DataError: a painted mask that cannot be read.
        ConfigError: boxes that are none, or lie beside the image.
    """
    width, height = size
    hole = np.zeros((height, width), bool)
    if painted:
        head, _, data = painted.partition(",")
        if head != "data:image/png;base64" or len(data) > limits.max_bytes * 4 / 3 + 4:
            raise DataError("the painted mask is no PNG of this page, or too large. Paint it again.")
        try:
            content = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise DataError("the painted mask arrived damaged. Paint it again.") from error
        strokes = read_upload(content, "the painted mask", limits).image.convert("L")
        hole |= np.asarray(strokes.resize(size, Image.Resampling.NEAREST)) > 127
    for box in filter(None, (part.strip() for part in boxes.split(";"))):
        words = box.replace(",", " ").split()
        if len(words) != 4 or not all(word.isdecimal() and len(word) < 7 for word in words):
            raise ConfigError(f"a box is `left, top, width, height` in whole pixels, got {box[:40]!r}.")
        left, top, wide, high = map(int, words)
        if wide < 1 or high < 1 or left + wide > width or top + high > height:
            raise ConfigError(f"the box {box[:40]} does not lie within the image's {width} x {height} px.")
        hole[top : top + high, left : left + wide] = True
    return ~hole if hole.any() else None
