"""Runs of texts on the latents of a codec: what compares images with captions looks at decoded pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import TEXT
from tests.stages.test_image_text import Mean
from tests.stages.test_latent_runs import latent_config, save_codec

from pagoda.networks import num_parameters, open_codec
from pagoda.stages.agreement import agreement_encoder, agreement_weights, embed
from pagoda.stages.captions import prompt_condition
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher, open_context
from pagoda.stages.image_text import ImageTextTerm
from pagoda.stages.plan_hardware import Limits
from pagoda.stages.planning import plan_run
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom


def config_of(codec: Path) -> RunConfig:
    settings = {
        **TEXT,
        "distill.loss.image_text": 0.5,
        "grow.loss.image_text": 0.5,
        "guidance.scale_max": 4.0,
        "guidance.assignment": "matched",
        "distill.mode": "both",
        "distill.teacher_pairs.count": 24,
        "distill.teacher_pairs.num_nodes": 4,
        "evaluation.gap.count": 0,
    }
    return override(latent_config(codec), settings)


@pytest.fixture(scope="module")
def latent_text_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of texts on latents that went all the way. Read it, do not write into it."""
    folder = tmp_path_factory.mktemp("latent-texts")
    return train(config_of(save_codec(folder / "codec")), str(folder / "run"), quiet=True)


def test_the_distance_to_a_caption_is_that_of_the_decoded_picture_and_its_gradient_reaches_the_latents(
    tmp_path: Path,
) -> None:
    codec = open_codec(save_codec(tmp_path))
    texts, rows = torch.tensor([[1.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    on_latents, on_pictures = ImageTextTerm(Mean(), texts, rows, codec), ImageTextTerm(Mean(), texts, rows)
    random, targets = StepRandom(0, 0, 2, slice(0, 2)), on_latents.targets(torch.tensor([0, 1]))
    latents = torch.randn(2, 4, 40, 40, requires_grad=True)  # pictures of 80 px: seen through a window
    found = on_latents.distance(latents, targets, random)
    assert torch.equal(found, on_pictures.distance(codec.decode(latents), targets, random))
    (gradient,) = torch.autograd.grad(found.sum(), latents)
    (expected,) = torch.autograd.grad(on_pictures.distance(codec.decode(latents), targets, random).sum(), latents)
    torch.testing.assert_close(gradient, expected)
    assert float(gradient.abs().max()) > 0


def test_a_run_of_texts_on_latents_is_held_to_its_captions_and_makes_pictures(latent_text_run: RunFolder) -> None:
    lines = [json.loads(line) for line in latent_text_run.metrics.read_text(encoding="utf-8").splitlines()]
    stages = {line["stage"] for line in lines if any("image_text" in key for key in line)}
    assert stages == {"distill", "grow-8"}
    generator = load_generator(latent_text_run)
    condition = prompt_condition(latent_text_run, ["a purple circle in the centre"])
    images = sample_images(generator, [0], condition=condition)
    assert images.shape == (1, 3, 16, 16)


def test_agreement_is_that_of_decoded_pictures(latent_text_run: RunFolder) -> None:
    context = open_context(latent_text_run, latent_text_run.config(), Runtime("cpu"), quiet=True)
    encoder = agreement_encoder(context, None)
    assert encoder is not None
    assert context.captions is not None
    rows = torch.tensor([5, 0])
    pictures = context.codec.decode(context.data.images(rows, 4))
    texts = encoder.embed_texts(context.captions.captions(rows))
    expected = (embed(encoder, pictures) * texts).sum(1)
    torch.testing.assert_close(agreement_weights(context, encoder).scores(rows), expected, atol=1e-5, rtol=0)


def test_a_plan_of_texts_on_latents_has_the_networks_that_the_run_leaves(latent_text_run: RunFolder) -> None:
    config = override(latent_text_run.config(), {"guidance.assignment": "independent"})
    plan = plan_run(config, probe_seconds=0, limits=Limits(disk_bytes=1 << 50, memory_bytes=1 << 50))
    stages = {stage.name: stage for stage in plan.stages}
    assert {"latents", "text", "teach", "grow-8"} <= set(stages)
    teacher, _ = load_teacher(latent_text_run.teacher)
    assert stages["teach"].parameters == num_parameters([teacher])
    grown = num_parameters([load_generator(latent_text_run, 8)])
    assert stages["grow-8"].disk_bytes == pytest.approx(4 * grown, rel=0.05)
