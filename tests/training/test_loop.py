"""The loop by its laws: resume is bitwise, micro-batches do not matter, unhealthy steps are stopped before the update."""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pagoda.data.order import batch_indices
from pagoda.errors import ArtifactError, ConfigError, ResourceError, TrainingError
from pagoda.training import (
    EMA,
    HealthGuard,
    HealthWarning,
    LoopConfig,
    Losses,
    MetricLog,
    Objective,
    OptimizerConfig,
    Runtime,
    StatusLine,
    StepRandom,
    Trainable,
    Trainer,
    list_checkpoints,
    noise_of_seeds,
    win_rate,
)

DATA = torch.linspace(-1, 1, 40).reshape(10, 4)


class Regression(Objective[Tensor]):
    """Two networks with random targets: enough to see every path of the loop."""

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        poison: tuple[int, ...] = (),
        poisoned: tuple[str, ...] = ("first", "second"),
        skip_second: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 4))
        self.second = nn.Linear(4, 4)
        self.poison = poison
        self.poisoned = poisoned
        self.skip_second = skip_second

    def trainables(self) -> Mapping[str, Trainable]:
        return {
            "first": Trainable(self.first, OptimizerConfig(lr=1e-2), ema=0.9),
            "second": Trainable(self.second, OptimizerConfig(lr=1e-2, name="radam", clip=0.0, rate="constant")),
        }

    def batch(self, indices: Tensor, random: StepRandom) -> Tensor:
        return DATA[indices]

    def losses(self, name: str, batch: Tensor, random: StepRandom, runtime: Runtime) -> Losses | None:
        if name == "second" and self.skip_second:
            return None
        module = self.first if name == "first" else self.second
        loss = (module(batch) - random.normal("target", 4)).square().mean(1)
        if random.step in self.poison and name in self.poisoned:
            loss = loss * float("nan")
        return Losses(loss.mean(), {"square": loss})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor | None:
        return averaged["first"](DATA)[:, None, :, None]


def make(folder: Path, objective: Regression | None = None, *, fingerprint: str = "a", **settings: int) -> Trainer:
    config = {"steps": 10, "batch_size": 4, "checkpoint_every": 3, "log_every": 2, "preview_every": 5, **settings}
    return Trainer(
        objective or Regression(),
        LoopConfig(**config),
        runtime=Runtime("cpu"),
        folder=folder,
        stage="test",
        seed=7,
        order=lambda step, size: batch_indices(7, step, size, len(DATA)),
        log=MetricLog(folder / "metrics.jsonl", "test"),
        fingerprint=fingerprint,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    found = {}
    for name, state in trainer.states.items():
        found |= {f"{name}.{key}": value.clone() for key, value in state.module.state_dict().items()}
        if state.ema is not None:
            found |= {f"{name}.ema.{key}": value.clone() for key, value in state.ema.module.state_dict().items()}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("stop", [3, 6, 9])
def test_resume_continues_bitwise(tmp_path: Path, stop: int, dropout: float) -> None:
    whole = make(tmp_path / "whole", Regression(dropout=dropout))
    whole.run()
    # A run that dies at `stop`: its learning rate must already be that of the whole run.
    part = make(tmp_path / "part", Regression(dropout=dropout))
    part.preview = lambda step, kind, images: None

    class Died(Exception):
        pass

    def die(*args: object, **kwargs: object) -> bool:
        if part.step == stop:
            raise Died
        return True

    part.health.allow_update = die  # type: ignore[method-assign]
    with pytest.raises(Died):
        part.run()
    again = make(tmp_path / "part", Regression(dropout=dropout))
    assert again.resume() == stop
    again.run()
    assert_equal(weights(whole), weights(again))


def test_metrics_are_one_continuous_record_after_a_resume(tmp_path: Path) -> None:
    trainer = make(tmp_path, steps=6)
    trainer.run()
    log = tmp_path / "metrics.jsonl"
    with log.open("a") as file:  # what a killed process leaves behind: lines past the checkpoint, the last one cut
        file.write(json.dumps({"stage": "test", "step": 8, "x": 1}) + "\n" + json.dumps({"stage": "other", "step": 99}))
        file.write('\n{"stage": "te')
    make(tmp_path, steps=10).run()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "test"]
    assert steps == [2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if line["stage"] == "other"] == [99]
    assert all("first/square" in line for line in lines if line["stage"] == "test")


