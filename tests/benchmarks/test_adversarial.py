"""Arms with judges: settings that a run accepts, the same octave below, and how often judges are right, read from a run's own log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.heart import win_rates

from benchmarks import adversarial, adversarial_emoji, prior_gap
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder


@pytest.mark.parametrize("arm", adversarial_emoji.ARMS)
def test_only_the_last_octave_of_a_run_is_changed(arm: str) -> None:
    run = preset_config("small", "shapes:count=40", base=16, size=64)
    config = adversarial_emoji.config_of(run, adversarial_emoji.ARMS[arm], 7)
    assert config.grow.loss_of(0) == run.grow.loss_of(0)
    assert config.grow.octave(0)["steps"] == run.grow.octave(0)["steps"]
    assert config.grow.octave(1)["steps"] == 7
    last = config.grow.loss_of(1)
    assert (last.adversarial > 0) == (arm != "reconstruction")
    assert (last.adversarial_from, last.adversarial_every) == (0.0, 1)


@pytest.mark.parametrize("arm", adversarial.ARMS)
def test_arms_on_drawn_shapes_are_settings_that_a_run_accepts(arm: str) -> None:
    config = adversarial.config_of(0, 1.0, 32, adversarial.ARMS[arm], 7)
    assert config.grow.loss_of(0).adversarial == config.grow.loss.adversarial
    assert (config.grow.loss_of(1).adversarial > 0) == (arm != "reconstruction")


@pytest.mark.parametrize("mode", prior_gap.MODES)
def test_ways_of_closing_the_gap_are_settings_that_a_run_accepts(mode: str) -> None:
    config = prior_gap.config_of(500, mode, 0, 1.0, "")
    assert (config.distill.loss.adversarial > 0) == mode.startswith("judged")


def test_a_copy_of_a_run_without_its_last_octave_has_all_that_was_before_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "whole")
    kept = [
        "config.yaml",
        "generator-16/config.json",
        "generator-32/config.json",
        "stages/grow-32.json",
        "latents/store.json",
    ]
    gone = [
        "generator-64/config.json",
        "stages/grow-64.json",
        "checkpoints/grow-64/x",
        "samples/a.png",
        "metrics.jsonl",
    ]
    for name in kept + gone:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("{}")
    copy = adversarial_emoji.without_last(run, tmp_path)
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == set(kept)


def test_win_rates_are_those_before_and_after_the_generator_is_told(tmp_path: Path) -> None:
    rows = [
        {"stage": "distill", "step": 10, "discriminator/win_rate": 0.5},
        {"stage": "distill", "step": 20, "discriminator/win_rate": 0.8},
        {"stage": "distill", "step": 30, "discriminator/win_rate": 0.7, "generator/adversarial": 0.1},
        {"stage": "distill", "step": 40, "discriminator/win_rate": 0.6, "generator/adversarial": 0.1},
        {"stage": "grow-16", "step": 10, "generator/pixel": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = RunFolder(tmp_path)
    assert win_rates(run, "distill") == {"win_rate_first": 0.5, "win_rate_told": 0.7, "win_rate_last": 0.6}
    assert win_rates(run, "grow-16") == {}
