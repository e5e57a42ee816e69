"""What every technique keeps to, alone and beside every other one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.pretraining.tiny import ACTIVE, make_trainer, weights_of

from pagoda.errors import ConfigError
from pagoda.pretraining import (
    TECHNIQUES,
    CepConfig,
    DdaePlusConfig,
    DitMoeConfig,
    DtrConfig,
    RepaConfig,
    SwitchDitConfig,
    TechniqueConfig,
    build_techniques,
)
from pagoda.stages.config import RunConfig, from_dict, read_technique, to_dict

NEUTRAL: dict[str, TechniqueConfig] = {
    "repa": RepaConfig(weight=0.0),
    "cep": CepConfig(gamma=0.0),
    "dtr": DtrConfig(beta=1.0),
    "switch_dit": SwitchDitConfig(num_experts=0),
    "dit_moe": DitMoeConfig(layers="none"),
    "ddae_plus": DdaePlusConfig(self_condition=False, contrastive=0.0),
}
"""Each at the setting at which it must change nothing."""
CONFLICTS = {frozenset({"dtr", "switch_dit"})}
"""Pairs that are refused; all others work together."""
PAIRS = list(itertools.combinations(sorted(TECHNIQUES), 2))
LAUNCH = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from tiny import ACTIVE, make_trainer, weights_of
torch.set_num_threads(1)
out = Path(sys.argv[1])
for name, config in ACTIVE.items():
    trainer = make_trainer([config], out / name, steps=3)
    trainer.run()
    rank, size = trainer.runtime.rank, trainer.runtime.world_size
    save_file(weights_of(trainer), out / f"{name}-{rank}-of-{size}.safetensors")
"""


def test_every_technique_is_in_this_contract() -> None:
    assert set(ACTIVE) == set(NEUTRAL) == set(TECHNIQUES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run without techniques."""
    trainer = make_trainer([], tmp_path_factory.mktemp("plain"))
    trainer.run()
    return weights_of(trainer) | {f"ema.{k}": v for k, v in weights_of(trainer, averaged=True).items()}


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_the_neutral_setting_is_the_plain_run_bit_for_bit(
    name: str, plain: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trainer = make_trainer([NEUTRAL[name]], tmp_path)
    trainer.run()
    found = weights_of(trainer) | {f"ema.{k}": v for k, v in weights_of(trainer, averaged=True).items()}
    assert all(torch.equal(value, found[key]) for key, value in plain.items())


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_at_work_it_changes_the_run(name: str, plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trainer = make_trainer([ACTIVE[name]], tmp_path)
    trainer.run()
    found = weights_of(trainer)
    assert any(
        key not in found or not torch.equal(value, found[key]) for key, value in plain.items() if "ema" not in key
    )
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_resume_continues_bitwise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_trainer([ACTIVE[name]], tmp_path / "whole")
    whole.run()
    stopped = make_trainer([ACTIVE[name]], tmp_path / "parts")
    save = stopped.save

    def save_and_stop() -> None:
        save()
        if stopped.step >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    continued = make_trainer([ACTIVE[name]], tmp_path / "parts")
    assert continued.resume() == 4
    continued.run()
    for averaged in (False, True):
        ours, theirs = weights_of(whole, averaged=averaged), weights_of(continued, averaged=averaged)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    everything = [run.states["teacher"].module.state_dict() for run in (whole, continued)]
    assert all(torch.equal(everything[0][key], everything[1][key]) for key in everything[0])


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_the_global_generator_is_left_alone(name: str, tmp_path: Path) -> None:
    """Whoever draws from it next, as dropout does, draws what it would have drawn without the technique."""
    states = []
    for configs in ([], [ACTIVE[name]]):
        trainer = make_trainer(configs, tmp_path / str(len(configs)), steps=2)
        before = torch.get_rng_state()
        trainer.run()
        states.append((before, torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_work_together_or_are_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    configs = [ACTIVE[name] for name in pair]
    if frozenset(pair) in CONFLICTS:
        for order in (configs, configs[::-1]):
            with pytest.raises(
                ConfigError, match=rf"`({pair[0]}|{pair[1]})` and `({pair[0]}|{pair[1]})` cannot be combined"
            ):
                build_techniques(order)
        return
    trainer = make_trainer(configs, tmp_path, steps=2)
    trainer.run()
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_a_configuration_goes_to_plain_values_and_back(name: str) -> None:
    run = RunConfig(data="shapes", base=8, size=8, techniques=(ACTIVE[name],))
    assert from_dict(RunConfig, to_dict(run)) == run
    assert read_technique(name) == TECHNIQUES[name]()
    with pytest.raises(ConfigError, match=f"unknown key `{name}.wrong`"):
        read_technique({name: {"wrong": 1}})
    with pytest.raises(ConfigError, match=f"technique `{name}` is listed 2 times"):
        RunConfig(data="shapes", base=8, size=8, techniques=(ACTIVE[name], ACTIVE[name]))


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH)
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        tiny = Path(__file__).parents[1] / "pretraining"
        command = [sys.executable, *launcher, str(script), str(tmp_path / str(processes)), str(tiny)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0, result.stderr
    for name in ACTIVE:
        alone = load_file(tmp_path / "1" / f"{name}-0-of-1.safetensors")
        for rank in range(2):
            shared = load_file(tmp_path / "2" / f"{name}-{rank}-of-2.safetensors")
            # Sums in another order, which Adam's division by small moments makes larger.
            apart = {key: float((shared[key] - value).abs().max()) for key, value in alone.items()}
            assert max(apart.values()) < 2e-5, (name, rank, max(apart, key=apart.__getitem__))
