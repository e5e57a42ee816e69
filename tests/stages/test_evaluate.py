"""`pagoda evaluate` and `pagoda compare`: the same figures every time, on one process and two; refusals before the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_clip import save_tiny_clip

from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.evaluation import (
    FeatureMoments,
    Score,
    ScoreOptions,
    extract_features,
    load_scores,
    open_extractor,
    psnr,
    save_stats,
)
from pagoda.stages.comparison import compare_runs, run_scores
from pagoda.stages.evaluate import evaluate_run
from pagoda.stages.judging import RealImages, open_real
from pagoda.stages.pair_scores import PairOptions
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.training import Runtime

OPTIONS = ScoreOptions(resamples=4, neighbours=2, points=3)


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished_run.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


@pytest.fixture(autouse=True)
def _short_training_of_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.stages.judging.JUDGE_STEPS", 5)


def evaluate(run: RunFolder, **options: object) -> list[Score]:
    settings = {"features": "random", "options": OPTIONS, "metrics": ("fd", "precision"), **options}
    return evaluate_run(run, Runtime("cpu"), **settings)  # type: ignore[arg-type]


def test_the_same_evaluation_twice_agrees_to_the_last_digit_and_is_kept(run: RunFolder) -> None:
    first = evaluate(run)
    assert evaluate(run) == first
    assert load_scores(run.evaluation / "generator-16.json") == first
    assert [s.metric for s in first] == ["FD[random]", "precision[random]"]
    assert first[0].made_by["model"] == run.record("grow-16")["results"]["hash"]  # type: ignore[index]
    record = json.loads((run.evaluation / "generator-16.json").read_text())
    assert record["training_data"] is True
    assert record["pixels"]["contrast_ratio"] > 0
    assert (run.evaluation / "nearest-generator-16.png").is_file()


def test_counts_are_halves_of_the_real_images_and_never_more_than_asked(run: RunFolder) -> None:
    assert (evaluate(run)[0].count_real, evaluate(run)[0].count_fake) == (20, 20)
    assert (evaluate(run, count=8)[0].count_real, evaluate(run, count=8)[0].count_fake) == (20, 8)


def test_other_images_give_another_reference_and_are_told_apart(run: RunFolder) -> None:
    own, other = evaluate(run), evaluate(run, data="shapes:count=40,seed=9")
    assert own[0].reference_fingerprint != other[0].reference_fingerprint
    assert json.loads((run.evaluation / "generator-16.json").read_text())["training_data"] is False


def test_every_size_and_the_teacher_can_be_scored(run: RunFolder) -> None:
    assert evaluate(run, size=8)[0].image_size == 8
    taught = evaluate(run, model="teacher")
    assert taught[0].image_size == 8
    assert taught[0].made_by["sampler"] == "heun, 18 levels"
    assert list(run_scores(run)) == ["generator-8", "teacher-8"]


def test_the_judge_of_labelled_images_is_trained_once_and_kept(run: RunFolder) -> None:
    first = evaluate(run, features="auto")
    assert first[0].extractor == "classifier"
    (folder,) = run.evaluation.glob("judge-16-*")
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert evaluate(run, features="auto") == first
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    assert evaluate(run, features="judge", metrics=("is",))[0].metric == "IS[classifier]"


def test_the_teachers_own_features_can_judge(run: RunFolder) -> None:
    assert evaluate(run, features="teacher")[0].metric == "FD[teacher]"


def test_two_processes_give_the_scores_of_one_to_the_last_digit(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "two")
    # The judge has logits, which are gathered too; batches of 7 give three for two processes.
    options = ["--device", "cpu", "--resamples", "4", "--neighbours", "2", "--metrics", "fd", "kd", "recall", "is"]
    options += ["psnr", "--model", "reconstructions"]
    script = "import pagoda.networks.batches as b, pagoda.stages.judging as j\nb.IMAGES_AT_ONCE, j.JUDGE_STEPS = 7, 5\n"
    (tmp_path / "run.py").write_text(
        script + "import sys\nfrom pagoda.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for path, processes in ((run.path, 1), (tmp_path / "two", 2)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [sys.executable, *(launcher if processes > 1 else []), str(tmp_path / "run.py"), "evaluate", str(path)]
        done = subprocess.run([*words, *options], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        json.loads((p / "evaluation" / "reconstructions-16.json").read_text()) for p in (run.path, tmp_path / "two")
    )
    assert one == two


def test_reconstructions_are_compared_with_their_own_images(run: RunFolder) -> None:
    psnr, ssim = evaluate(run, model="reconstructions", metrics=None)
    assert [s.metric for s in (psnr, ssim)] == ["PSNR", "SSIM"]
    assert psnr.count_fake == psnr.count_real == 20
    assert psnr.floor is None
    assert psnr.notes[0].startswith("PSNR of the same images at 8 px, enlarged to 16 px")
    assert psnr.made_by["teacher"] == run.record("teach")["results"]["hash"]  # type: ignore[index]
    assert psnr.made_by["encoder"]["num_nodes"] == 4
    assert evaluate(run, model="reconstructions", metrics=None) == [psnr, ssim]
    assert evaluate(run, model="reconstructions", metrics=("psnr",), size=8)[0].notes == ()


def test_reconstructions_start_from_the_latents_that_the_run_stored(run: RunFolder) -> None:
    (score,) = evaluate(run, model="reconstructions", metrics=("psnr",))
    real = RealImages.split(open_real(run, run.config(), None, 16, Runtime("cpu")), 16, count=2000, seed=0)
    rows, generator = real.stand_in, load_generator(run)
    with torch.no_grad():
        latents = LatentStore.open(run.latents).get(rows)
        made = generator(latents, Condition.of_labels(real.data.labels(rows))).clamp(-1, 1)
    assert score.value == pytest.approx(psnr(made, real.images(rows)), abs=0.02)  # they are stored in half precision


def test_metrics_of_sets_and_of_pairs_come_in_the_order_that_was_asked(run: RunFolder) -> None:
    found = evaluate(run, model="reconstructions", metrics=("psnr", "fd"))
    assert [s.metric for s in found] == ["PSNR", "FD[random]"]
    assert main(["report", str(run.path)]) == 0
    assert "reconstructions, 16 px" in (run.path / "report.html").read_text()


def test_samples_are_scored_against_the_names_of_their_classes(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    clip = str(save_tiny_clip(tmp_path / "clip"))
    (score,) = evaluate(run, metrics=("clip_score",), pairs=PairOptions(clip=clip, prompt="a {} drawn"))
    assert score.settings == {"texts": "a {} drawn"}
    assert score.floor is not None
    (rebuilt,) = evaluate(run, model="reconstructions", metrics=("clip_score",), pairs=PairOptions(clip=clip))
    assert rebuilt.settings == {"texts": "captions"}
    with pytest.raises(ArtifactError, match="is no folder of a transformers model"):
        evaluate(run, metrics=("clip_score",), pairs=PairOptions(clip=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"must hold \{\} once"):
        PairOptions(prompt="a photo")


def test_what_pairs_need_is_missed_before_the_work(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--model reconstructions"):
        evaluate(run, metrics=("fd", "psnr"))
    monkeypatch.delenv("PAGODA_WEIGHTS_DIR", raising=False)
    with pytest.raises(ArtifactError, match=r"the weights of `vgg16` are missing[\s\S]*397923af"):
        evaluate(run, model="reconstructions", metrics=("lpips",))
    with pytest.raises(ShapeError, match="have 8 a side"):
        evaluate(run, model="reconstructions", metrics=("ssim",), size=8)


def test_published_statistics_take_the_place_of_a_half_of_the_images(run: RunFolder, tmp_path: Path) -> None:
    extractor = open_extractor("random")
    data = open_real(run, run.config(), None, 16, Runtime("cpu"))
    every = extract_features(extractor, [data.images(torch.arange(40), 16)])
    moments = FeatureMoments.from_features(every)
    save_stats(tmp_path / "own.safetensors", moments, extractor, image_size=16)
    (score,) = evaluate(run, metrics=("fd",), reference=str(tmp_path / "own.safetensors"))
    assert (score.count_real, score.count_fake) == (40, 40)
    assert score.floor == pytest.approx(0, abs=1e-6)  # the same images
    np.savez(tmp_path / "bare.npz", mu=moments.mean.numpy(), sigma=moments.covariance().numpy())
    again = evaluate(run, metrics=("fd",), reference=str(tmp_path / "bare.npz"), reference_count=40)
    assert again[0].value == pytest.approx(score.value, rel=1e-9)
    with pytest.raises(DataError, match="how many images"):
        evaluate(run, metrics=("fd",), reference=str(tmp_path / "bare.npz"))
    with pytest.raises(ConfigError, match="`kd` compares with single images"):
        evaluate(run, metrics=("fd", "kd"), reference=str(tmp_path / "own.safetensors"))
    save_stats(tmp_path / "other.safetensors", moments, extractor, image_size=32)
    with pytest.raises(ArtifactError, match="images of 32 px, these have 16"):
        evaluate(run, metrics=("fd",), reference=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="none of them is among psnr"):
        evaluate(run, model="reconstructions", metrics=("psnr",), reference=str(tmp_path / "own.safetensors"))


def test_copies_are_looked_for_among_all_training_images(run: RunFolder) -> None:
    options = ScoreOptions(resamples=4, quantile=0.1)
    (own,) = evaluate(run, metrics=("memorised",), options=options)
    assert own.settings["training_images"] == 40
    assert own.settings["held_out"] is False
    (other,) = evaluate(run, metrics=("memorised",), options=options, data="shapes:count=30,seed=9")
    assert other.settings["training_images"] == 40
    assert other.settings["held_out"] is True
    assert (other.count_real, other.count_fake) == (10, 10)


def test_what_cannot_be_scored_is_refused_before_the_work(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'fdd'"):
        evaluate(run, metrics=("fdd",))
    with pytest.raises(ConfigError, match=r"makes images of \[8, 16\] pixels, not 32"):
        evaluate(run, size=32)
    with pytest.raises(ConfigError, match=r"unknown features `rnadom`. Did you mean `random`"):
        evaluate(run, features="rnadom")
    with pytest.raises(ConfigError, match="generator, teacher, reconstructions"):
        evaluate(run, model="student")
    with pytest.raises(ArtifactError, match=r"there is no file `none\.safetensors`"):
        evaluate(run, features="inception-2015:none.safetensors")
    with pytest.raises(DataError, match="there is no file or folder"):
        evaluate(run, data="nowhere/")


def test_too_few_images_for_the_features_are_noted_with_the_bias(run: RunFolder) -> None:
    (score,) = evaluate(run, metrics=("fd",))
    assert "few for 224 features" in score.notes[0]


def test_runs_are_compared_in_tables_and_refused_when_they_do_not_compare(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run)
    shutil.copytree(run.path, tmp_path / "other")
    text = compare_runs([run.path, tmp_path / "other"])
    assert "## generator, 16 px" in text
    assert "| real against real |" in text
    assert "## Cost" in text
    evaluate(RunFolder.open(tmp_path / "other"), count=8)
    assert main(["compare", str(run.path), str(tmp_path / "other")]) == 1
    assert "count_fake is 20 and 8" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="two runs or more"):
        compare_runs([run.path])
    shutil.rmtree(tmp_path / "other" / "evaluation")
    with pytest.raises(ArtifactError, match="pagoda evaluate"):
        compare_runs([run.path, tmp_path / "other"])


def test_the_command_prints_scores_with_floors_and_writes_the_report(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(run.path), "--features", "random", "--metrics", "fd", "coverage", "--resamples", "3"]
    assert main([*words, "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "20 images of 16 px against 20 real ones, features random" in told
    assert "FD[random] ↓" in told
    assert "real against real" in told
    assert "coverage" in (run.path / "report.html").read_text()


def test_damaged_scores_are_named(run: RunFolder) -> None:
    run.evaluation.mkdir(exist_ok=True)
    (run.evaluation / "generator-16.json").write_text("{")
    with pytest.raises(ArtifactError, match="holds no scores"):
        run_scores(run)
