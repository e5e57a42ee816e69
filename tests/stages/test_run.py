"""The whole way in miniature: what it leaves behind, that it continues bitwise, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_config

from pagoda.errors import ArtifactError, ConfigError, DataError
from pagoda.images import read_metadata
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.stages.config import RunConfig, from_dict, override, read_yaml, to_dict, to_yaml
from pagoda.stages.context import load_teacher
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train


def hashes(run: RunFolder) -> dict[str, str]:
    found = {"teacher": load_teacher(run.teacher)[1]["hash"]}
    for size in run.generator_sizes():
        found[f"generator-{size}"] = model_hash(load_generator(run, size))
    return found


def test_a_run_leaves_everything_behind(finished_run: RunFolder) -> None:
    assert finished_run.generator_sizes() == [8, 16]
    for stage in ("teach", "encode", "distill", "grow-16"):
        assert finished_run.is_done(stage)
        assert finished_run.record(stage)["results"]["seconds"] >= 0
    assert (finished_run.path / "samples" / "final-16.png").is_file()
    assert list(finished_run.samples("teach").glob("ema-*.png"))
    assert not list(finished_run.path.rglob(".writing-*"))
    stages = {json.loads(line)["stage"] for line in finished_run.metrics.read_text().splitlines()}
    assert stages == {"teach", "encode", "distill", "grow-16"}


def test_the_same_command_again_does_nothing(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    train(tiny_config(), str(copy), quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}


def test_frozen_levels_are_bit_identical_after_growth(finished_run: RunFolder) -> None:
    lower, upper = load_generator(finished_run, 8), load_generator(finished_run, 16)
    assert model_hash(lower.base) == model_hash(upper.base)
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lower(z), upper(z, resolution=8))
    assert not torch.equal(upper(z), torch.nn.functional.interpolate(lower(z), scale_factor=2, mode="bilinear"))


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(finished_run: RunFolder, tmp_path: Path) -> None:
    same = train(tiny_config(), str(tmp_path / "same"), quiet=True)
    assert hashes(same) == hashes(finished_run)
    other = train(tiny_config(seed=1), str(tmp_path / "other"), quiet=True, until="teach")
    assert load_teacher(other.teacher)[1]["hash"] != hashes(finished_run)["teacher"]


KILLED = """
import os, pathlib, random, signal, sys, torch
torch.set_num_threads(1)
from pagoda.stages.config import RunConfig, from_dict, read_yaml
from pagoda.stages.train import train
config, moments = from_dict(RunConfig, read_yaml(pathlib.Path(sys.argv[1]))), random.Random(0)

def dying(left):
    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.fsync, os.replace, pathlib.Path.rename = counted(os.fsync), counted(os.replace), counted(pathlib.Path.rename)
    train(config, sys.argv[2], quiet=True)

killed, status = 0, -signal.SIGKILL
while status == -signal.SIGKILL and killed < 20:
    moment = moments.randint(10, 60)
    child = os.fork()  # what was imported need not be imported again
    if child == 0:
        dying(moment)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed += status == -signal.SIGKILL