def test_micro_batches_give_the_result_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = make(tmp_path / "a"), make(tmp_path / "b", micro_batches=4)
    whole.run()
    parts.run()
    a, b = weights(whole), weights(parts)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_network_without_losses_in_a_step_stays_as_it_is(tmp_path: Path) -> None:
    objective = Regression(skip_second=True)
    before = {name: value.clone() for name, value in objective.second.state_dict().items()}
    make(tmp_path, objective).run()
    assert_equal(before, dict(objective.second.state_dict()))


def test_a_non_finite_step_changes_nothing_and_is_reported(tmp_path: Path) -> None:
    objective = Regression(poison=(0,), skip_second=True)
    before = {name: value.clone() for name, value in objective.first.state_dict().items()}
    trainer = make(tmp_path, objective, steps=1, preview_every=0)
    with pytest.warns(HealthWarning, match="step 0: the loss of `first` is nan"):
        trainer.run()
    assert_equal(before, dict(objective.first.state_dict()))


def test_a_run_that_stays_non_finite_is_stopped_with_its_checkpoint_intact(tmp_path: Path) -> None:
    trainer = make(tmp_path, Regression(poison=tuple(range(3, 10))))
    with warnings.catch_warnings(), pytest.raises(TrainingError, match="last checkpoint"):
        warnings.simplefilter("ignore", HealthWarning)
        trainer.run()
    # Steps 3, 4 and 5 are skipped, so that the checkpoint after them holds the weights before them; step 6 stops the run.
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == ["step-00000003", "step-00000006"]
    again = make(tmp_path)
    assert again.resume() == 6
    assert all(bool(value.isfinite().all()) for value in weights(again).values())


def test_a_network_that_stays_non_finite_is_not_hidden_by_one_that_is_well(tmp_path: Path) -> None:
    trainer = make(tmp_path, Regression(poison=tuple(range(1, 10)), poisoned=("second",)))
    with warnings.catch_warnings(), pytest.raises(TrainingError, match="step 4: the loss of `second` is nan"):
        warnings.simplefilter("ignore", HealthWarning)
        trainer.run()
    assert trainer.step == 4  # steps 1, 2 and 3 were skipped


def test_a_single_bad_step_now_and_then_is_skipped(tmp_path: Path) -> None:
    trainer = make(tmp_path, Regression(poison=(1, 2, 3, 5, 6, 7)))
    with pytest.warns(HealthWarning) as seen:
        trainer.run()
    assert trainer.step == 10
    assert len(seen) == 12  # two networks, six steps


def test_gradients_are_clipped_to_their_norm_in_one_network_and_left_alone_in_the_other(tmp_path: Path) -> None:
    """One step of plain descent: the step's length is the rate times the clipped norm."""

    class Steep(Regression):
        def trainables(self) -> Mapping[str, Trainable]:
            return {
                "first": Trainable(self.first, OptimizerConfig(lr=1.0, clip=0.25, rate="constant")),
                "second": Trainable(self.second, OptimizerConfig(lr=1.0, clip=0.0, rate="constant")),
            }

        def losses(self, name: str, batch: Tensor, random: StepRandom, runtime: Runtime) -> Losses | None:
            module = self.first if name == "first" else self.second
            return Losses(100 * module(batch).square().mean(), {})

    trainer = make(tmp_path, Steep(), steps=1, preview_every=0)
    for state in trainer.states.values():
        groups = state.optimizer.param_groups[0]["params"]
        state.optimizer.step = lambda closure=None, groups=groups: [p.data.sub_(p.grad) for p in groups] and None  # type: ignore[method-assign]
    before = weights(trainer)
    random = StepRandom(7, 0, 4, slice(0, 4), "test")
    figures = trainer.train_step([(DATA[:4], random)])
    after = weights(trainer)
    moved = {
        network: float(
            sum((after[name] - before[name]).square().sum() for name in before if name.startswith(network)) ** 0.5
        )
        for network in ("first.", "second.")
    }
    assert moved["first."] == pytest.approx(0.25, rel=1e-4)
    assert float(figures["first/gradient_norm"]) > 1  # what is logged is the norm before
    assert moved["second."] == pytest.approx(float(figures["second/gradient_norm"]), rel=1e-4)
    assert moved["second."] > 1


