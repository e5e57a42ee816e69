"""Edits of real emoji that no run has seen: enlarging against Lanczos, filling holes against OpenCV, and what an edit costs.

The runs are those of `emoji_text` that are told groups: one in ten symbols is held out with all of its variants. They are made, continued,
or only opened, as they lie in PAGODA_RUNS. The encoder is told the group that an emoji belongs to.

OpenCV is not installed by pagoda: pip install opencv-python-headless
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.emoji_text import classifier, made_run, source
from benchmarks.harness import Arm, PassLine, Results, benchmark
from benchmarks.real_sets import reduced
from pagoda import PagodaEditPipeline
from pagoda.diffusion import Condition
from pagoda.errors import MissingExtraError
from pagoda.evaluation import ClassifierFeatures, FeatureMoments, frechet_distance, psnr
from pagoda.images import make_grid, save_image, to_pil, to_uint8
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.config import override
from pagoda.steering import Editor, back_project, downsampling, fill_hole
from pagoda.training import seeded_generator

SMALL, LARGE, HOLE = 16, 64, 32
ONE_IN = 3
"""Held-out emoji that are edited: a search for a latent takes a core two to four seconds an image, and three arms search.
What fills holes was chosen on the other two, with holes of another draw."""
CLASSES = 9


@cache
def truth(count: int) -> tuple[Tensor, Tensor]:
    """Held-out emoji at 64 px, uint8 (N, 3, 64, 64), and their groups; they lie in the archive in Unicode order."""
    held_out = source(1)
    rows = range(0, len(held_out), max(1, len(held_out) // count))
    images, labels = reduced(held_out, LARGE, rows)
    # The held-out archive numbers the groups that it has; a run knows the training archive's numbers.
    names, known = held_out.class_names, source(0).class_names
    assert names is not None
    assert known is not None
    return images, torch.tensor([known.index(names[label]) for label in labels.tolist()])


@cache
def judge(budget: float) -> ClassifierFeatures:
    """Features of a classifier of the training emoji; no run has anything to do with it."""
    return ClassifierFeatures(classifier(max(20, round(600 * budget))))


@cache
def trained(seed: int, budget: float, encoder: str = "teacher") -> PagodaEditPipeline:
    """The pipeline of a seed's run."""
    run, _ = made_run("label", seed, budget)
    if encoder == "amortised":
        steps = {"amortise.loop.steps": max(4, round(1000 * budget)), "amortise.loop.preview_every": 0}
        amortise_run(str(run.path), override(run.config(), steps), quiet=True)
    return PagodaEditPipeline.from_pretrained(run, encoder=encoder)


def score(made: Tensor, count: int, budget: float, seconds: float) -> dict[str, float]:
    """How near edited images (N, 3, 64, 64) come to the true ones.

    `distance` is the Fréchet distance between both sets in the judge's features; `feature_error` the mean squared distance between the
    features of an image and of its truth, as a share of what two different images differ by.
    """
    images = truth(count)[0].float() / 127.5 - 1
    made = to_uint8(made).float() / 127.5 - 1  # what would be written
    real, found = (judge(min(1.0, budget))(batch).double() for batch in (images, made))
    apart = 2 * real.var(0).sum()
    return {
        "psnr": psnr(made, images),
        "distance": frechet_distance(FeatureMoments.from_features(real), FeatureMoments.from_features(found)),
        "feature_error": float((real - found).square().sum(1).mean() / apart),
        "seconds": seconds / len(made),
    }


# Enlarging.


def given(count: int) -> Tensor:
    """The held-out emoji at 16 px, (N, 3, 16, 16) in [-1, 1]: exactly what the downsampler makes of them, before it rounds."""
    return downsampling(LARGE, SMALL)(truth(count)[0].double() / 127.5 - 1).float()