print(killed)
sys.exit(status)
"""
"""Trains in children that kill themselves just before their n-th flush or rename: in the middle of a checkpoint, a shard, an export.
Prints how many did, until one came to the end."""


def test_killed_at_random_moments_the_run_ends_with_the_same_weights(finished_run: RunFolder, tmp_path: Path) -> None:
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config()))
    command = [sys.executable, "-c", KILLED, str(config), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) >= 3
    assert hashes(RunFolder.open(out)) == hashes(finished_run)


def test_a_run_can_be_taken_one_octave_further(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    before = hashes(RunFolder.open(copy))
    run = train(tiny_config(size=32, grow__steps=[4, 2]), str(copy), quiet=True)
    after = hashes(run)
    assert run.generator_sizes() == [8, 16, 32]
    assert before == {name: after[name] for name in before}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teach__optimizer__lr": 0.5}, "teach.optimizer.lr was 0.003, is 0.5"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"encode__num_nodes": 5}, "encode.num_nodes was 4, is 5"),
        ({"data": "shapes:count=41"}, "data was"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_with_the_difference(
    finished_run: RunFolder, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    before = hashes(RunFolder.open(copy))
    with pytest.raises(ArtifactError, match="was started with another configuration") as error:
        train(tiny_config(**changes), str(copy), quiet=True)
    assert named in str(error.value)
    assert hashes(RunFolder.open(copy)) == before
    assert RunFolder.open(copy).config() == finished_run.config()


def test_settings_that_only_watch_may_change(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    before = hashes(RunFolder.open(copy))
    run = train(tiny_config(teach__loop__log_every=1, grow__cache_gib=1.0), str(copy), quiet=True)
    assert hashes(run) == before
    assert run.config().teach.loop.log_every == 1


def test_latents_of_another_teacher_are_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    for name in ("generator-8", "generator-16"):
        shutil.rmtree(copy / name)
    for name in ("distill", "grow-16"):
        (copy / "stages" / f"{name}.json").unlink()
    other = train(tiny_config(seed=5), str(tmp_path / "other"), quiet=True, until="teach")
    shutil.rmtree(copy / "teacher")
    shutil.copytree(other.teacher, copy / "teacher")
    with pytest.raises(ArtifactError, match="teacher"):
        train(tiny_config(), str(copy), quiet=True)


def test_a_damaged_teacher_is_noticed(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="exchanged or damaged"):
        load_teacher(tmp_path / "teacher")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"diffusion_pytorch_model\.safetensors"):
        load_teacher(tmp_path / "teacher")


def test_a_second_process_in_the_same_folder_is_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    with RunFolder.open(copy).lock(), pytest.raises(ArtifactError, match="another process"):
        train(tiny_config(), str(copy), quiet=True)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="other things"):
        train(tiny_config(), str(tmp_path), quiet=True)
    with pytest.raises(ArtifactError, match="is a file"):
        train(tiny_config(), str(tmp_path / "letter.txt"), quiet=True)


def test_a_target_larger_than_the_images_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"smaller than|at least"):
        train(tiny_config(data="shapes:count=20,size=16", size=32), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 24}, "size must be base x 2"),
        ({"size": 4}, "size must be base x 2"),
        ({"base": 9, "size": 18}, "not divisible by the network's stride 2"),
        ({"encode__sigma_min": 90.0}, "encode.sigma_min must lie between"),
        ({"grow__steps": []}, "steps needs one positive number"),
        ({"distill__loss__adversarial": -1.0}, "adversarial must be >= 0"),
        ({"downsampler": "nearest"}, "nearest"),
        ({"device": "tpu"}, "device must be"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(**changes), str(tmp_path / "run"), quiet=True)


def test_a_configuration_survives_its_own_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config()))
    assert from_dict(RunConfig, read_yaml(path)) == tiny_config()


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `teach\.loop\.batchsize`.*`batch_size`"):
        values = to_dict(tiny_config())
        values["teach"]["loop"]["batchsize"] = 3
        from_dict(RunConfig, values)
    with pytest.raises(ConfigError, match=r"`steps`"):
        override(tiny_config(), {"teach.loop.step": 3})


@pytest.mark.parametrize(
    ("key", "value"), [("base", "8"), ("mirror", 1), ("grow.steps", 3), ("teach", 3), ("seed", 1.5)]
)
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key.split(".")[-1]):
        override(tiny_config(), {key: value})


def test_the_image_of_a_seed_does_not_depend_on_its_batch(finished_run: RunFolder) -> None:
    generator = load_generator(finished_run)
    together = sample_images(generator, range(10), batch_size=10)
    apart = sample_images(generator, [7, 2], batch_size=1, labels=[7, 2])
    torch.testing.assert_close(together[[7, 2]], apart, atol=1e-5, rtol=0)


def test_labels_out_of_range_are_refused(finished_run: RunFolder) -> None:
    generator = load_generator(finished_run)
    with pytest.raises(ConfigError, match=r"labels must lie in 0\.\.9 .* got \[10\]"):
        sample_images(generator, [0, 1], labels=[3, 10])
    with pytest.raises(ConfigError, match="1 labels for 2 seeds"):
        sample_images(generator, [0, 1], labels=[3])


def test_the_encoder_does_not_depend_on_batch_or_shard_size(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    shutil.rmtree(copy / "latents")
    (copy / "stages" / "encode.json").unlink()
    for name in ("distill", "grow-16"):
        (copy / "stages" / f"{name}.json").unlink()
    changed = tiny_config(encode__batch_size=5, encode__shard_size=7)
    train(changed, str(copy), quiet=True, until="encode")

    def read(run: Path) -> dict[tuple[int, int], torch.Tensor]:
        rows = {}
        for path in sorted((run / "latents").glob("*.safetensors")):
            shard = load_file(path)
            for z, index, flip in zip(shard["z"], shard["index"].tolist(), shard["flip"].tolist(), strict=True):
                rows[index, flip] = z.float()
        return rows

    a, b = read(finished_run.path), read(copy)
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 5e-3  # half precision


def test_pictures_say_what_made_them(finished_run: RunFolder) -> None:
    facts = read_metadata(finished_run.path / "samples" / "final-16.png")
    assert facts is not None
    assert facts["seeds"][:3] == [0, 1, 2]
    assert facts["version"]


def test_a_generator_cannot_be_loaded_from_a_pickle(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.generator(8), tmp_path / "g")
    weights = tmp_path / "g" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "g" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        OneStepGenerator.from_pretrained(tmp_path / "g")
    with pytest.raises(ConfigError, match="reads safetensors only"):
        OneStepGenerator.from_pretrained(tmp_path / "g", use_safetensors=False)