def test_the_average_follows_by_its_warmed_up_decay() -> None:
    """After step k: a <- d a + (1 - d) w with d = min(decay, (1 + k) / (10 + k)); buffers are taken over."""
    module = nn.BatchNorm1d(3)
    ema = EMA(module, 0.3)
    expected = module.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            module.weight.copy_(torch.arange(3.0) + step)
            module.running_mean.fill_(step)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (torch.arange(3.0) + step)
        torch.testing.assert_close(ema.module.weight.detach(), expected)
        assert torch.equal(ema.module.running_mean, torch.full((3,), float(step)))
    with pytest.raises(ConfigError, match=r"\[0, 1\), got 1"):
        EMA(module, 1.0)


def test_grids_are_drawn_of_raw_and_averaged_weights_at_their_steps(tmp_path: Path) -> None:
    seen: list[tuple[int, str, Tensor]] = []
    trainer = make(tmp_path)
    trainer.preview = lambda step, kind, images: seen.append((step, kind, images.clone()))
    trainer.run()
    assert [(step, kind) for step, kind, _ in seen] == [(s, k) for s in (0, 5, 10) for k in ("raw", "ema")]
    start, last = (
        {kind: images for step, kind, images in seen if step == 0},
        {kind: images for step, kind, images in seen if step == 10},
    )
    assert torch.equal(start["raw"], start["ema"])
    assert not torch.equal(last["raw"], last["ema"])
    again = trainer.objective.preview({"first": trainer.states["first"].module})
    assert again is not None
    assert torch.equal(last["raw"], again)


def test_the_loop_watches_what_the_discriminator_wins(tmp_path: Path) -> None:
    class Judged(Regression):
        def losses(self, name: str, batch: Tensor, random: StepRandom, runtime: Runtime) -> Losses | None:
            losses = super().losses(name, batch, random, runtime)
            assert losses is not None
            return Losses(losses.total, {"win_rate": torch.ones(3)})

    trainer = make(tmp_path, Judged())
    trainer.health = HealthGuard(window=4)
    with pytest.warns(HealthWarning, match="the discriminator has won"):
        trainer.run()


def test_the_line_for_people_has_loss_rate_memory_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path, steps=4)
    trainer.status = StatusLine()
    trainer.run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    form = r"test  step {}/4  first \d+\.\d{{4}}  second \d+\.\d{{4}}  \d+ img/s  \d+ MiB  \d+:\d\d left"
    assert re.fullmatch(form.format(2), lines[0])
    assert re.fullmatch(form.format(4), lines[1])
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 and line["memory_mib"] > 50 for line in logged)


