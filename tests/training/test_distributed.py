"""Two processes compute what one does with the same global batch: a small objective, and the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_config

from pagoda.errors import ConfigError
from pagoda.stages.config import to_yaml
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.training import Runtime

SMALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from pagoda.data.order import batch_indices
from pagoda.training import LoopConfig, Losses, MetricLog, Objective, OptimizerConfig, Runtime, Trainable, Trainer

torch.set_num_threads(1)
out, micro_batches, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = torch.linspace(-1, 1, 40).reshape(10, 4)

class Regression(Objective):
    def __init__(self):
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
        self.second = nn.Linear(4, 4)

    def trainables(self):
        return {
            "first": Trainable(self.first, OptimizerConfig(lr=1e-2, clip=0.1), ema=0.9),
            "second": Trainable(self.second, OptimizerConfig(lr=1e-2, name="radam", clip=0.0)),
        }

    def batch(self, indices, random):
        return data[indices] + 0.1 * random.normal("noise", 4)

    def losses(self, name, batch, random, runtime):
        if name == "second" and random.step % 2:
            return None
        module = self.first if name == "first" else self.second
        return Losses((module(batch) - random.normal("target", 4)).square().mean())

runtime = Runtime("cpu")
trainer = Trainer(
    Regression(),
    LoopConfig(steps=steps, batch_size=8, micro_batches=micro_batches, checkpoint_every=3, preview_every=0),
    runtime=runtime, folder=out, stage="test", seed=7,
    order=lambda step, size: batch_indices(7, step, size, len(data)),
    log=MetricLog(out / "metrics.jsonl", "test") if runtime.is_main else None,
)
trainer.run()
tensors = {f"{n}.{k}": v for n, s in trainer.states.items() for k, v in s.module.state_dict().items()}
tensors |= {f"ema.{k}": v for k, v in trainer.states["first"].ema.module.state_dict().items()}
save_file(tensors, out / f"rank{runtime.rank}-of-{runtime.world_size}.safetensors")
"""

