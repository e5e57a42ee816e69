"""Teachers from elsewhere that were trained on texts: told captions by their own encoders, distilled into a generator of prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import TINY
from tests.tiny_teachers import DATA, SIZE, make_teacher
from tests.tiny_text_teachers import LENGTH, embed, load, make_text_pipeline

from pagoda import PagodaPipeline
from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition, GuidedDenoiser
from pagoda.errors import ArtifactError, ConfigError
from pagoda.export import export_folder
from pagoda.files import save_tensors
from pagoda.networks import open_teacher
from pagoda.stages.adopt import teacher_settings
from pagoda.stages.captions import encoder_folder, open_captions, prompt_condition
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher
from pagoda.stages.pipeline_texts import PipelineTextEncoder, copy_texts
from pagoda.stages.plan_hardware import Limits
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

KINDS = ("sd", "sd3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text-teachers")
    return {kind: make_text_pipeline(root / kind, kind) for kind in KINDS}


def config_for(folder: Path, **changes: object) -> RunConfig:
    """8 -> 16 px in a few steps; keys of `changes` are dotted with `__`."""
    settings = {key: value for key, value in TINY.items() if not key.startswith("teach.")}
    given = {"condition": "text", **{key.replace("__", "."): value for key, value in changes.items()}}
    settings |= {**teacher_settings(str(folder), given), "encode.num_nodes": 8, **given}
    return override(preset_config("tiny", DATA, base=SIZE, size=2 * SIZE), settings)


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Runs that went all the way; the folder that their teacher came from is gone."""
    found = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        shutil.copytree(folders[kind], root / "source")
        guided = {"guidance__scale_max": 3.0} if kind == "sd" else {}
        judged = {"distill__loss__adversarial": 0.1, "distill__loss__adversarial_from": 0.0}
        found[kind] = train(config_for(root / "source", **guided, **judged), str(root / "run"), quiet=True)
        shutil.rmtree(root / "source")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_of_a_pipeline_has_its_own_encoders_and_the_networks_that_the_run_leaves(
    kind: str, folders: dict[str, Path], runs: dict[str, RunFolder]
) -> None:
    guided = {"guidance__scale_max": 3.0} if kind == "sd" else {}
    limits = Limits(disk_bytes=1 << 50, memory_bytes=1 << 50)
    plan = plan_run(config_for(folders[kind], **guided), probe_seconds=0, limits=limits)
    assert [stage.name for stage in plan.stages] == ["text", "teach", "encode", "distill", "grow-16"]
    text, teach = plan.stages[:2]
    assert text.trained == teach.trained == 0
    assert text.parameters == PipelineTextEncoder(folders[kind]).num_parameters > 0
    assert text.disk_bytes > 4 * text.parameters, "the run keeps a copy of them"
    for stage, size in zip(plan.stages[3:], (SIZE, 2 * SIZE), strict=True):
        written = sum(path.stat().st_size for path in runs[kind].generator(size).rglob("*.safetensors"))
        assert stage.disk_bytes == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_told_as_the_pipeline_tells_them(
    kind: str, folders: dict[str, Path], runs: dict[str, RunFolder]
) -> None:
    pipeline = load(folders[kind])
    table = open_captions(runs[kind], runs[kind].config())
    assert table is not None
    found, expected = table.condition(torch.tensor([3, 0])), embed(pipeline, table.captions(torch.tensor([3, 0])))
    assert found.tokens_mask is not None
    assert bool(found.tokens_mask.all())
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-3, atol=1e-3)  # kept in half precision
    assert (found.pooled is None) == (expected.pooled is None)
    x, sigma = torch.randn(2, 3, SIZE, SIZE), 2.0
    ours, _ = load_teacher(runs[kind].teacher)
    theirs = open_teacher(folders[kind], null_condition="zeros").denoiser
    with torch.no_grad():
        exact = theirs(x, sigma, expected)
        torch.testing.assert_close(ours(x, sigma, found), exact, rtol=0, atol=2e-3)
        other = theirs(x, sigma, embed(pipeline, ["x", "y"]))
    assert float((exact - other).abs().max()) > 0.02  # the words do matter


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_text_is_the_empty_prompt(kind: str, folders: dict[str, Path], runs: dict[str, RunFolder]) -> None:
    pipeline = load(folders[kind])
    ours, _ = load_teacher(runs[kind].teacher)
    told = prompt_condition(runs[kind], ["red circle", "blue star"])
    x, empty = torch.randn(2, 3, SIZE, SIZE), embed(pipeline, ["", ""])
    with torch.no_grad():
        plain = open_teacher(folders[kind], null_condition="zeros").denoiser(x, 2.0, empty)
        for without in (told.null(), Condition()):
            torch.testing.assert_close(ours(x, 2.0, without), plain, rtol=0, atol=2e-3)
        half = ours(x, 2.0, told.drop_rows(torch.tensor([True, False])))
        torch.testing.assert_close(half[:1], ours(x[:1], 2.0), rtol=0, atol=1e-5)
        torch.testing.assert_close(half[1:], ours(x[1:], 2.0, told[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_captions_a_pipeline_is_told_its_empty_prompt(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = {key: value for key, value in TINY.items() if not key.startswith("teach.")} | {"teacher.labels": False}
    settings = plain | teacher_settings(str(folders[kind]))
    config = override(preset_config("tiny", DATA, base=SIZE, size=SIZE), settings)
    run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
    train(config, str(tmp_path / "run"), until="teach", quiet=True)  # it is the same teacher again
    x, pipeline = torch.randn(2, 3, SIZE, SIZE), load(folders[kind])
    ours, theirs = load_teacher(run.teacher)[0], open_teacher(folders[kind], null_condition="zeros").denoiser
    with torch.no_grad():
        expected = theirs(x, 2.0, embed(pipeline, ["", ""]))
        assert float((theirs(x, 2.0) - expected).abs().max()) > 0.01  # zeros are something else
        torch.testing.assert_close(ours(x, 2.0), expected, rtol=0, atol=2e-3)
    # What its owner has put beside it comes first.
    source = shutil.copytree(folders[kind], tmp_path / "source")
    rows = {name: row[0] for name, row in embed(pipeline, ["star"]).slots().items()}
    save_tensors(source / "null_condition.safetensors", rows)
    told = override(config, {"teacher.path": str(source)})
    other = train(told, str(tmp_path / "other"), until="teach", quiet=True)
    with torch.no_grad():
        starry = theirs(x, 2.0, embed(pipeline, ["star", "star"]))
        torch.testing.assert_close(load_teacher(other.teacher)[0](x, 2.0), starry, rtol=0, atol=1e-5)
    (source / "null_condition.safetensors").unlink()
    (source / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no model\.safetensors.*teacher\.null_condition=FILE"):
        train(told, str(tmp_path / "third"), until="teach", quiet=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_reads_prompts_without_the_teachers_folder(
    kind: str, runs: dict[str, RunFolder], tmp_path: Path
) -> None:
    run = runs[kind]
    assert run.generator_sizes() == [SIZE, 2 * SIZE]
    generator = load_generator(run)
    told = prompt_condition(run, ["red circle", "blue star"])
    made = sample_images(generator, [4, 4], condition=told)
    assert made.shape == (2, 3, 16, 16)
    assert not torch.equal(made[0], made[1])
    latents = LatentStore.open(run.latents)
    assert run.record("encode")["results"]["round_trip_psnr"] > 20
    assert len(latents) > 0
    again = PagodaPipeline.from_pretrained(run.path)(
        prompt=["red circle", "blue star"], seed=[4, 4], output_type="pt"
    ).images
    assert torch.equal(again, made)
    export_folder(run, tmp_path / "export")
    exported = PagodaPipeline.from_pretrained(tmp_path / "export")
    images = exported(prompt=["red circle", "blue star"], seed=[4, 4], output_type="pt").images
    assert torch.equal(images, made)


@torch.no_grad()
def test_encoders_in_half_precision_are_read_and_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["sd3"], tmp_path / "source")
    pipeline = load(source)
    for name, shards in (("text_encoder", "5GB"), ("text_encoder_2", "1KB")):
        (source / name / "model.safetensors").unlink()
        getattr(pipeline, name).half().save_pretrained(source / name, variant="fp16", max_shard_size=shards)
        getattr(pipeline, name).float()
    stored = {path.name for path in (source / "text_encoder_2").glob("model*")}
    assert len(stored) > 2  # several files and their index
    encoder = PipelineTextEncoder(source)
    found, expected = encoder._texts(["red circle", "star"]), embed(pipeline, ["red circle", "star"])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)
    copy_texts(source, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy" / "text_encoder_2").glob("model*")} == stored
    assert PipelineTextEncoder(tmp_path / "copy").fingerprint == encoder.fingerprint
    # Of a part that is there in full precision too, that is read, and it alone is copied.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders["sd3"] / "text_encoder" / name, source / "text_encoder")
    full = PipelineTextEncoder(folders["sd3"])._texts.parts["text_encoder"].state_dict()
    for name, value in PipelineTextEncoder(source)._texts.parts["text_encoder"].state_dict().items():
        assert torch.equal(value, full[name])
    copy_texts(source, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again" / "text_encoder").glob("model*")] == ["model.safetensors"]
    for file in (source / "text_encoder").glob("model*"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match=r"text_encoder has no model\.safetensors"):
        PipelineTextEncoder(source)


def test_a_finished_run_is_left_as_it_is_and_samples_by_its_command(
    runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["sd"]
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    train(run.config(), str(run.path), quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    words = [
        "sample",
        str(run.path),
        "--n",
        "2",
        "--prompt",
        "red circle",
        "--guidance",
        "2",
        "--out",
        str(tmp_path / "two.png"),
    ]
    assert main(words) == 0, capsys.readouterr().err
    kept = {path.relative_to(encoder_folder(run)).parts[0] for path in encoder_folder(run).rglob("*")}
    assert kept == {"model_index.json", "scheduler", "text_encoder", "tokenizer"}
    facts = json.loads((run.teacher / "denoiser.json").read_text())
    assert facts["text_encoder"] == PipelineTextEncoder(encoder_folder(run)).fingerprint


def test_guided_inversion_leaves_from_the_empty_prompt(runs: dict[str, RunFolder]) -> None:
    ours, _ = load_teacher(runs["sd"].teacher)
    told = prompt_condition(runs["sd"], ["red circle"])
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        plain, with_text = ours(x, 2.0), ours(x, 2.0, told)
        guided = GuidedDenoiser(ours, 2.5)(x, 2.0, told)
    torch.testing.assert_close(guided, plain + 2.5 * (with_text - plain), rtol=0, atol=1e-4)


def test_long_captions_are_counted_by_the_pipelines_own_tokeniser(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in KINDS:
        encoder = PipelineTextEncoder(folders[kind])
        assert encoder.max_tokens == LENGTH
        caplog.clear()
        encoder.embed(["ab", "a" * LENGTH, "b" * (LENGTH - 1)])
        assert [record.message.split(" texts")[0] for record in caplog.records] == ["2 of 3"]


def test_a_teacher_of_another_run_is_told_the_texts_of_its_encoder(text_run: RunFolder, tmp_path: Path) -> None:
    given = {
        "condition": "text",
        "text.encoder": str(text_run.path / "text" / "encoder"),
        "text.max_tokens": text_run.config().text.max_tokens,
    }
    settings = {**TINY, **teacher_settings(str(text_run.teacher), given), **given}
    config = override(preset_config("tiny", DATA, base=SIZE, size=SIZE), settings)
    run = train(config, str(tmp_path / "run"), until="distill", quiet=True)
    theirs, ours = load_teacher(text_run.teacher)[0], load_teacher(run.teacher)[0]
    told = prompt_condition(run, ["red circle", "star"])
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(ours(x, 1.0, told), theirs(x, 1.0, told))
    assert load_generator(run).token_dim


def test_what_cannot_be_told_is_refused_before_anything_is_made(
    folders: dict[str, Path], text_run: RunFolder, tmp_path: Path
) -> None:
    plain = make_teacher(tmp_path / "plain", "text-unet")
    with pytest.raises(ConfigError, match=r"set text\.encoder=teacher"):
        override(
            preset_config("tiny", DATA, base=SIZE, size=SIZE), {"condition": "text", "teacher.path": str(folders["sd"])}
        )
    folder = without_tokenizer(folders["sd"], tmp_path / "no-tokeniser")
    settings = teacher_settings(str(folders["sd"]), {"condition": "text"}) | {
        "condition": "text",
        "teacher.path": str(folder),
    }
    config = override(preset_config("tiny", DATA, base=SIZE, size=SIZE), {**TINY, **settings})
    with pytest.raises(ArtifactError, match="nothing can read captions as the teacher does"):
        train(config, str(tmp_path / "a"), quiet=True)
    with pytest.raises(ConfigError, match=r"teacher\.null_condition=zeros is for a teacher that is told one text"):
        config_for(folders["sd"], teacher__null_condition="zeros")
    with pytest.raises(ConfigError, match=r"teacher\.null_class=last: the teacher knows no classes"):
        train(config_for(folders["sd"], teacher__null_class="last"), str(tmp_path / "d"), quiet=True)
    with pytest.raises(ConfigError, match=r"leave text\.max_tokens"):
        config_for(folders["sd"], text__max_tokens=20)
    clip = str(folders["sd"].parent / "clip")
    with pytest.raises(ConfigError, match="does not say which encoder its texts are from"):
        train(config_for(plain, text__encoder=clip), str(tmp_path / "b"), quiet=True)
    with pytest.raises(ConfigError, match=r"was trained on texts of the encoder [0-9a-f]+, .*text/encoder"):
        train(config_for(text_run.teacher, text__encoder=clip), str(tmp_path / "c"), quiet=True)
    with pytest.raises(ConfigError, match="a teacher that is brought"):
        override(preset_config("tiny", DATA, base=SIZE, size=SIZE), {"condition": "text", "text.encoder": "teacher"})
    assert not list(tmp_path.glob("*/teacher"))


def test_the_command_chooses_the_encoder_of_the_teacher(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", DATA, "--out", "nowhere", "--base", str(SIZE), "--size", "16", "--preset", "tiny", "--dry-run"]
    assert main([*words, "--teacher", str(folders["sd"]), "--condition", "text"]) == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["text"]["encoder"] == "teacher"
    assert main([*words, "--teacher", str(folders["sd"]), "--condition", "text", "--text-encoder", "elsewhere"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["text"]["encoder"] == "elsewhere"
    assert main([*words, "--teacher", str(folders["sd"]), "--set", "teacher.null_condition=zeros"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["text"]["encoder"] == "two-tower"  # a run of labels


def without_tokenizer(folder: Path, target: Path) -> Path:
    """A copy of a pipeline whose text encoder has no tokeniser."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    index["tokenizer"] = [None, None]
    (target / "model_index.json").write_text(json.dumps(index))
    return target