def test_tensorboard_gets_every_figure_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(tmp_path, steps=4)
    trainer.log = MetricLog(tmp_path / "metrics.jsonl", "test", tensorboard=tmp_path / "events")
    trainer.run()
    events = EventAccumulator(str(tmp_path / "events" / "test")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == set(logged[0]) - {"stage", "step"}
    for name in ("first/loss", "images_per_second"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in logged]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    trainer = make(tmp_path, keep_checkpoints=2, checkpoint_every=2)
    trainer.run()
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == ["step-00000008", "step-00000010"]


def test_a_disk_that_becomes_full_in_a_checkpoint_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, steps=3).run()

    def full(tensors: object, path: Path, metadata: object = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pagoda.files.save_file", full)
    with pytest.raises(ResourceError, match=r"became full .* Free space and run the same command again"):
        make(tmp_path).run()
    monkeypatch.undo()
    trainer = make(tmp_path)
    assert trainer.resume() == 3
    assert not list(trainer.checkpoints.glob(".writing-*"))


def test_a_checkpoint_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    make(tmp_path, steps=3).run()
    half = tmp_path / "checkpoints" / ".writing-step-00000009"
    half.mkdir()
    (half / "state.json").write_text("{}")
    trainer = make(tmp_path)
    assert trainer.resume() == 3
    assert not half.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path, steps=3).run()
    with pytest.raises(ArtifactError, match="belongs to another run"):
        make(tmp_path, fingerprint="b").run()


@pytest.mark.parametrize("name", ["first.safetensors", "first.optimizer.safetensors", "second.safetensors"])
def test_a_truncated_checkpoint_is_named_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    make(tmp_path, steps=3).run()
    path = tmp_path / "checkpoints" / "step-00000003" / name
    path.write_bytes(path.read_bytes()[:-7])
    trainer = make(tmp_path)
    before = weights(trainer)
    with pytest.raises(
        ArtifactError, match=rf"{name}.*Remove the folder .*step-00000003: the same command then goes on"
    ):
        trainer.resume()
    assert_equal(before, weights(trainer))
    shutil.rmtree(path.parent)  # as told
    assert make(tmp_path).resume() == 0


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    make(tmp_path, steps=3).run()
    path = tmp_path / "checkpoints" / "step-00000003"
    (path / "first.safetensors").write_bytes((path / "second.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="does not fit the network"):
        make(tmp_path).resume()


def test_draws_do_not_depend_on_how_the_batch_is_cut() -> None:
    whole = StepRandom(3, 5, 8, slice(0, 8), "s").normal("noise", 2)
    halves = [StepRandom(3, 5, 8, rows, "s").normal("noise", 2) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, StepRandom(3, 6, 8, slice(0, 8), "s").normal("noise", 2))
    assert not torch.equal(whole, StepRandom(3, 5, 8, slice(0, 8), "t").normal("noise", 2))


def test_noise_of_a_seed_does_not_depend_on_its_batch() -> None:
    assert torch.equal(noise_of_seeds([4, 5, 6], (1, 2, 2))[1:], noise_of_seeds([5, 6], (1, 2, 2)))


def test_learning_rate_is_a_pure_function_of_the_step() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=4)
    assert config.lr_at(0, 100) == pytest.approx(0.125)
    assert config.lr_at(50, 100) == pytest.approx(0.25)
    assert config.lr_at(100, 100) == pytest.approx(0, abs=1e-12)
    assert OptimizerConfig(lr=0.5, rate="constant").lr_at(99, 100) == 0.5


def test_win_rate_is_one_for_separated_logits_and_half_for_equal_ones() -> None:
    assert float(win_rate(torch.ones(4, 3), torch.zeros(5, 3))) == 1
    assert float(win_rate(torch.ones(4, 3), torch.ones(5, 3))) == 0.5


def test_a_discriminator_that_has_won_is_reported_once() -> None:
    guard = HealthGuard(window=3)
    with pytest.warns(HealthWarning, match="the discriminator has won") as seen:
        for step in range(6):
            guard.watch_win_rate(step, 1.0)
    assert len(seen) == 1


def test_collapse_is_reported() -> None:
    guard = HealthGuard()
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guard.watch_preview(0, images)
    with pytest.warns(HealthWarning, match="collapse"):
        guard.watch_preview(1, 0.01 * images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"batch_size": 6, "micro_batches": 4}, "batch_size 6 is not divisible by micro_batches 4"),
    ],
)
def test_impossible_loops_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd"},
        {"lr": 0.0},
        {"rate": "linear"},
        {"clip": -1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"weight_decay": -0.1},
    ],
)
def test_impossible_optimisers_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OptimizerConfig(**settings)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be"):
        Runtime("tpu")