def by_pillow(y: Tensor, kernel: Image.Resampling) -> Tensor:
    """Enlarged by one of Pillow's kernels, in floats."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((LARGE, LARGE), kernel))
        for plane in y.reshape(-1, SMALL, SMALL).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).reshape(len(y), -1, LARGE, LARGE).clamp(-1, 1)


def lanczos(y: Tensor, labels: Tensor, editor: Editor) -> Tensor:
    """What most people use."""
    return by_pillow(y, Image.Resampling.LANCZOS)


def lanczos_projected(y: Tensor, labels: Tensor, editor: Editor) -> Tensor:
    """The same, made to agree with the small image."""
    return back_project(by_pillow(y, Image.Resampling.LANCZOS), y, downsampling(LARGE, SMALL)).clamp(-1, 1)


def enlarged_by(method: str, y: Tensor, labels: Tensor, editor: Editor) -> Tensor:
    """`pagoda edit upscale`."""
    return editor.upscale(y, Condition.of_labels(labels), method=method)  # type: ignore[arg-type]


# Filling.


def holes(count: int, seed: int) -> Tensor:
    """One square hole of a quarter of the image each, (N, 1, 64, 64), True = known; its place is drawn."""
    masks = torch.ones(len(truth(count)[0]), 1, LARGE, LARGE, dtype=torch.bool)
    places = torch.randint(0, LARGE - HOLE + 1, (len(masks), 2), generator=seeded_generator("editing", seed))
    for mask, (top, left) in zip(masks, places.tolist(), strict=True):
        mask[:, top : top + HOLE, left : left + HOLE] = False
    return masks


def opencv() -> ModuleType:
    """OpenCV.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise MissingExtraError(f"OpenCV is needed here ({error}). Run: pip install opencv-python-headless") from error


def by_opencv(method: str, x: Tensor, masks: Tensor, labels: Tensor, editor: Editor, seed: int) -> Tensor:
    """cv2.inpaint with a radius of 3 pixels; what lies in the holes is black."""
    cv2 = opencv()
    flag = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}[method]
    filled = []
    for image, mask in zip(to_uint8(torch.where(masks, x, -1.0)), masks, strict=True):
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        filled.append(cv2.inpaint(pixels, (~mask[0]).numpy().astype(np.uint8), 3, flag))
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2).float() / 127.5 - 1


def harmonic(x: Tensor, masks: Tensor, labels: Tensor, editor: Editor, seed: int) -> Tensor:
    """The smoothest continuation, which `inpaint` starts from: what the model adds is what is beyond it."""
    return fill_hole(x, masks)


def filled_by(options: dict[str, Any], x: Tensor, masks: Tensor, labels: Tensor, editor: Editor, seed: int) -> Tensor:
    """`pagoda edit inpaint`."""
    seeds = list(range(1000 * seed, 1000 * seed + len(x)))
    return editor.inpaint(x, masks, Condition.of_labels(labels), seeds=seeds, **options)


UPSCALE: dict[str, Callable[..., Tensor]] = {
    "upscale-lanczos": lanczos,
    "upscale-lanczos-projected": lanczos_projected,
    "upscale-pagoda": partial(enlarged_by, "optimise"),
    "upscale-pagoda-project": partial(enlarged_by, "project"),
    "upscale-pagoda-one-call": partial(enlarged_by, "project"),
    "upscale-pagoda-alternate": partial(enlarged_by, "alternate"),
}
INPAINT: dict[str, Callable[..., Tensor]] = {
    "inpaint-telea": partial(by_opencv, "telea"),
    "inpaint-navier-stokes": partial(by_opencv, "navier-stokes"),
    "inpaint-harmonic": harmonic,
    "inpaint-pagoda": partial(filled_by, {"method": "teacher"}),
    "inpaint-pagoda-one-call": partial(filled_by, {"method": "teacher"}),
    "inpaint-pagoda-search": partial(filled_by, {"method": "teacher", "steps": 20}),
    "inpaint-pagoda-eight-drawings": partial(filled_by, {"method": "teacher", "drawings": 8}),
    "inpaint-pagoda-optimise": partial(filled_by, {"method": "optimise"}),
    "inpaint-pagoda-alternate": partial(filled_by, {"method": "alternate"}),
}


def encoder_of(name: str) -> str:
    """What reads the images of an arm."""
    return "amortised" if name.endswith("one-call") else "teacher"


