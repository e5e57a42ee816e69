"""`pagoda classify` and `pagoda probe` on a finished run and on a diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler
from PIL import Image
from tests.tiny_clip import save_tiny_clip
from tests.tiny_diffusers import WIDTH
from tests.tiny_pipelines import stable_diffusion
from tests.understanding.conftest import make_network
from torch import Tensor

from pagoda.cli.main import main
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.stages import classify
from pagoda.stages.classify import ClassifyConfig, classify_images, match_labels
from pagoda.stages.pipeline_texts import PipelineTexts
from pagoda.stages.probe import open_probe
from pagoda.stages.reading import open_readable
from pagoda.stages.run_folder import RunFolder
from pagoda.understanding import Classification, DiffusionClassifier, FeatureTable

Capture = pytest.CaptureFixture[str]
FEW = ClassifyConfig(levels=4)


def write_images(folder: Path, names: tuple[str, ...] = ("a.png", "b.png"), size: int = 12) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_images_of_a_folder_are_classified(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    folder, out = write_images(tmp_path / "images"), tmp_path / "classes.json"
    words = ["classify", str(finished_run.path), str(folder), "--levels", "4", "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    text = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["image"] for row in report["images"]] == ["a.png", "b.png"]
    assert report["accuracy"] is None
    for row in report["images"]:
        assert f"{row['image']}  {row['class']}" in text
        assert 0 < row["probability"] <= 1
        assert row["calls"] <= 40


def test_accuracy_is_told_where_the_labels_are_classes_of_the_model(finished_run: RunFolder) -> None:
    model = open_readable(finished_run.path, device="cpu")
    data = model.images("shapes:count=20,seed=9")
    found = classify_images(model, data, FEW)
    labels = data.labels(torch.arange(20))
    assert torch.equal(match_labels(model.class_names or [], data), labels)
    assert found.accuracy == float((found.classes == labels).double().mean())
    assert not found.calibrated
    assert classify_images(model, data, FEW, calibrate_on=model.images("shapes:count=20,seed=8")).calibrated


def test_a_classification_that_was_stopped_goes_on_with_the_same_command(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "BATCH", 4)
    model = open_readable(finished_run.path, device="cpu")
    data, labelled = (model.images(f"shapes:count=10,seed={seed}") for seed in (9, 8))
    whole = classify_images(model, data, FEW, calibrate_on=labelled, out=tmp_path / "whole.json")
    plain = classify_images(model, data, FEW, calibrate_on=labelled)
    assert whole.to_json() == plain.to_json()
    assert not list(tmp_path.glob("*.partial"))
    predict, calls = DiffusionClassifier.predict, []

    def stopped(self: DiffusionClassifier, images: Tensor, *, seeds: Sequence[int]) -> Classification:
        calls.append(len(images))
        if len(calls) == 4:  # one call calibrates, two answer
            raise KeyboardInterrupt
        return predict(self, images, seeds=seeds)

    monkeypatch.setattr(DiffusionClassifier, "predict", stopped)
    out = tmp_path / "stopped.json"
    with pytest.raises(KeyboardInterrupt):
        classify_images(model, data, FEW, calibrate_on=labelled, out=out)
    rest = tmp_path / "stopped.json.partial"
    with rest.open("a") as file:
        file.write('{"classes": [1')  # killed in the middle of a line
    assert not out.exists()
    with pytest.raises(ArtifactError, match="levels differ"):
        classify_images(model, data, ClassifyConfig(levels=5), calibrate_on=labelled, out=out)
    classify_images(model, data, FEW, calibrate_on=labelled, out=out)
    assert calls == [10, 4, 4, 2, 2]  # the calibration; two batches; the last one, stopped and made again
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert not rest.exists()
    rest.write_text("no facts\n")
    with pytest.raises(ArtifactError, match="cannot be read"):
        classify_images(model, data, FEW, calibrate_on=labelled, out=out)


def test_labels_are_matched_by_name_not_by_number(finished_run: RunFolder, tmp_path: Path) -> None:
    model = open_readable(finished_run.path, device="cpu")
    names = model.class_names
    assert names is not None
    folder = write_images(tmp_path / "two", (f"{names[7]}/x.png", f"{names[2]}/y.png"))
    found = match_labels(names, model.images(str(folder)))
    assert found is not None
    assert sorted(found.tolist()) == [2, 7]
    other = write_images(tmp_path / "other", ("cat/x.png", "dog/y.png"))
    assert match_labels(names, model.images(str(other))) is None


def test_what_cannot_be_classified_ends_with_words(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    folder = write_images(tmp_path / "images")
    assert main(["classify", str(tmp_path), str(folder)]) == 1
    assert "neither a run" in capsys.readouterr().err
    assert main(["classify", str(finished_run.path), str(write_images(tmp_path / "small", size=4))]) == 1
    assert "4x4" in capsys.readouterr().err
    assert main(["classify", str(finished_run.path), str(folder), "--set", "teach.ema=1"]) == 1
    assert "only settings of the source" in capsys.readouterr().err
    assert main(["classify", str(finished_run.path), str(folder), "--risk", "1"]) == 1
    assert "--risk is a chance" in capsys.readouterr().err
    assert main(["classify", str(finished_run.path), str(folder), "--class-names", "cat", "dog"]) == 1
    assert "trained on labels" in capsys.readouterr().err
    plain = tmp_path / "plain"
    shutil.copytree(finished_run.path, plain)
    shutil.rmtree(plain / "teacher")
    DDPMPipeline(make_network("unet", num_classes=0).model, DDPMScheduler()).save_pretrained(plain / "pipeline")
    assert main(["classify", str(plain / "pipeline"), str(folder)]) == 1
    assert "trained without labels" in capsys.readouterr().err


def test_a_diffusers_pipeline_is_read_with_its_own_schedule(tmp_path: Path) -> None:
    model = make_network("unet").model
    DDPMPipeline(model, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "pipeline")
    found = open_readable(tmp_path / "pipeline", device="cpu")
    assert (found.size, found.channels, found.class_names) == (8, 3, ["0", "1", "2", "3"])
    assert found.denoiser.prediction == "eps"
    data = found.images(str(write_images(tmp_path / "images")))
    assert len(classify_images(found, data, FEW).classes) == 2


def test_a_pipeline_of_texts_is_asked_by_its_own_encoder(tmp_path: Path, capsys: Capture) -> None:
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(save_tiny_clip(tmp_path / "clip"))
    tokenizer.model_max_length = 24
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 24}
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=WIDTH, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **small
        )
    )
    pipeline = stable_diffusion(sample_size=8)
    pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model = open_readable(tmp_path / "pipeline", device="cpu")
    assert model.embed is not None
    found = model.embed(["a bird", "x"])
    expected, _ = pipeline.encode_prompt(["a bird", "x"], "cpu", 1, False)
    assert torch.equal(found.tokens, expected)
    empty, _ = pipeline.encode_prompt([""], "cpu", 1, False)
    latents, without = torch.randn(2, 4, 8, 8), Condition(tokens=empty.expand(2, -1, -1))
    assert torch.equal(model.denoiser(latents, 0.5), model.denoiser(latents, 0.5, without))
    data = write_images(tmp_path / "images", ("bird/x.png", "ship/y.png"), size=model.size)
    words = ["classify", str(tmp_path / "pipeline"), str(data), "--levels", "4", "--prompt", "a drawing of a {}"]
    out = tmp_path / "answers.json"
    assert main([*words, "--out", str(out)]) == 0
    capsys.readouterr()
    answers = json.loads(out.read_text())
    config = ClassifyConfig(levels=4, prompts=("a drawing of a {}",), class_names=("bird", "ship"))
    again = classify_images(model, model.images(str(data)), config)
    assert again.class_names == ["bird", "ship"]
    assert [row["class"] for row in answers["images"]] == [again.class_names[k] for k in again.classes]
    with pytest.raises(ConfigError, match="a prompt needs words"):
        model.embed([" "])


def test_a_pipeline_without_a_text_encoder_says_so(tmp_path: Path) -> None:
    stable_diffusion(sample_size=8).save_pretrained(tmp_path / "pipeline")
    assert open_readable(tmp_path / "pipeline", device="cpu").embed is None
    index = {"_class_name": "DDPMPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    with pytest.raises(ConfigError, match="class DDPMPipeline, whose prompts cannot be embedded"):
        PipelineTexts(tmp_path / "pipeline", index)


def test_a_model_of_latents_encodes_the_mean(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(make_network("unet").model, DDPMScheduler()).save_pretrained(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    model = open_readable(tmp_path, device="cpu")
    assert (model.size, model.channels) == (16, 3)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert model.encode is not None
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images), 0.5 * vae.encode(images).latent_dist.mean)
    data = model.images(str(write_images(tmp_path / "images", size=16)))
    assert len(classify_images(model, data, FEW).classes) == 2


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(Exception, match="names no `unet`"):
        open_readable(tmp_path)


# Probes.


def test_a_probe_is_fitted_by_one_command_and_used_by_another(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    out, cache = tmp_path / "probe", tmp_path / "cache"
    fit = [
        "probe",
        "fit",
        str(finished_run.path),
        "--data",
        "shapes:count=60,seed=4",
        "--out",
        str(out),
        "--cache",
        str(cache),
    ]
    assert main([*fit, "--search-count", "40", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    head, facts = open_probe(out)
    assert f"linear head on {head.spec.tap} at sigma {head.spec.sigma:.3g}" in text
    assert (facts["images"], len(facts["class_names"])) == (54, 10)
    assert 0 <= facts["accuracy"] <= 1
    assert {path.name for path in out.iterdir()} == {"head.safetensors", "probe.json", "search.json", "search.png"}
    answers = tmp_path / "answers.json"
    words = ["probe", "predict", str(finished_run.path), "shapes:count=60,seed=4", "--probe", str(out)]
    assert main([*words, "--out", str(answers), "--quiet", "--device", "cpu"]) == 0
    report = json.loads(answers.read_text())
    model = open_readable(finished_run.path, device="cpu")
    data = model.images("shapes:count=60,seed=4")
    cached = FeatureTable.open(cache).features(head.spec.tap, head.spec.sigma)
    guesses = [head.class_names[k] for k in head.predict(cached).tolist()]
    assert sum(a == row["class"] for a, row in zip(guesses, report["images"], strict=True)) >= 59
    truth = [head.class_names[k] for k in data.labels(torch.arange(60)).tolist()]
    right = [row["class"] == name for row, name in zip(report["images"], truth, strict=True)]
    assert report["accuracy"] == pytest.approx(sum(right) / 60)


def test_a_head_of_another_model_is_refused(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "probe"
    fit = ["probe", "fit", str(finished_run.path), "--data", "shapes:count=40,seed=4", "--out", str(out)]
    assert main([*fit, "--tap", "decoder.1", "--log-snr", "2.0", "--head", "knn"]) == 0
    DDPMPipeline(make_network("unet").model, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    words = ["probe", "predict", str(tmp_path / "pipeline"), "shapes:count=20", "--probe", str(out)]
    assert main(words) == 1
    assert "fitted to other features: model was" in capsys.readouterr().err
    assert main(["probe", "predict", str(finished_run.path), "shapes:count=20"]) == 1
    assert "holds no probe" in capsys.readouterr().err
    assert main([*fit, "--tap", "decoder.17"]) == 1
    assert "no part `decoder.17`" in capsys.readouterr().err
    assert main([*fit, "--sigma", "1", "--log-snr", "1"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert main([*fit, "--tap", "decoder.1", "--sigma", "1000"]) == 1
    assert "outside of what this model knows" in capsys.readouterr().err
    assert main(["probe", "fit", str(finished_run.path), "--data", str(write_images(tmp_path / "plain"))]) == 1
    assert "no labels" in capsys.readouterr().err


def test_what_was_found_out_becomes_lines_of_the_report(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    report = copy / "report.html"
    before = report.read_text(encoding="utf-8")
    assert "intrinsic dimension" not in before
    fit = ["probe", "fit", str(copy), "--data", "shapes:count=40,seed=4", "--tap", "decoder.1", "--sigma", "0.2"]
    assert main([*fit, "--device", "cpu"]) == 0
    rank = ["probe", "rank", str(copy), "--data", "shapes:count=20,seed=4", "--n", "1", "--max-rank", "8"]
    assert main([*rank, "--device", "cpu"]) == 0
    assert "sigma" in capsys.readouterr().out
    after = report.read_text(encoding="utf-8")
    assert "linear head on decoder.1 at sigma 0.2" in after
    assert "Directions kept" in after
    facts = json.loads((copy / "probe" / "rank.json").read_text())
    assert facts["size"] == 192
    assert all(0 < value <= 192 for value in facts["rank"])
