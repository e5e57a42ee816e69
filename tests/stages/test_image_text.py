"""Image-text regularisation, and the heads of tokens, in runs of texts."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conftest import text_config, tiny_config

from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks import TokenDiscriminator
from pagoda.stages.config import LossConfig, override
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.distill import build_objective, distill
from pagoda.stages.grow import CachedInputs, grow
from pagoda.stages.image_text import ImageTextTerm, open_image_text
from pagoda.stages.latent_inputs import LatentInputs, open_latents
from pagoda.stages.presets import preset_config
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.train import train
from pagoda.text import ImageTextEncoder
from pagoda.training import StepRandom
from pagoda.training.runtime import Runtime


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """A run of texts whose latents are there."""
    run = train(text_config(), str(tmp_path_factory.mktemp("encoded") / "run"), until="encode", quiet=True)
    return open_context(run, run.config(), Runtime("cpu"), quiet=True)


class Mean(ImageTextEncoder):
    """Images by the angle of their mean: differentiable, in closed form."""

    dim, image_size = 2, 0

    @property
    def fingerprint(self) -> str:
        return "mean"

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        angle = images.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)

    def embed_texts(self, texts: object) -> torch.Tensor:
        raise AssertionError("not needed")


def test_the_term_is_the_squared_angle_to_the_caption_of_each_sample() -> None:
    angles = torch.tensor([0.0, 0.5])
    term = ImageTextTerm(Mean(), torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([1, 0, 1]))
    targets = term.targets(torch.tensor([0, 1]))
    images = torch.full((2, 3, 8, 8), 0.2)
    random = StepRandom(0, 0, 2, slice(0, 2))
    torch.testing.assert_close(
        term.distance(images, targets, random), torch.tensor([0.3, 0.2]).square(), atol=1e-5, rtol=0
    )


def test_large_images_are_seen_through_one_window_of_the_step() -> None:
    term = ImageTextTerm(Mean(), torch.tensor([[1.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    images = torch.linspace(-1, 1, 80)[None, None, :, None].expand(2, 1, 80, 80)
    seen = [
        term.distance(images, term.targets(torch.tensor([0, 1])), StepRandom(0, s, 2, slice(0, 2))) for s in range(6)
    ]
    assert all(float(step[0]) == float(step[1]) for step in seen)
    assert len({round(float(step[0]), 6) for step in seen}) > 1


def test_weight_zero_is_the_run_without_it_and_the_gradient_grows_with_the_weight(encoded: StageContext) -> None:
    loss = dataclasses.replace(encoded.config.distill.loss, image_text=0.5)
    term = open_image_text(encoded, loss)
    assert term is not None
    assert open_image_text(encoded, encoded.config.distill.loss) is None
    denoiser, _ = load_teacher(encoded.run.teacher)
    gradients = {}
    for weight in (None, 0.0, 1.0, 2.0):
        context = dataclasses.replace(
            encoded,
            config=override(
                encoded.config, {"distill.loss.image_text": weight or 0.0, "distill.loss.adversarial": 0.0}
            ),
        )
        inputs = LatentInputs(open_latents(context))
        objective = build_objective(context, denoiser, inputs, None, None if weight is None else term)
        random = StepRandom(0, 3, 8, slice(0, 8))
        losses = objective.losses("generator", objective.batch(torch.arange(8), random), random, Runtime("cpu"))
        assert losses is not None
        losses.total.backward()
        found = [p.grad.flatten() for p in objective.generator.parameters() if p.grad is not None]
        gradients[weight] = torch.cat(found)
        if weight:
            distance = losses.named["image_text"].mean()
            plain = losses.named["reconstruction"].mean() + 0.3 * losses.named["feature"].mean()
            torch.testing.assert_close(losses.total, plain + weight * distance)
    # Samples of the prior share the call, and a batch of another size moves the last bits.
    torch.testing.assert_close(gradients[0.0], gradients[None], atol=1e-5, rtol=1e-3)
    one, two = gradients[1.0] - gradients[None], gradients[2.0] - gradients[None]
    assert one.abs().max() > 0
    torch.testing.assert_close(two, 2 * one, atol=1e-5, rtol=1e-2)


def test_the_pool_of_prior_samples_knows_whose_captions_it_was_made_with() -> None:
    chosen = torch.tensor([4, 2, 9])
    inputs = CachedInputs(
        [torch.zeros(1)], [torch.arange(3.0)], chosen, lambda rows: tiny_condition(rows), rows=lambda i, f: i
    )
    random = StepRandom(0, 0, 6, slice(0, 6))
    (rows,), condition = inputs.prior(random, tiny_condition(torch.zeros(6)))
    assert condition.label is not None
    assert torch.equal(condition.label, chosen[rows.long()])
    assert torch.equal(inputs.prior_images(random, torch.zeros(6)), condition.label)


def tiny_condition(rows: torch.Tensor):  # type: ignore[no-untyped-def]
    from pagoda.diffusion import Condition

    return Condition.of_labels(rows.long())


def test_a_run_with_both_goes_all_the_way_and_notes_the_encoder(encoded: StageContext, tmp_path: Path) -> None:
    shutil.copytree(encoded.run.path, tmp_path / "run")
    changes = {}
    for stage in ("distill", "grow"):
        changes |= {f"{stage}.loss.heads": "tokens", f"{stage}.loss.image_text": 0.1}
        changes |= {f"{stage}.loss.adversarial_from": 0.0}
    run = train(override(encoded.config, changes), str(tmp_path / "run"), quiet=True)
    for stage in ("distill", "grow-16"):
        record = run.record(stage)
        assert record is not None
        assert record["inputs"]["image_text"]
        assert record["settings"][stage.split("-")[0]]["loss"]["heads"] == "tokens"
    lines = (run.metrics).read_text().splitlines()
    assert sum("generator/image_text" in line for line in lines) >= 2
    assert sum("win_rate" in line for line in lines) >= 2


class Brightness(Mean):
    """`Mean` with a vector for texts, and a name of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def fingerprint(self) -> str:
        return self.name

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(texts), 2)