def upscale_arm(make: Callable[..., Tensor], name: str, count: int, budget: float, seed: int) -> dict[str, float]:
    """One way to enlarge the held-out emoji."""
    pipeline, y, labels = trained(seed, budget, encoder_of(name)), given(count), truth(count)[1]
    start = time.perf_counter()
    made = make(y, labels, pipeline.editor)
    seconds = time.perf_counter() - start
    error = (downsampling(LARGE, SMALL)(made) - y).abs().mean()
    draw(name, made, seed, budget)
    return {**score(made, count, budget, seconds), "off_the_small_image": float(error)}


def inpaint_arm(make: Callable[..., Tensor], name: str, count: int, budget: float, seed: int) -> dict[str, float]:
    """One way to fill the holes of the held-out emoji."""
    pipeline, masks = trained(seed, budget, encoder_of(name)), holes(count, seed)
    x, labels = truth(count)[0].float() / 127.5 - 1, truth(count)[1]
    start = time.perf_counter()
    made = make(x, masks, labels, pipeline.editor, seed)
    seconds = time.perf_counter() - start
    changed = (to_uint8(made) != truth(count)[0]) & masks
    draw(name, made, seed, budget)
    return {**score(made, count, budget, seconds), "known_pixels_changed": float(changed.sum())}


def draw(name: str, made: Tensor, seed: int, budget: float) -> None:
    """Some of the images for the docs, of the first seed of a run of half of its steps or more."""
    if seed == 0 and budget >= 0.5:
        facts = {"kind": "benchmark", "arm": name, "seed": seed}
        save_image(make_grid(made[:16], columns=8), Path(f"docs/results/images/editing-{name}.png"), metadata=facts)