WHOLE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from pagoda.stages.config import RunConfig, from_dict, read_yaml
from pagoda.stages.train import train
train(from_dict(RunConfig, read_yaml(Path(sys.argv[1]))), sys.argv[2], quiet=True)
"""


def start(processes: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def train_small(
    folder: Path, processes: int, *, micro_batches: int = 1, steps: int = 10
) -> list[dict[str, torch.Tensor]]:
    """Weights of every process after training in `folder`."""
    folder.mkdir(exist_ok=True)
    script = folder / "small.py"
    script.write_text(SMALL)
    result = start(processes, script, folder, micro_batches, steps)
    assert result.returncode == 0, result.stderr
    return [load_file(folder / f"rank{rank}-of-{processes}.safetensors") for rank in range(processes)]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_train_like_one_with_the_same_batch(tmp_path: Path) -> None:
    (alone,) = train_small(tmp_path / "one", 1)
    first, second = train_small(tmp_path / "two", 2, micro_batches=2)
    assert_close(first, second)
    assert_close(alone, first)
    start_weights = train_small(tmp_path / "short", 1, steps=1)[0]
    assert not torch.allclose(alone["first.0.weight"], start_weights["first.0.weight"], atol=1e-3)
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10]  # one process writes


def test_a_run_of_two_processes_is_continued_by_one(tmp_path: Path) -> None:
    (alone,) = train_small(tmp_path / "one", 1, steps=10)
    script = tmp_path / "two" / "small.py"
    script.parent.mkdir()
    # Stopped after its second checkpoint, as if killed: the schedule of the learning rate is that of the whole run.
    stop = "trainer.save, save = (lambda: (save(), sys.exit(0)) if trainer.step >= 6 else save()), trainer.save\n"
    script.write_text(SMALL.replace("trainer.run()\n", stop + "trainer.run()\n"))
    result = start(2, script, tmp_path / "two", 1, 10)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two" / "checkpoints" / "step-00000006").is_dir()
    (continued,) = train_small(tmp_path / "two", 1, steps=10)
    assert_close(alone, continued)


def test_every_row_of_a_batch_belongs_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime("cpu")
    monkeypatch.setattr(Runtime, "world_size", 3)
    rows: list[int] = []
    for rank in range(3):
        monkeypatch.setattr(Runtime, "rank", rank)
        rows += range(12)[runtime.rows(12)]
    assert rows == list(range(12))
    with pytest.raises(ConfigError, match="batch_size 8 is not divisible by 3 processes"):
        runtime.rows(8)


def test_an_error_of_the_first_process_ends_the_others_too(tmp_path: Path) -> None:
    """The others wait for it at a barrier; they must not wait for ever."""
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(data=str(tmp_path / "nowhere"))))
    (tmp_path / "whole.py").write_text(WHOLE)
    result = start(2, tmp_path / "whole.py", tmp_path / "config.yaml", tmp_path / "run")
    assert result.returncode == 1
    assert "DataError: there is no file or folder" in result.stderr


@pytest.fixture(scope="module")
def shared_run(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of `finished_run`, made by two processes."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "config.yaml").write_text(to_yaml(finished_run.config()))
    (folder / "whole.py").write_text(WHOLE)
    for _ in range(2):  # the second time it finds everything done
        result = start(2, folder / "whole.py", folder / "config.yaml", folder / "run")
        assert result.returncode == 0, result.stderr
    return RunFolder.open(folder / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_two_processes_go_the_whole_way_like_one(finished_run: RunFolder, shared_run: RunFolder) -> None:
    for stage in ("teach", "encode", "distill", "grow-16"):
        assert shared_run.is_done(stage)
    assert shared_run.config() == finished_run.config()
    ours, theirs = weights(shared_run.teacher), weights(finished_run.teacher)
    # Sums in another order, which Adam's division by small moments makes larger: 4e-7 when this was written.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    for size in (8, 16):
        made = [sample_images(load_generator(run, size), range(20)) for run in (shared_run, finished_run)]
        # The cached inputs of `grow` are half floats, which turn last bits into 1e-5; the images' own std is 1e-2.
        torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)


def test_two_processes_go_the_way_of_the_presets_like_one(tmp_path: Path) -> None:
    """With the teacher's pairs, distribution matching and consistent targets, which `tiny` has and `finished_run` has not."""
    config = tiny_config(
        distill__mode="both",
        distill__teacher_pairs__count=24,
        distill__teacher_pairs__num_nodes=3,
        distill__loss__adversarial=0.0,
        distill__loss__adversarial_from=0.0,
        distill__matching__weight=2.0,
        distill__matching__start=0.5,
        grow__loss__adversarial=0.0,
        grow__loss__adversarial_from=0.0,
        grow__targets="consistent",
        # Adam's first steps go by signs, which the order of a sum can turn: at usual rates one number of 15,360 lay beyond the bound.
        distill__optimizer__lr=5e-4,
        distill__matching__optimizer__lr=5e-4,
        grow__optimizer__lr=5e-4,
        evaluation__gap__count=0,
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "whole.py").write_text(WHOLE)
    for processes in (1, 2):
        result = start(processes, tmp_path / "whole.py", tmp_path / "config.yaml", tmp_path / f"run-{processes}")
        assert result.returncode == 0, result.stderr
    runs = [RunFolder.open(tmp_path / f"run-{processes}") for processes in (1, 2)]
    matched = [json.loads(line) for line in runs[1].metrics.read_text().splitlines()]
    assert any("generator/matching" in line for line in matched)
    for size in (8, 16):
        made = [sample_images(load_generator(run, size), range(20)) for run in runs]
        torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)


def test_every_shard_is_written_once_and_every_file_by_one_process(
    finished_run: RunFolder, shared_run: RunFolder
) -> None:
    def listing(run: RunFolder) -> set[str]:
        return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}

    assert listing(shared_run) == listing(finished_run)
    for path in sorted(finished_run.latents.glob("*.safetensors")):
        ours, theirs = load_file(shared_run.latents / path.name), load_file(path)
        assert torch.equal(ours["index"], theirs["index"])
        torch.testing.assert_close(ours["z"].float(), theirs["z"].float(), atol=5e-3, rtol=0)  # half precision
    ours, theirs = (
        [json.loads(line) for line in run.metrics.read_text().splitlines()] for run in (shared_run, finished_run)
    )
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
