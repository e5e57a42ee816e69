"""Guidance in one step for texts, and the weights that captioned images are told the discriminator with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.conftest import text_config

from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.images import read_metadata
from pagoda.networks import TokenDiscriminator
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.agreement import NEAREST, AgreementWeights, agreement_encoder, agreement_weights
from pagoda.stages.assignment import GuidedInputs, guided_inputs
from pagoda.stages.captions import prompt_condition
from pagoda.stages.config import RunConfig
from pagoda.stages.context import load_teacher, open_context
from pagoda.stages.distill import build_objective
from pagoda.stages.latent_inputs import LatentInputs
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teacher_pairs import make_teacher_pairs
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom


def guided_texts(**changes: object) -> RunConfig:
    common = {
        "guidance__scale_max": 4.0,
        "guidance__assignment": "matched",
        "distill__mode": "both",
        "distill__teacher_pairs__count": 24,
        "distill__teacher_pairs__num_nodes": 4,
        "distill__matching__weight": 1.0,
        "distill__matching__start": 0.5,
        "distill__loss__adversarial_from": 0.0,
        "grow__loss__adversarial_from": 0.0,
        "evaluation__gap__fractions": [],
    }
    return text_config(**{**common, **changes})


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of texts under guidance that went all the way, its weights matched to the captions."""
    return train(guided_texts(), str(tmp_path_factory.mktemp("guided-texts") / "run"), quiet=True)


def agreement_of(scores: torch.Tensor, taught: torch.Tensor, weights: torch.Tensor) -> AgreementWeights:
    return AgreementWeights(lambda rows: scores[rows], len(scores), taught, weights)


def draws(assignment: AgreementWeights, indices: torch.Tensor, step: int = 0) -> torch.Tensor:
    random = StepRandom(0, step, len(indices), slice(0, len(indices)))
    _, told = assignment(random, indices, torch.zeros(len(indices), 1), Condition(pooled=torch.zeros(len(indices), 2)))
    assert told.pooled is not None
    assert told.guidance is not None
    return told.guidance


def test_where_the_weight_decides_the_agreement_an_image_is_told_the_weight_of_its_own() -> None:
    weights = 1 + 3 * torch.rand(4000)
    scores = torch.tensor([0.1, 0.2, 0.3])
    found = draws(agreement_of(scores, weights / 10, weights), torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 3.0, 2.0]), atol=0.02, rtol=0)


def test_images_beyond_all_of_the_teachers_are_told_the_weights_at_that_end() -> None:
    weights = torch.linspace(1, 4, 401)
    found = draws(agreement_of(torch.tensor([-1.0, 1.0]), weights / 10, weights), torch.tensor([0, 1]).repeat(50))
    assert float(found[::2].max()) <= float(weights[NEAREST - 1])
    assert float(found[1::2].min()) >= float(weights[-NEAREST])
    assert len(found[::2].unique()) > 1  # one of the nearest, not always the same


def test_where_guidance_does_nothing_for_the_agreement_the_weights_keep_their_law() -> None:
    weights, taught = 1 + 3 * torch.rand(4000), torch.randn(4000) / 10
    found = draws(agreement_of(torch.randn(3000) / 10, taught, weights), torch.arange(3000))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(found.quantile(quantiles), 1 + 3 * quantiles, atol=0.1, rtol=0)


def test_few_images_of_the_teacher_will_do_and_each_image_is_scored_once() -> None:
    asked: list[int] = []

    def score(rows: torch.Tensor) -> torch.Tensor:
        asked.extend(rows.tolist())
        return rows / 10

    found = AgreementWeights(score, 5, torch.tensor([0.1]), torch.tensor([2.5]))
    assert draws(found, torch.tensor([3, 3, 0])).tolist() == [2.5, 2.5, 2.5]
    assert draws(found, torch.tensor([0, 4, 3]), step=1).tolist() == [2.5, 2.5, 2.5]
    assert sorted(asked) == [0, 3, 4]
    assert "0.100 at weights from 2.50 to 2.50" in found.describe()


