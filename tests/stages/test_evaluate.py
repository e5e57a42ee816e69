"""`pagoda evaluate` and `pagoda compare`: the same figures every time, on one process and two; refusals before the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.evaluation import Score, ScoreOptions, load_scores
from pagoda.stages.evaluate import compare_runs, evaluate_run, run_scores
from pagoda.stages.run_folder import RunFolder
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
    script = "import pagoda.stages.evaluate as e, pagoda.stages.judging as j\ne.BATCH, j.JUDGE_STEPS = 7, 5\n"
    (tmp_path / "run.py").write_text(
        script + "import sys\nfrom pagoda.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for path, processes in ((run.path, 1), (tmp_path / "two", 2)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [sys.executable, *(launcher if processes > 1 else []), str(tmp_path / "run.py"), "evaluate", str(path)]
        done = subprocess.run([*words, *options], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((p / "evaluation" / "generator-16.json").read_text()) for p in (run.path, tmp_path / "two"))
    assert one == two


def test_what_cannot_be_scored_is_refused_before_the_work(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'fdd'"):
        evaluate(run, metrics=("fdd",))
    with pytest.raises(ConfigError, match=r"makes images of \[8, 16\] pixels, not 32"):
        evaluate(run, size=32)
    with pytest.raises(ConfigError, match=r"unknown features `rnadom`. Did you mean `random`"):
        evaluate(run, features="rnadom")
    with pytest.raises(ConfigError, match="generator or teacher"):
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
