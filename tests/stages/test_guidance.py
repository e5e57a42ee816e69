"""Guidance in one step: what each pair was encoded under reaches the generator, and a run without guidance is what it was."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda import PagodaEditPipeline
from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition, GuidedDenoiser, build_solver, invert
from pagoda.errors import ArtifactError, ConfigError
from pagoda.images import read_metadata, to_pil
from pagoda.networks import model_hash
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.assignment import GuidedInputs, IndependentWeights, MatchedWeights, TeacherImages, guided_inputs
from pagoda.stages.comparison import run_scores
from pagoda.stages.context import StageContext, load_teacher, open_context
from pagoda.stages.distill import build_objective, distill
from pagoda.stages.encode import inversion_grid, start_noise
from pagoda.stages.guidance import pair_weights, stored_condition
from pagoda.stages.latent_inputs import LatentInputs
from pagoda.stages.plan_calls import encode_calls, pair_calls
from pagoda.stages.planning import plan_run
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.recorded_settings import stage_settings
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teacher_pairs import TeacherPairs, make_teacher_pairs, pair_noise, sampling_grid
from pagoda.stages.train import train
from pagoda.training import Runtime, StepRandom

GUIDED = {
    "guidance__scale_max": 4.0,
    "distill__mode": "both",
    "distill__teacher_pairs__count": 24,
    "distill__teacher_pairs__num_nodes": 4,
    "evaluation__gap__fractions": [],
}


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny_config(**GUIDED), str(tmp_path_factory.mktemp("guided") / "run"), quiet=True)


def start_anew(run: RunFolder, folder: Path) -> Path:
    """A copy of a run that has its teacher and latents, and no generator yet."""
    copy = shutil.copytree(run.path, folder / "run")
    for path in (copy / "generator-8", copy / "generator-16", copy / "prior-gap"):
        shutil.rmtree(path)
    for stage in ("distill", "grow-16"):
        (copy / "stages" / f"{stage}.json").unlink()
    return copy


def context_of(run: RunFolder) -> StageContext:
    return open_context(run, run.config(), Runtime("cpu"), quiet=True)


def test_every_latent_keeps_the_weight_that_it_was_encoded_under(guided_run: RunFolder) -> None:
    context, store = context_of(guided_run), LatentStore.open(guided_run.latents)
    indices, flips = torch.tensor([0, 3, 39, 3]), torch.tensor([0, 0, 1, 1])
    condition = stored_condition(store, context.condition, indices, flips)
    assert condition.guidance is not None
    assert torch.equal(condition.guidance, pair_weights(context.config, indices, flips))
    images = context.data.images(indices, 8, flips.bool())
    denoiser, _ = load_teacher(guided_run.teacher)
    config = context.config
    with torch.no_grad():
        z = invert(
            GuidedDenoiser(denoiser, None),
            images,
            sigmas=inversion_grid(config.encode, config.sigma_max),
            condition=condition,
            solver=build_solver(config.encode.solver),
            noise=start_noise(config.seed, indices, flips, (3, 8, 8)),
        )
    torch.testing.assert_close(store.get(indices, flips), z, atol=4e-3, rtol=1e-3)  # stored in half precision


def test_weights_are_drawn_from_one_to_the_largest_and_differ_between_an_image_and_its_mirror() -> None:
    config = tiny_config(guidance__scale_max=3.0)
    rows = torch.arange(2000)
    weights = pair_weights(config, rows, torch.zeros_like(rows))
    assert 1 <= float(weights.min()) < 1.01
    assert 2.99 < float(weights.max()) <= 3
    assert float(weights.mean()) == pytest.approx(2, abs=0.05)
    assert not torch.equal(weights[:5], pair_weights(config, rows[:5], torch.ones(5)))


def test_the_generator_that_starts_gives_the_images_of_one_without_guidance_for_every_weight(
    guided_run: RunFolder, finished_run: RunFolder
) -> None:
    """Bit for bit, at initialisation: weight 1 and every other one."""
    denoiser, _ = load_teacher(guided_run.teacher)
    starts = []
    for run in (guided_run, finished_run):
        context, store = context_of(run), LatentStore.open(run.latents)
        inputs = guided_inputs(context.config, LatentInputs(store), store)
        starts.append(build_objective(context, denoiser, inputs, None).generator.eval())
    guided, plain = starts
    z, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 5, -1])
    wanted = plain(z, Condition(label=labels))
    for weights in (None, torch.ones(3), torch.tensor([1.0, 2.5, 4.0])):
        assert torch.equal(guided(z, Condition(label=labels, guidance=weights)), wanted)
    assert plain.guidance_max is None
    assert model_hash(guided.base) == model_hash(plain.base)


def test_a_trained_generator_answers_to_its_weight_at_every_size(guided_run: RunFolder) -> None:
    generator = load_generator(guided_run)
    for size in (8, 16):
        one, two = (sample_images(generator, [0, 1], labels=[0, 1], resolution=size, guidance=w) for w in (1.0, 3.5))
        assert float((one - two).abs().max()) > 1e-6
        assert torch.equal(one, sample_images(generator, [0, 1], labels=[0, 1], resolution=size))  # none is 1


def test_growth_leaves_the_embedding_of_the_weight_as_it_was(guided_run: RunFolder) -> None:
    lower, upper = load_generator(guided_run, 8), load_generator(guided_run, 16)
    assert lower.guided is not None
    assert upper.guided is not None
    assert model_hash(lower.guided) == model_hash(upper.guided)
    assert float(lower.guided.outer.weight.detach().abs().max()) > 0  # it was trained before
    assert model_hash(lower.base) == model_hash(upper.base)
    z, condition = torch.randn(3, 3, 8, 8), Condition(label=torch.arange(3), guidance=torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(lower(z, condition), upper(z, condition, resolution=8))


def test_teachers_pairs_are_guided_by_their_weights(guided_run: RunFolder) -> None:
    context = context_of(guided_run)
    pairs = make_teacher_pairs(context)  # done already
    rows = torch.tensor([2, 7, 11])
    noise, images, condition = pairs.get(rows)
    assert condition.guidance is not None
    assert bool(((condition.guidance > 1) & (condition.guidance < 4)).all())
    assert torch.equal(noise, pair_noise(0, rows, (3, 8, 8)))
    denoiser, _ = load_teacher(guided_run.teacher)
    config = context.config
    from pagoda.diffusion import sample

    with torch.no_grad():
        made = sample(
            GuidedDenoiser(denoiser, None),
            noise,
            sigmas=sampling_grid(config),
            condition=condition,
            solver=build_solver(config.distill.teacher_pairs.solver),
        )
    torch.testing.assert_close(images, made.clamp(-1, 1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("weight", [0.5, 4.5, float("nan")])
def test_weights_outside_of_the_trained_range_are_refused(guided_run: RunFolder, weight: float) -> None:
    pipeline = PagodaPipeline.from_pretrained(guided_run.path)
    assert pipeline.guidance_scale_max == 4
    with pytest.raises(ConfigError, match=r"must lie in \[1, 4\]"):
        pipeline(class_labels=1, guidance_scale=weight)


def test_a_generator_without_guidance_takes_only_a_weight_that_is_none(finished_run: RunFolder) -> None:
    pipeline = PagodaPipeline.from_pretrained(finished_run.path)
    plain = pipeline(class_labels=1, output_type="pt").images
    assert torch.equal(pipeline(class_labels=1, output_type="pt", guidance_scale=1.0).images, plain)
    with pytest.raises(ConfigError, match="trained without guidance"):
        pipeline(class_labels=1, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="no input for the condition `guidance`"):
        pipeline.generator(torch.zeros(1, 3, 8, 8), Condition(guidance=torch.ones(1)))


def test_a_pipeline_that_was_saved_and_loaded_takes_the_same_weights(guided_run: RunFolder, tmp_path: Path) -> None:
    pipeline = PagodaPipeline.from_pretrained(guided_run.path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = PagodaPipeline.from_pretrained(tmp_path / "pipeline")
    images = [p(class_labels=2, guidance_scale=3.0, output_type="pt").images for p in (pipeline, again)]
    assert torch.equal(*images)


def test_the_command_line_samples_under_guidance_and_the_picture_says_so(guided_run: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    assert main(["sample", str(guided_run.path), "--n", "4", "--guidance", "2.5", "--out", str(target)]) == 0
    facts = read_metadata(target)
    assert facts is not None
    assert facts["guidance"] == 2.5
    assert compare_with_run(target, guided_run.path).equal
    assert main(["sample", str(guided_run.path), "--n", "4", "--guidance", "9", "--out", str(target)]) == 1


def test_scores_under_guidance_stand_beside_those_without(guided_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(guided_run.path, tmp_path / "run"))
    options = ["--metrics", "kd", "--features", "random", "--resamples", "0"]
    for model, weight in (("generator", []), ("generator", ["--guidance", "3"]), ("teacher", ["--guidance", "3"])):
        assert main(["evaluate", str(run.path), "--model", model, *weight, *options]) == 0
    scores = run_scores(run)
    assert set(scores) == {"generator-16", "generator-w3-16", "teacher-w3-8"}
    assert scores["generator-w3-16"][0].made_by["sampler"] == "one step, guidance 3"
    assert scores["generator-w3-16"][0].value != scores["generator-16"][0].value
    assert main(["evaluate", str(run.path), "--guidance", "5", *options]) == 1


def test_killed_between_its_parts_a_guided_run_ends_with_the_same_weights(
    guided_run: RunFolder, tmp_path: Path
) -> None:
    folder = start_anew(guided_run, tmp_path)
    next(iter((folder / "latents").glob("latents-00002*"))).unlink()
    shutil.rmtree(folder / "teacher-pairs")
    run = train(tiny_config(**GUIDED), str(folder), quiet=True)
    for stage in ("distill", "grow-16"):
        one, other = (r.record(stage) for r in (run, guided_run))
        assert one is not None
        assert other is not None
        assert one["results"]["hash"] == other["results"]["hash"]


def test_settings_without_guidance_have_the_fingerprint_that_they_had() -> None:
    plain, guided = tiny_config(), tiny_config(guidance__scale_max=2.0)
    for stage in ("teach", "encode", "distill", "grow"):
        assert "guidance" not in stage_settings(plain, stage)
    assert stage_settings(guided, "teach") == stage_settings(plain, "teach")
    for stage in ("distill", "grow"):
        assert stage_settings(guided, stage)["guidance"] == {"scale_max": 2.0, "assignment": "independent"}
    assert stage_settings(guided, "encode")["guidance"] == {"scale_max": 2.0}  # whatever the discriminator is told


def test_latents_without_weights_are_refused_by_a_run_under_guidance(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"guidance"):
        train(tiny_config(guidance__scale_max=2.0), str(tmp_path / "run"), quiet=True)


def test_the_assignment_decides_what_the_discriminator_is_told(guided_run: RunFolder) -> None:
    context, store = context_of(guided_run), LatentStore.open(guided_run.latents)
    random = StepRandom(0, 3, 8, slice(0, 8))
    indices = torch.arange(8)
    images, condition = context.load(8, indices, torch.zeros(8, dtype=torch.bool))

    same, told = IndependentWeights(4.0)(random, indices, images, condition)
    assert torch.equal(same, images)
    assert told.guidance is not None
    assert not torch.equal(told.guidance, pair_weights(context.config, indices, torch.zeros(8)))

    pairs = make_teacher_pairs(context)
    replaced, told = TeacherImages(pairs)(random, indices, images, condition)
    rows = random.integers("real", len(pairs))
    assert torch.equal(replaced, pairs.get(rows)[1])
    assert torch.equal(told.guidance, pairs.get(rows)[2].guidance)  # type: ignore[arg-type]

    class Brightness:
        fingerprint = "brightness"

        def __call__(self, images: torch.Tensor, condition: Condition) -> torch.Tensor:
            return 1 + images.flatten(1).mean(1).clamp(0, 1)

    _, told = MatchedWeights(Brightness(), 4.0)(random, indices, images, condition)
    assert torch.equal(told.guidance, Brightness()(images, condition))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"must lie in \[1, 1.0"):
        MatchedWeights(Brightness(), 1.0001)(random, indices, images, condition)

    inputs = guided_inputs(context.config, LatentInputs(store), store)
    assert isinstance(inputs, GuidedInputs)
    paired = inputs.paired(indices, torch.zeros(8, dtype=torch.bool), condition)
    assert torch.equal(paired.guidance, store.guidance(indices))  # type: ignore[arg-type]


def test_a_matched_assignment_trains_with_its_function_and_is_refused_without(
    guided_run: RunFolder, tmp_path: Path
) -> None:
    class Always:
        fingerprint = "always 2"

        def __call__(self, images: torch.Tensor, condition: Condition) -> torch.Tensor:
            return torch.full((len(images),), 2.0)

    config = tiny_config(guidance__scale_max=4.0, guidance__assignment="matched", distill__loss__adversarial_from=0.0)
    run = RunFolder(start_anew(guided_run, tmp_path))
    with pytest.raises(ConfigError, match=r"or a function from images to weights"):
        train(config, str(run.path), until="distill", quiet=True)
    assert run.record("distill") is None  # refused before anything began
    train(config, str(run.path), until="encode", quiet=True)  # up to here nobody needs it
    distill(context_of(run), match=Always())
    record = run.record("distill")
    assert record is not None
    assert record["done"]
    assert record["inputs"]["match"] == "always 2"


def test_the_teachers_images_can_stand_in_for_real_ones(guided_run: RunFolder, tmp_path: Path) -> None:
    config = tiny_config(
        **{**GUIDED, "distill__mode": "rec"},
        guidance__assignment="teacher",
        grow__loss__adversarial=0.0,
        distill__loss__adversarial_from=0.0,
        evaluation__gap__count=0,
    )
    run = train(config, str(start_anew(guided_run, tmp_path)), until="distill", quiet=True)
    assert len(TeacherPairs(LatentStore.open(run.teacher_pairs), None, 0)) == 24
    assert run.is_done("distill")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance__scale_max": 0.5}, "scale_max must be 1"),
        ({"guidance__assignment": "teacher"}, "says nothing without guidance"),
        ({"guidance__scale_max": 2.0, "guidance__assignment": "clip"}, "unknown guidance.assignment"),
        ({"guidance__scale_max": 2.0, "teach__condition_dropout": 0.0}, "condition_dropout"),
        ({"guidance__scale_max": 2.0, "guidance__assignment": "teacher"}, "no images of 16 px"),
        (
            {"guidance__scale_max": 2.0, "guidance__assignment": "teacher", "distill__loss__adversarial": 0.0},
            "distill.loss.adversarial above 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_images_without_labels_cannot_be_guided(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(16):
        Image.new("RGB", (16, 16), (15 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    config = tiny_config(guidance__scale_max=2.0, data=str(tmp_path / "images"))
    with pytest.raises(ConfigError, match="no labels to be guided by"):
        train(config, str(tmp_path / "run"), quiet=True)


def test_a_plan_counts_both_calls_of_guidance(finished_run: RunFolder) -> None:
    plain, guided = tiny_config(distill__mode="both"), tiny_config(distill__mode="both", guidance__scale_max=2.0)
    assert encode_calls(guided) == 2 * encode_calls(plain)
    assert pair_calls(guided) == 2 * pair_calls(plain)
    assert plan_run(guided, probe_seconds=0).multiply_adds > plan_run(plain, probe_seconds=0).multiply_adds


def test_an_exported_program_takes_the_weight_as_an_input(guided_run: RunFolder, tmp_path: Path) -> None:
    from pagoda.export import export_program

    exported = export_program(load_generator(guided_run), tmp_path / "program.pt2", size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(exported.path).module()
    z, labels, weights = torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), torch.tensor([1.0, 3.0])
    wanted = load_generator(guided_run)(z, Condition(label=labels, guidance=weights), resolution=8)
    torch.testing.assert_close(module(z, labels, weights), wanted, atol=1e-5, rtol=0)


def test_edits_are_encoded_and_made_under_the_weight_that_is_told(
    guided_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = PagodaEditPipeline.from_pretrained(guided_run.path)
    generator, encoder = pipeline.editor.generator, pipeline.editor.encoder
    image = to_pil(torch.rand(1, 3, 16, 16) * 2 - 1)[0]
    small = pipeline.editor.downsampler.tensor(torch.rand(1, 3, 16, 16) * 2 - 1, 8)
    plain = pipeline.reconstruct(image, label=3)
    assert torch.equal(pipeline.reconstruct(image, label=3, guidance_scale=1.0).square, plain.square)
    assert "guidance" not in plain.facts
    fresh = pipeline.transfer(image, 5, label=3, strength=1.0, seed=7, guidance_scale=3.0)
    assert torch.equal(fresh.square, sample_images(generator, [7], labels=[5], guidance=3.0))
    assert (fresh.facts["shows"], fresh.facts["to"], fresh.facts["guidance"]) == (3, 5, 3.0)

    told = Condition(label=torch.tensor([3]), guidance=torch.tensor([3.0]))
    with torch.no_grad():
        wanted = generator(encoder(small, told), told).clamp(-1, 1)
    made = pipeline.reconstruct(to_pil(small)[0], condition=told).square
    assert torch.equal(made, pipeline.reconstruct(to_pil(small)[0], label=3, guidance_scale=3.0).square)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0.05)  # the image went through bytes
    assert not torch.allclose(made, pipeline.reconstruct(to_pil(small)[0], label=3).square, atol=1e-4)
    way = pipeline.interpolate(image, image, frames=3, labels=(3, 4), guidance_scale=4.0)
    assert torch.equal(way.frames[2:], pipeline.reconstruct(image, label=4, guidance_scale=4.0).square)

    with pytest.raises(ConfigError, match="say the same thing; give one"):
        pipeline.reconstruct(image, condition=told, guidance_scale=3.0)
    for weight in (0.5, 5.0):
        with pytest.raises(ConfigError, match=rf"must lie in \[1, 4\].* got {weight:g}"):
            pipeline.upscale(image.resize((8, 8)), guidance_scale=weight)
    image.save(tmp_path / "x.png")
    for name, more in {"inpaint": ["--hole", "2", "2", "4", "4"], "restore": ["--blur", "3"]}.items():
        command = ["edit", name, str(guided_run.path), str(tmp_path / "x.png"), "--label", "3", "--steps", "1", *more]
        assert main([*command, "--guidance", "2", "--out", str(tmp_path / "y.png")]) == 0, capsys.readouterr().err
        facts = read_metadata(tmp_path / "y.png")
        assert facts is not None
        assert (facts["shows"], facts["guidance"]) == (3, 2.0)


def test_a_weight_is_refused_by_edits_of_a_run_without_guidance(finished_run: RunFolder) -> None:
    pipeline = PagodaEditPipeline.from_pretrained(finished_run.path)
    image = to_pil(torch.rand(1, 3, 16, 16) * 2 - 1)[0]
    plain = pipeline.reconstruct(image, label=3)
    assert torch.equal(pipeline.reconstruct(image, label=3, guidance_scale=1.0).square, plain.square)
    for call in (pipeline.reconstruct, lambda image, **told: pipeline.transfer(image, 4, **told)):
        with pytest.raises(ConfigError, match="a guidance weight of 2 was asked of a network that was trained without"):
            call(image, guidance_scale=2.0)  # type: ignore[operator]