def test_an_encoder_of_ones_own_is_an_input_of_the_stage(encoded: StageContext, tmp_path: Path) -> None:
    shutil.copytree(encoded.run.path, tmp_path / "run")
    settings = {"distill.loss.image_text": 0.5, "distill.loss.adversarial": 0.0}
    context = dataclasses.replace(encoded, run=RunFolder(tmp_path / "run"), config=override(encoded.config, settings))
    distill(context, image_text=Brightness("own"))
    record = context.run.record("distill")
    assert record is not None
    assert record["inputs"]["image_text"] == "own"
    with pytest.raises(ArtifactError, match="image_text"):
        distill(context, image_text=Brightness("another"))
    for stage in (distill, partial(grow, size=16)):
        with pytest.raises(ConfigError, match="whose weight image_text is 0"):
            stage(dataclasses.replace(context, config=encoded.config), image_text=Brightness("own"))


def test_heads_are_those_of_the_configuration(encoded: StageContext) -> None:
    denoiser, _ = load_teacher(encoded.run.teacher)
    config = override(encoded.config, {"distill.loss.heads": "tokens", "distill.loss.adversarial": 0.1})
    context = dataclasses.replace(encoded, config=config)
    objective = build_objective(context, denoiser, LatentInputs(open_latents(context)), None)
    assert objective.discriminator is not None
    assert isinstance(objective.discriminator.heads, TokenDiscriminator)


def test_settings_that_cannot_work_are_refused_and_neutral_ones_leave_no_trace(finished_run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="needs captions"):
        override(tiny_config(), {"grow.loss.image_text": 0.1})
    with pytest.raises(ConfigError, match=r"needs text.encoder=two-tower, got 'folder'"):
        override(text_config(), {"text.encoder": "folder", "text.two_tower": {}, "distill.loss.image_text": 0.1})
    with pytest.raises(ConfigError, match="give the term a weight"):
        LossConfig(image_text_encoder="clip")
    with pytest.raises(ConfigError, match="image_text must be >= 0"):
        LossConfig(image_text=-1.0)
    for stage in ("distill", "grow"):
        assert not {"heads", "image_text", "image_text_encoder"} & set(
            stage_settings(tiny_config(), stage)[stage]["loss"]
        )
    assert finished_run.is_done("distill")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition": "text", "teacher": {"path": "elsewhere"}}, "texts of its own encoder"),
        (
            {
                "condition": "text",
                "guidance": {"scale_max": 4.0, "assignment": "matched"},
                "grow": {"loss": {"adversarial": 0.0}},
            },
            "matched is for the discriminator",
        ),
        (
            {
                "condition": "text",
                "guidance": {"scale_max": 4.0, "assignment": "matched"},
                "distill": {"loss": {"adversarial": 0.1}},
                "text": {"encoder": "elsewhere"},
            },
            r"guidance.image_text_encoder=two-tower needs text.encoder=two-tower, got 'elsewhere'",
        ),
        (
            {"guidance": {"scale_max": 4.0, "image_text_encoder": "clip"}},
            r"guidance.image_text_encoder='clip' is not used by the assignment independent",
        ),
        (
            {
                "guidance": {"scale_max": 4.0, "assignment": "matched", "image_text_encoder": "clip"},
                "distill": {"loss": {"adversarial": 0.1}},
            },
            r"compares images with captions, and this run has labels",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    settings = {**settings, "teach": {"condition_dropout": 0.1}}
    with pytest.raises(ConfigError, match=message):
        override(preset_config("tiny", "images", base=8, size=16), settings)


def test_image_text_is_not_descended_in_separate_updates() -> None:
    with pytest.raises(ConfigError, match="set updates=joint"):
        LossConfig(image_text=0.1, updates="separate")
