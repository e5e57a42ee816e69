"""Edits with a teacher that was trained elsewhere keep what edits promise, whatever kind of network inverts and draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_adopted import AdoptedRuns
from tests.tiny_teachers import SIZE, TEACHERS, WITH_CLASSES

from pagoda import PagodaEditPipeline
from pagoda.diffusion import Condition
from pagoda.stages.context import load_teacher
from pagoda.stages.editing import edit_noise
from pagoda.stages.encode import invert_images
from pagoda.stages.sampling import load_generator
from pagoda.steering.fitting import to_tensor

LARGE = 2 * SIZE


@pytest.fixture(scope="module", params=list(TEACHERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(kind: str, adopted_runs: AdoptedRuns) -> PagodaEditPipeline:
    return PagodaEditPipeline.from_pretrained(adopted_runs[kind])


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A slope with some grain, far from black and white, so that nothing is clamped."""
    down, across = np.mgrid[0:height, 0:width] / max(width, height)
    grain = np.random.default_rng(seed).integers(-9, 9, (height, width, 3))
    return Image.fromarray(
        (np.stack([60 + 130 * across, 190 - 130 * down, 90 + 0 * down], -1) + grain).clip(0, 255).astype(np.uint8)
    )


def shown(kind: str, label: int) -> int | None:
    return label if kind in WITH_CLASSES else None


@torch.no_grad()
def test_a_reconstruction_is_the_generator_s_image_of_the_teacher_s_latent(
    kind: str, pipeline: PagodaEditPipeline, adopted_runs: AdoptedRuns
) -> None:
    run, image, label = adopted_runs[kind], photo(LARGE, LARGE), shown(kind, 3)
    condition = Condition.of_labels(None if label is None else [label])
    small = to_tensor(pipeline.editor.downsampler(image, SIZE))
    config = run.config()
    z = invert_images(config, load_teacher(run.teacher)[0], small, condition, edit_noise(config, small))
    made = pipeline.reconstruct(image, label=label).square
    torch.testing.assert_close(made, load_generator(run)(z, condition).clamp(-1, 1), atol=1e-5, rtol=0)


def test_known_pixels_of_a_filled_image_come_back_byte_for_byte(kind: str, pipeline: PagodaEditPipeline) -> None:
    image, keep = photo(30, 20), np.ones((20, 30), bool)
    keep[6:12, 8:15] = False
    edited = pipeline.inpaint(image, keep, label=shown(kind, 3), steps=2)
    made, before = np.asarray(edited.image), np.asarray(image)
    assert np.array_equal(made[keep], before[keep])
    assert not np.array_equal(made[~keep], before[~keep])
    assert pipeline.editor.encoder.fingerprint in edited.facts["drawn_by"]  # by the teacher that was brought
    assert edited.square.isfinite().all()


def test_an_enlarged_image_reduces_to_the_small_one(kind: str, pipeline: PagodaEditPipeline) -> None:
    image = photo(SIZE, SIZE)
    edited = pipeline.upscale(image, label=shown(kind, 3), steps=2)
    assert edited.square.shape == (1, 3, LARGE, LARGE)
    reduced = pipeline.editor.downsampler(edited.image, SIZE)
    assert np.abs(reduced.astype(int) - np.asarray(image)).max() <= 1  # bytes, rounded on the way up and down


def test_the_ends_of_a_way_are_the_reconstructions(kind: str, pipeline: PagodaEditPipeline) -> None:
    images, labels = (photo(LARGE, LARGE), photo(24, 20, seed=1)), (shown(kind, 3), shown(kind, 8))
    way = pipeline.interpolate(*images, frames=3, labels=labels)
    for end, image, label in ((way.frames[:1], images[0], labels[0]), (way.frames[-1:], images[1], labels[1])):
        assert torch.equal(end, pipeline.reconstruct(image, label=label, fit="pad").square)
    assert not torch.equal(way.frames[1], way.frames[0])