def test_the_scores_are_the_angles_between_pictures_and_captions(guided_run: RunFolder) -> None:
    context = open_context(guided_run, guided_run.config(), Runtime("cpu"), quiet=True)
    encoder, captions = agreement_encoder(context, None), context.captions
    assert encoder is not None
    assert captions is not None
    agreement = agreement_weights(context, encoder)
    rows = torch.tensor([5, 0, 17])
    texts = encoder.embed_texts([captions.texts[row] for row in captions.rows[rows].tolist()])
    wanted = (encoder.embed_images(context.data.images(rows, 8)) * texts).sum(1)
    torch.testing.assert_close(agreement.scores(rows), wanted, atol=1e-5, rtol=0)
    alone = agreement_weights(context, encoder)
    assert torch.equal(alone.scores(rows[:1]), agreement.scores(rows)[:1])  # whatever company it was first met in
    _, images, told = make_teacher_pairs(context).get(torch.tensor([7]))
    own = (encoder.embed_images(images) * encoder.embed_texts([captions.texts[int(captions.rows[7])]])).sum()
    place = int((agreement.weights == told.guidance).nonzero())  # type: ignore[arg-type]
    torch.testing.assert_close(agreement.agreement[place], own, atol=1e-5, rtol=0)
    store = LatentStore.open(guided_run.latents)
    assert isinstance(guided_inputs(context.config, LatentInputs(store), store, match=agreement), GuidedInputs)


def test_one_step_answers_to_prompt_and_weight_from_python_and_from_the_command(
    guided_run: RunFolder, tmp_path: Path
) -> None:
    for stage in ("distill", "grow-16"):
        record = guided_run.record(stage)
        assert record is not None
        assert record["inputs"]["match"]
        assert record["settings"]["guidance"] == {"scale_max": 4.0, "assignment": "matched"}
    generator = load_generator(guided_run)
    assert generator.guidance_max == 4
    told = prompt_condition(guided_run, ["a red circle", "a blue star"])
    one, three = (sample_images(generator, [0, 1], condition=told, guidance=w) for w in (1.0, 3.0))
    assert float((one - three).abs().max()) > 1e-6
    pipeline = PagodaPipeline.from_pretrained(guided_run.path)
    made = pipeline(prompt=["a red circle", "a blue star"], guidance_scale=3.0, output_type="pt").images
    assert torch.equal(torch.as_tensor(made), three)
    target = tmp_path / "made.png"
    arguments = ["sample", str(guided_run.path), "--n", "2", "--prompt", "a red circle", "--guidance", "3", "--out"]
    assert main([*arguments, str(target)]) == 0
    assert read_metadata(target)["guidance"] == 3


def test_tokens_judge_under_guidance(tmp_path: Path) -> None:
    config = guided_texts(guidance__assignment="independent", distill__loss__heads="tokens", evaluation__gap__count=0)
    run = train(config, str(tmp_path / "run"), until="distill", quiet=True)
    assert run.is_done("distill")
    context = open_context(run, config, Runtime("cpu"), quiet=True)
    denoiser, _ = load_teacher(run.teacher)
    store = LatentStore.open(run.latents)
    judge = build_objective(context, denoiser, guided_inputs(config, LatentInputs(store), store), None).discriminator
    assert judge is not None
    assert isinstance(judge.heads, TokenDiscriminator)
    assert judge.heads.guided is not None


def test_a_run_of_matched_weights_stops_and_continues_to_the_same_weights(
    guided_run: RunFolder, tmp_path: Path
) -> None:
    parts = train(guided_texts(), str(tmp_path / "run"), until="distill", quiet=True)
    parts = train(guided_texts(), str(tmp_path / "run"), quiet=True)
    for stage in ("distill", "grow-16"):
        whole, part = guided_run.record(stage), parts.record(stage)
        assert whole is not None
        assert part is not None
        assert whole["results"]["hash"] == part["results"]["hash"]


def test_matched_weights_go_with_latents_which_are_decoded() -> None:
    assert dataclasses.replace(guided_texts(), codec="somewhere").guidance.assignment == "matched"