def seconds_of(edit: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of an edit, after one that warms up."""
    edit()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        edit()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def cost_arm(count: int, budget: float, seed: int) -> dict[str, float]:
    """Seconds of one edit of one image of 64 px, the reading of the image and the teacher's inversion included."""
    pipeline = trained(seed, budget)
    image, label = to_pil(truth(count)[0][:1].float() / 127.5 - 1)[0], int(truth(count)[1][0])
    small = image.resize((SMALL, SMALL), Image.Resampling.BOX)
    keep = holes(count, seed)[0, 0].numpy()
    fast = trained(seed, budget, "amortised")
    made = fast.editor.reconstruct(truth(count)[0].float() / 127.5 - 1, Condition.of_labels(truth(count)[1]))
    exact = pipeline.editor.reconstruct(truth(count)[0].float() / 127.5 - 1, Condition.of_labels(truth(count)[1]))
    return {
        "seconds_reconstruct": seconds_of(lambda: pipeline.reconstruct(image, label=label)),
        "seconds_transfer": seconds_of(lambda: pipeline.transfer(image, (label + 1) % CLASSES, label=label)),
        "seconds_inpaint": seconds_of(lambda: pipeline.inpaint(image, keep, label=label)),
        "seconds_upscale": seconds_of(lambda: pipeline.upscale(small, label=label)),
        "seconds_interpolate_8": seconds_of(lambda: pipeline.interpolate(image, small, labels=(label, label))),
        "seconds_reconstruct_unlabelled": seconds_of(lambda: pipeline.reconstruct(image)),
        "seconds_inpaint_unlabelled": seconds_of(lambda: pipeline.inpaint(image, keep)),
        "seconds_upscale_unlabelled": seconds_of(lambda: pipeline.upscale(small)),
        "seconds_reconstruct_amortised": seconds_of(lambda: fast.reconstruct(image, label=label)),
        "seconds_transfer_amortised": seconds_of(lambda: fast.transfer(image, (label + 1) % CLASSES, label=label)),
        "seconds_inpaint_amortised": seconds_of(lambda: fast.inpaint(image, keep, label=label)),
        "seconds_upscale_amortised": seconds_of(lambda: fast.upscale(small, label=label)),
        "psnr_amortised": psnr(made, truth(count)[0].float() / 127.5 - 1),
        "psnr_teacher": psnr(exact, truth(count)[0].float() / 127.5 - 1),
    }


def ratio(results: Results, metric: str, arm: str, *others: str) -> float:
    """The worst over seeds of an arm's value over the best of others."""
    best = [min(values) for values in zip(*(results.values(other, metric) for other in others), strict=True)]
    return max(a / b for a, b in zip(results.values(arm, metric), best, strict=True))


def gain(results: Results, arm: str) -> float:
    """The worst over seeds of what an arm's PSNR is above that of Lanczos after back-projection, in dB."""
    pairs = zip(results.values(arm, "psnr"), results.values("upscale-lanczos-projected", "psnr"), strict=True)
    return min(a - b for a, b in pairs)


@benchmark(
    "editing",
    question="On emoji that no run has seen: does the generator enlarge better than Lanczos and fill holes better than OpenCV?",
    passes=[
        PassLine(
            "enlarging 16 -> 64 px: a smaller Fréchet distance than Lanczos",
            lambda r: ratio(r, "distance", "upscale-pagoda", "upscale-lanczos", "upscale-lanczos-projected"),
            at_most=1.0,
        ),
        PassLine(
            "enlarging 16 -> 64 px: a PSNR not below Lanczos after back-projection",
            lambda r: gain(r, "upscale-pagoda"),
            at_least=0.0,
        ),
        PassLine(
            "holes of 25 %: a smaller Fréchet distance than Telea and Navier-Stokes",
            lambda r: ratio(r, "distance", "inpaint-pagoda", "inpaint-telea", "inpaint-navier-stokes"),
            at_most=1.0,
        ),
        PassLine(
            "enlarging: a smaller mean distance in features to the true image than Lanczos",
            lambda r: ratio(r, "feature_error", "upscale-pagoda", "upscale-lanczos", "upscale-lanczos-projected"),
            at_most=1.0,
        ),
        PassLine(
            "holes: a smaller mean distance in features to the true image than Telea and Navier-Stokes",
            lambda r: ratio(r, "feature_error", "inpaint-pagoda", "inpaint-telea", "inpaint-navier-stokes"),
            at_most=1.0,
        ),
        PassLine(
            "no known pixel is changed",
            lambda r: max(r.max(name, "known_pixels_changed") for name in INPAINT if name.startswith("inpaint-pagoda")),
            at_most=0,
        ),
        PassLine(
            "any edit of one 64 px image within 3 s",
            lambda r: max(
                r.max("cost", f"seconds_{edit}")
                for edit in ("reconstruct", "transfer", "inpaint", "upscale", "interpolate_8")
            ),
            at_most=3.0,
        ),
        PassLine(
            "the same where no label is given and the class is guessed",
            lambda r: max(
                r.max("cost", f"seconds_{edit}_unlabelled") for edit in ("reconstruct", "inpaint", "upscale")
            ),
            at_most=3.0,
        ),
        PassLine(
            "with the encoder in one call: reconstruction and transfer within 0.3 s",
            lambda r: max(r.max("cost", f"seconds_{edit}_amortised") for edit in ("reconstruct", "transfer")),
            at_most=0.3,
        ),
        PassLine(
            "with the encoder in one call: filling and enlarging within 0.3 s",
            lambda r: max(r.max("cost", f"seconds_{edit}_amortised") for edit in ("inpaint", "upscale")),
            at_most=0.3,
        ),
        PassLine(
            "with the encoder in one call: an enlargement of a smaller Fréchet distance than Lanczos",
            lambda r: ratio(r, "distance", "upscale-pagoda-one-call", "upscale-lanczos", "upscale-lanczos-projected"),
            at_most=1.0,
        ),
        PassLine(
            "with the encoder in one call: an enlargement of a PSNR not below Lanczos after back-projection",
            lambda r: gain(r, "upscale-pagoda-one-call"),
            at_least=0.0,
        ),
    ],
)
def editing(budget: float) -> dict[str, Arm]:
    """Arms over one held-out emoji in three; a small budget takes fewer of them, and a run of fewer steps."""
    opencv()  # before any training
    count = max(16, round(len(source(1)) * min(1.0, 4 * budget) / ONE_IN))
    arms: dict[str, Arm] = {name: partial(upscale_arm, make, name, count, budget) for name, make in UPSCALE.items()}
    arms |= {name: partial(inpaint_arm, make, name, count, budget) for name, make in INPAINT.items()}
    return {**arms, "cost": partial(cost_arm, count, budget)}
