"""Techniques in real runs: configuration, refusal of another set, what comes after, and the recipe killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_config

from pagoda.api import teach
from pagoda.cli.main import main
from pagoda.data import LatentStore
from pagoda.diffusion import invert, karras_sigmas, sample
from pagoda.diffusion.conditions import Condition
from pagoda.errors import ArtifactError, ConfigError
from pagoda.networks.experts import expert_layers, soft_routing
from pagoda.networks.extended import ExtendedDiT, extension_of
from pagoda.pretraining import CepConfig, DtrConfig
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.train import train

DIT = {
    "backbone.kind": "dit",
    "backbone.hidden_size": 16,
    "backbone.depth": 4,
    "backbone.head_dim": 8,
    "teach.loop.steps": 4,
    "distill.loop.steps": 2,
    "distill.loop.preview_every": 0,
    "teach.loop.preview_every": 4,
}
MOE = {"dit_moe": {"num_experts": 4, "width": 1.0}}


def config(*techniques: Any, **changes: Any) -> RunConfig:
    return override(tiny_config(), {**DIT, "techniques": list(techniques), **changes})


@pytest.mark.parametrize(
    "techniques",
    [
        ["dtr", "cep", {"repa": {"encoders": ["random"]}}],
        ["switch_dit", "cep"],
        [MOE, {"ddae_plus": {"contrastive": 0.1, "head_dim": 8}}],
    ],
    ids=["dtr+cep+repa", "switch_dit+cep", "dit_moe+ddae_plus"],
)
def test_a_teacher_with_techniques_becomes_a_one_step_generator(techniques: list[Any], tmp_path: Path) -> None:
    run = train(config(*techniques), str(tmp_path / "run"), until="distill", quiet=True)
    denoiser, facts = load_teacher(run.teacher)
    model = denoiser.network.model  # type: ignore[union-attr]
    assert isinstance(model, ExtendedDiT)
    names = {path.name for path in run.teacher.iterdir()}
    assert names == {"config.json", "denoiser.json", "diffusion_pytorch_model.extended.safetensors"}
    saved = load_file(run.teacher / "diffusion_pytorch_model.extended.safetensors")
    assert set(saved) == set(model.state_dict())  # no projector, no head, nothing that was trained beside it
    assert [next(iter(entry)) for entry in facts["techniques"]] == [
        t if isinstance(t, str) else next(iter(t)) for t in techniques
    ]  # type: ignore[attr-defined]
    generator = load_generator(run)
    assert isinstance(generator.base, ExtendedDiT)
    assert sample_images(generator, range(4)).shape == (4, 3, 8, 8)
    logged = json.loads(run.metrics.read_text().splitlines()[0])
    assert any(key.count("/") == 2 for key in logged)  # teacher/<technique>/<figure>
    assert (
        f"Technique {next(key for key in logged if key.count('/') == 2).split('/')[1]}"
        in (run.path / "report.html").read_text()
    )


def test_a_run_goes_on_only_with_the_techniques_that_it_started_with(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    train(config("cep"), out, until="teach", quiet=True)
    train(config("cep"), out, until="teach", quiet=True)
    with pytest.raises(ArtifactError, match=r"techniques\.cep\.gamma was 1\.0, is 2\.0"):
        train(config({"cep": {"gamma": 2.0}}), out, until="teach", quiet=True)
    with pytest.raises(ArtifactError, match=r"techniques\.dtr was None, is \{"):
        train(config("cep", "dtr"), out, until="teach", quiet=True)
    with pytest.raises(ArtifactError, match=r"techniques\.cep was \{.*is None|techniques was \{'cep'"):
        train(config(), out, until="teach", quiet=True)


def test_the_order_of_the_list_does_not_make_another_run(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    run = train(config("cep", "dtr"), out, until="teach", quiet=True)
    before = run.record("teach")
    train(config("dtr", "cep"), out, until="teach", quiet=True)
    assert run.record("teach") == before  # neither refused nor trained again


def test_objects_and_names_are_the_same_list() -> None:
    assert config(DtrConfig(), CepConfig()) == config("dtr", "cep") == config({"dtr": None}, {"cep": {}})
    with pytest.raises(ConfigError, match=r"unknown technique `repaa`. Did you mean `repa`"):
        config("repaa")
    with pytest.raises(ConfigError, match="lists names, or a name with its options"):
        config({"cep": {}, "dtr": {}})


def test_the_python_api_takes_techniques(tmp_path: Path) -> None:
    settings = {k: v for k, v in DIT.items() if not k.startswith("distill")} | {
        "teach.loop.steps": 2,
        "teach.loop.batch_size": 4,
    }
    teacher = teach(
        "shapes:count=20",
        size=8,
        out=tmp_path / "run",
        preset="tiny",
        settings=settings,
        techniques=[DtrConfig()],
        quiet=True,
    )
    assert teacher.run.config().techniques == (DtrConfig(),)
    assert len(teacher.sample(2)) == 2


def test_routing_needs_blocks_and_says_so(tmp_path: Path) -> None:
    for name in ("switch_dit", "dit_moe"):
        with pytest.raises(ConfigError, match="need transformer blocks"):
            train(override(tiny_config(), {"techniques": [name]}), str(tmp_path / name), until="teach", quiet=True)


def test_wrong_labels_are_trained_on_and_metrics_see_true_ones(tmp_path: Path) -> None:
    plain = train(config(), str(tmp_path / "plain"), until="teach", quiet=True)
    wrong = train(config(**{"teach.wrong_labels": 0.5}), str(tmp_path / "wrong"), until="teach", quiet=True)
    assert plain.require("teach", "")["results"]["hash"] != wrong.require("teach", "")["results"]["hash"]
    assert "wrong_labels" not in plain.record("teach")["settings"]["teach"]  # type: ignore[index]  # as in earlier versions
    assert wrong.record("teach")["settings"]["teach"]["wrong_labels"] == 0.5  # type: ignore[index]


def test_the_command_lists_every_technique(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["techniques"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("repa", "dtr", "switch_dit", "dit_moe", "cep", "ddae_plus"):
        assert any(line.startswith(f"{name} ") and "needs" in line for line in lines)
    assert main(["techniques", "--options"]) == 0
    assert "gamma = 1.0" in capsys.readouterr().out


def test_a_discontinuous_teacher_goes_there_and_back_nearly_as_well(tmp_path: Path) -> None:
    """Routing by token makes the ODE jump; masks by noise level do not touch the path of a sample."""
    run = train(config(MOE), str(tmp_path / "run"), until="teach", quiet=True)
    denoiser, _ = load_teacher(run.teacher)
    denoiser = denoiser.double()
    assert len(expert_layers(denoiser)) == 4
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1
    sigmas = karras_sigmas(12, sigma_min=0.05)
    condition = Condition.of_labels([0, 1, 2, 3])
    z = invert(denoiser, images, sigmas=sigmas.flip(0), condition=condition)
    back = sample(denoiser, z, sigmas=torch.cat([sigmas, torch.zeros(1).double()]), condition=condition)
    assert (back - images).square().mean().sqrt() < 0.2


def test_masks_of_a_run_are_those_of_its_noise_law(tmp_path: Path) -> None:
    run = train(config("dtr"), str(tmp_path / "run"), until="teach", quiet=True)
    denoiser, _ = load_teacher(run.teacher)
    law = run.config().teach.noise
    index = extension_of(denoiser.network, "task_masks").index  # type: ignore[arg-type]
    assert (index.mean, index.std, index.noise_scale) == (law.mean, law.std, run.config().noise_scale)  # type: ignore[union-attr]


RECIPE = [
    "backbone.hidden_size=16", "backbone.depth=4", "backbone.head_dim=8", "data=shapes:count=40", "device=cpu", "threads=1",
    "teach.loop.steps=18", "teach.loop.batch_size=8", "teach.loop.checkpoint_every=3", "teach.loop.preview_every=0",
    "techniques=[{repa: {encoders: [random], stop: 0.5}}, dtr, {cep: {gamma: 0.5}}]",
]  # fmt: skip


def recipe(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "recipes.techniques", "--out", str(out), "--until", "teach", "--set", *RECIPE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("ab") as log:
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)


def test_the_recipe_killed_and_run_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    assert recipe(tmp_path / "whole").wait(timeout=240) == 0, (tmp_path / "whole.log").read_text()
    part = recipe(tmp_path / "part")
    checkpoints = tmp_path / "part" / "checkpoints" / "teach" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")) and part.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed = part.poll() is None
    os.kill(part.pid, signal.SIGKILL)
    part.wait()
    assert killed, "it ended before it could be killed"
    assert recipe(tmp_path / "part").wait(timeout=240) == 0, (tmp_path / "part.log").read_text()
    hashes = [RunFolder(tmp_path / name).require("teach", "")["results"]["hash"] for name in ("whole", "part")]
    assert hashes[0] == hashes[1]


def test_experts_chosen_by_the_noise_level_are_merged_for_the_generator_and_change_nothing(tmp_path: Path) -> None:
    from pagoda.networks import OneStepGenerator
    from pagoda.stages.distill import student_network

    run = train(config("switch_dit"), str(tmp_path / "run"), until="teach", quiet=True)
    denoiser, _ = load_teacher(run.teacher)
    with torch.no_grad():
        extension_of(denoiser.network, "switch_masks").weight.normal_(std=0.2)  # type: ignore[union-attr, operator]
    options = {"sigma_max": 80.0, **denoiser.preconditioning}
    routed = OneStepGenerator.from_teacher(denoiser.network, **options).eval()  # type: ignore[arg-type]
    dense = OneStepGenerator.from_teacher(student_network(denoiser, 80.0), **options).eval()  # type: ignore[arg-type]
    assert list(dense.base.config.extensions) == ["linear_masks"]
    assert sum(p.numel() for p in dense.parameters()) < sum(p.numel() for p in routed.parameters())
    z, condition = torch.randn(3, 3, 8, 8), Condition.of_labels([0, 1, -1])
    torch.testing.assert_close(dense(z, condition), routed(z, condition), atol=2e-4, rtol=1e-4)
    plain, _ = load_teacher(train(config(), str(tmp_path / "plain"), until="teach", quiet=True).teacher)
    assert student_network(plain, 80.0) is plain.network


def test_soft_routing_is_used_for_latents_and_left_off_afterwards(tmp_path: Path) -> None:
    hard = train(config(MOE), str(tmp_path / "hard"), until="encode", quiet=True)
    soft = train(config(MOE, **{"encode.soft_routing": True}), str(tmp_path / "soft"), until="encode", quiet=True)
    first, second = LatentStore.open(hard.latents), LatentStore.open(soft.latents)
    rows = torch.arange(4)
    assert not torch.equal(first.get(rows, rows * 0), second.get(rows, rows * 0))
    assert "soft_routing" not in first.provenance
    assert second.provenance["soft_routing"] is True
    assert soft.require("encode", "")["results"]["round_trip_psnr"] > 0
    denoiser, _ = load_teacher(soft.teacher)
    layers = expert_layers(denoiser.network)
    with soft_routing(denoiser):
        with soft_routing(denoiser):
            pass
        assert all(layer.soft for layer in layers)
    assert not any(layer.soft for layer in layers)
    with pytest.raises(ConfigError, match="a teacher whose tokens are routed"):
        config(**{"encode.soft_routing": True})
