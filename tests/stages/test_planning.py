"""Plans: closed forms, sums, what a real run writes, linear growth with steps, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, ResourceError
from pagoda.networks import BackboneConfig
from pagoda.stages.config import to_dict
from pagoda.stages.context import load_teacher
from pagoda.stages.kept_plan import changed_since, keep_plan, kept_plan
from pagoda.stages.plan_calls import encode_calls, pair_calls
from pagoda.stages.plan_hardware import GPUS, Gpu, Limits, find_gpu
from pagoda.stages.plan_model import RunPlan
from pagoda.stages.plan_stages import direct_backbone
from pagoda.stages.plan_text import compare_with_run, plan_text
from pagoda.stages.planning import plan_run
from pagoda.stages.report import write_report
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator
from pagoda.stages.train import train

PLENTY = Limits(disk_bytes=1 << 50, memory_bytes=1 << 50)


def counted(**changes: object) -> RunPlan:
    """A plan that times nothing."""
    return plan_run(tiny_config(**changes), probe_seconds=0, limits=PLENTY)


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return counted()


def test_a_plan_has_the_stages_of_the_run(plan: RunPlan, finished_run: RunFolder) -> None:
    recorded = {path.stem for path in (finished_run.path / "stages").glob("*.json")}
    assert {stage.name for stage in plan.stages} == recorded


def test_parameters_are_those_of_the_networks_that_a_run_leaves(plan: RunPlan, finished_run: RunFolder) -> None:
    teacher, _ = load_teacher(finished_run.teacher)
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["teach"].parameters == stages["teach"].trained == sum(p.numel() for p in teacher.parameters())
    grown, base = (sum(p.numel() for p in load_generator(finished_run, size).parameters()) for size in (16, 8))
    without_judges = counted(distill__loss__adversarial=0.0, grow__loss__adversarial=0.0)
    trained = {stage.name: stage.trained for stage in without_judges.stages}
    assert trained["distill"] == base
    assert trained["grow-16"] == grown - base  # everything below is frozen


def test_disk_is_what_a_run_writes(plan: RunPlan, finished_run: RunFolder) -> None:
    """Data copies, latents and networks, to 3 %: heads of files and configurations are not counted."""
    folders = [finished_run.images, finished_run.latents, finished_run.teacher]
    folders += [finished_run.generator(size) for size in (8, 16)]
    written = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    assert plan.kept_bytes == pytest.approx(written, rel=0.03)


def test_checkpoints_are_as_large_as_planned(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def finish(self: RunFolder, stage: str, results: object) -> None:
        files = list(self.work(stage).rglob("*.safetensors"))
        steps = {file.parent for file in files}
        sizes.append(sum(file.stat().st_size for file in files) // len(steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), str(tmp_path / "run"), until="teach", quiet=True)
    planned = plan.stages[0].scratch_bytes / (tiny_config().teach.loop.keep_checkpoints + 1)
    assert planned == pytest.approx(sizes[0], rel=0.03)


def test_totals_are_sums(plan: RunPlan) -> None:
    facts = json.loads(json.dumps(plan.to_json()))
    stages = facts["stages"]
    assert facts["total"]["multiply_adds"] == sum(s["images"] * s["multiply_adds"] for s in stages)
    assert facts["total"]["kept_bytes"] == facts["data_bytes"] + sum(s["disk_bytes"] for s in stages)
    assert facts["total"]["memory_bytes"] == max(s["memory_bytes"] for s in stages)
    assert facts["total"]["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in stages))
    rate = facts["gpu"]["float32_teraflops"] * 1e12 * facts["utilisation"]
    assert facts["total"]["gpu_hours"] == pytest.approx(2 * facts["total"]["multiply_adds"] / rate / 3600)


def test_multiply_adds_grow_with_steps_and_batch_and_nothing_else_does(plan: RunPlan) -> None:
    longer = counted(teach__loop__steps=18, teach__loop__batch_size=16)
    assert longer.stages[0].multiply_adds == plan.stages[0].multiply_adds
    assert longer.stages[0].total_multiply_adds == 6 * plan.stages[0].total_multiply_adds
    assert longer.stages[0].disk_bytes == plan.stages[0].disk_bytes
    assert longer.stages[1:] == plan.stages[1:]


def test_seconds_grow_linearly_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is the same for both, ten times the steps are ten times the seconds."""
    import pagoda.stages.plan_probe as probe
    from pagoda.training import StepCost

    monkeypatch.setattr(probe, "measure_step", lambda trainer, step, budget, room: StepCost(0.25, 10, 10, 1))
    monkeypatch.setattr(probe.Prober, "_measure_disk", lambda self: float("inf"))
    off = {"teach__loop__preview_every": 0, "distill__loop__preview_every": 0, "grow__loop__preview_every": 0}
    short, long = (
        plan_run(tiny_config(teach__loop__steps=steps, **off), probe_seconds=1e-3, limits=PLENTY) for steps in (4, 40)
    )
    assert short.stages[0].seconds == 4 * 0.25
    assert long.stages[0].seconds == 40 * 0.25
    assert long.stages[2].seconds == short.stages[2].seconds == 6 * 0.25
    assert long.seconds == pytest.approx(sum((s.seconds or 0) + s.before_seconds for s in long.stages))


def test_micro_batches_need_less_memory_and_the_same_work(plan: RunPlan) -> None:
    parts = counted(teach__loop__micro_batches=4)
    assert parts.stages[0].total_multiply_adds == plan.stages[0].total_multiply_adds
    assert parts.stages[0].memory_bytes < plan.stages[0].memory_bytes


def test_the_adversarial_term_costs_from_its_first_step_on() -> None:
    never, half, always = (
        counted(distill__loss__adversarial_from=start).stages[2].multiply_adds for start in (1.0, 0.5, 0.0)
    )
    assert never < always
    assert half == pytest.approx((never + always) / 2, rel=1e-6)


def test_pairs_that_only_a_discriminator_sees_are_planned_too() -> None:
    guided = {"guidance__scale_max": 4.0, "teach__condition_dropout": 0.1, "distill__teacher_pairs__count": 24}
    grown = {"grow__loss__adversarial": 0.0, "grow__loss__adversarial_from": 0.0}  # of base size only
    with_pairs, without = (
        counted(guidance__assignment=assignment, **guided, **grown) for assignment in ("teacher", "independent")
    )
    assert [stage.name for stage in with_pairs.stages] == ["teach", "encode", "teacher-pairs", "distill", "grow-16"]
    assert with_pairs.stages[2].images == 24
    assert "teacher-pairs" not in {stage.name for stage in without.stages}


def test_a_judged_step_in_three_costs_a_third_of_what_the_adversarial_term_costs() -> None:
    """Of six steps two are judged."""
    changes = ({"adversarial_from": 1.0}, {"adversarial_every": 3}, {})
    never, third, always = (
        counted(**{f"distill__loss__{k}": v for k, v in {"adversarial_from": 0.0, **c}.items()}).stages[2].multiply_adds
        for c in changes
    )
    assert never < third < always
    assert third == pytest.approx((2 * never + always) / 3, rel=1e-6)


def test_calls_of_the_solvers_are_the_papers() -> None:
    heun = tiny_config(encode__solver="heun", encode__num_nodes=40)
    assert encode_calls(heun) == 78
    assert encode_calls(tiny_config(encode__solver="euler", encode__num_nodes=40)) == 39
    assert pair_calls(tiny_config(distill__teacher_pairs__solver="euler", distill__teacher_pairs__num_nodes=12)) == 12


def test_teacher_pairs_are_a_stage_where_the_distillation_asks_for_them(plan: RunPlan) -> None:
    both = counted(distill__mode="both", distill__teacher_pairs__count=24)
    (pairs,) = [stage for stage in both.stages if stage.name == "teacher-pairs"]
    assert pairs.images == 24
    assert both.multiply_adds > plan.multiply_adds
    assert both.kept_bytes == plan.kept_bytes + pairs.disk_bytes


def test_the_price_is_three_ratios_and_two_totals(plan: RunPlan) -> None:
    price, taught = plan.price, plan.stages[0]
    assert price.pixels == 4.0
    assert price.multiply_adds == price.direct.multiply_adds / taught.multiply_adds > 1
    assert price.total_multiply_adds == price.direct.total_multiply_adds / plan.multiply_adds
    assert price.direct.images == taught.images
    assert price.seconds is None
    assert price.total_seconds is None
    assert plan.seconds is None


def test_without_growth_the_direct_model_is_the_teacher() -> None:
    price = counted(size=8).price
    assert (price.pixels, price.multiply_adds) == (1.0, 1.0)


def test_the_direct_model_keeps_the_sides_of_its_deepest_level_and_of_its_attention() -> None:
    config = tiny_config(size=64)
    direct, own = direct_backbone(config), config.backbone
    assert 64 // direct.stride == 8 // own.stride
    sides = {64 >> level for level in direct.attention_levels}
    assert sides == {8 >> level for level in own.attention_levels}
    dit = BackboneConfig(kind="dit", hidden_size=32, depth=1, head_dim=16)
    assert direct_backbone(dataclasses.replace(config, backbone=dit)) == dit


def test_too_little_disk_is_refused(plan: RunPlan) -> None:
    enough = dataclasses.replace(plan, limits=Limits(plan.disk_bytes, plan.memory_bytes))
    enough.require_fit()
    with pytest.raises(ResourceError, match="of disk"):
        dataclasses.replace(plan, limits=Limits(plan.disk_bytes - 1, plan.memory_bytes)).require_fit()


def test_too_little_memory_is_refused_with_the_stage(plan: RunPlan) -> None:
    with pytest.raises(ResourceError, match=r"stage `distill` .*distill.loop.micro_batches"):
        dataclasses.replace(plan, limits=Limits(plan.disk_bytes, plan.memory_bytes - 1)).require_fit()


def on_card(plan: RunPlan, count: int) -> RunPlan:
    """The plan for a GPU of `count` bytes."""
    return dataclasses.replace(plan, gpu=Gpu("V9", 10, 100, count / 2**30))


def test_what_does_not_fit_on_the_named_gpu_is_said_and_refused(plan: RunPlan) -> None:
    """Images and latents stay outside of a GPU's memory: they are in this plan's memory, since it is one for a processor."""
    largest = max(plan.stages, key=plan.gpu_bytes)
    needed = plan.gpu_bytes(largest)
    assert 0 < needed < largest.memory_bytes
    latents = next(stage for stage in plan.stages if stage.name == "encode").disk_bytes
    assert plan.data_bytes < largest.memory_bytes - needed <= plan.data_bytes + latents
    enough, short = on_card(plan, needed), on_card(plan, needed - 1)
    roomy = {"limits": Limits(plan.disk_bytes, plan.memory_bytes)}
    dataclasses.replace(enough, **roomy).require_fit(on_gpu=True)
    dataclasses.replace(short, **roomy).require_fit()  # asked for this machine alone
    with pytest.raises(ResourceError, match=rf"stage `{largest.name}` needs .*, and a GPU V9 has .*micro_batches"):
        dataclasses.replace(short, **roomy).require_fit(on_gpu=True)
    assert (enough.too_large, short.too_large) == ((), (largest,))
    assert "All stages fit" in plan_text(enough)
    assert f"DOES NOT FIT in its {short.gpu.memory_gib:g} GiB: {largest.name} (" in plan_text(short)


@pytest.mark.parametrize(("given", "code"), [(["--gpu", "T4"], 1), ([], 0)], ids=["named", "not named"])
def test_the_command_refuses_a_run_that_is_too_large_for_a_gpu_that_was_named(
    given: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("T4", "A100"):
        monkeypatch.setitem(GPUS, name, dataclasses.replace(GPUS[name], memory_gib=0.001))
    options = ["shapes:count=20", "--base", "8", "--size", "8", "--preset", "tiny", "--probe-seconds", "0"]
    assert main(["plan", *options, *given]) == code
    printed = capsys.readouterr()
    assert "DOES NOT FIT in its 0.001 GiB: teach (" in printed.out
    assert ("and a GPU T4 has 0.001 GiB" in printed.err) == bool(given)


def test_a_network_whose_weights_do_not_fit_is_refused_before_it_is_built() -> None:
    with pytest.raises(ResourceError, match="parameters"):
        plan_run(tiny_config(), probe_seconds=0, limits=Limits(disk_bytes=1 << 50, memory_bytes=1 << 20))


def test_a_plan_leaves_the_random_numbers_of_the_caller_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    counted()
    assert torch.equal(torch.randn(2), expected)


def test_gpus_are_found_by_name_and_unknown_ones_are_refused() -> None:
    assert find_gpu("h100") is GPUS["H100"]
    assert GPUS["A100"].hours(312e12 / 2 * 3600, 1.0, "bf16") == pytest.approx(1.0)
    assert GPUS["A100"].hours(19.5e12 / 2 * 3600, 1.0, "float32") == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="H100"):
        find_gpu("H10")
    with pytest.raises(ConfigError, match="utilisation"):
        plan_run(tiny_config(), utilisation=1.5)


@pytest.mark.parametrize(("name", "quotient"), [("A100", 312 / 19.5), ("T4", 1.0)])
def test_hours_on_a_gpu_follow_the_precision_that_is_trained_in_there(
    name: str, quotient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine makes of the same setting; what stays in float32 takes as long in a run in bf16."""
    monkeypatch.setattr("pagoda.training.runtime.cpu_has_bf16", lambda: True)
    plans = {
        precision: plan_run(tiny_config(precision=precision), gpu=name, probe_seconds=0, limits=PLENTY)
        for precision in ("float32", "auto", "bf16")
    }
    # Per multiply-add: in bf16 a CPU does attention by plain products, whose backward pass is counted; that of its fused kernel is not.
    hours = {p: sum(map(plan.gpu_hours, plan.stages)) / plan.multiply_adds for p, plan in plans.items()}
    assert hours["auto"] == pytest.approx(hours["float32"])
    assert hours["float32"] / hours["bf16"] == pytest.approx(quotient)
    direct = {
        p: plan.gpu_hours(plan.price.direct) / plan.price.direct.total_multiply_adds
        for p, plan in plans.items()
        if plan.price
    }
    assert direct["float32"] / direct["bf16"] == pytest.approx(quotient)
    mixed, (first, *others) = plans["bf16"], plans["bf16"].stages
    kept = dataclasses.replace(mixed, stages=(dataclasses.replace(first, in_float32=True), *others))
    assert kept.gpu_hours(kept.stages[0]) == pytest.approx(quotient * mixed.gpu_hours(first))
    assert [stage["gpu_precision"] for stage in kept.to_json()["stages"]] == ["float32", *["bf16"] * len(others)]
    gpu = GPUS[name]
    for precision, rate in (
        ("float32", gpu.float32_teraflops),
        ("auto", gpu.float32_teraflops),
        ("bf16", gpu.bf16_teraflops),
    ):
        told = "bf16" if precision == "bf16" else "float32"
        assert f"{name}: assumed at 30% of {rate:g} TFLOP/s, its peak in {told}" in plan_text(plans[precision])
    assert ("it has no units for bf16" in plan_text(mixed)) == (not gpu.has_bf16) == (name == "T4")
    assert f"; teach at 30% of {gpu.float32_teraflops:g}, in float32" in plan_text(kept)


def test_an_unknown_precision_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(ConfigError, match=r"precision must be one of .*, got 'fp8'"):
        plan_run(tiny_config(precision="fp8"), probe_seconds=0, limits=PLENTY)


def test_memory_is_what_a_step_took_where_steps_are_run_and_counted_where_not(plan: RunPlan) -> None:
    """A process takes more than its tensors: kernels, buffers, what the allocator keeps."""
    timed = plan_run(tiny_config(), probe_seconds=0.05, limits=PLENTY)
    for stage, counted_alone in zip(timed.stages, plan.stages, strict=True):
        assert stage.tensor_bytes == counted_alone.tensor_bytes
        assert stage.memory_bytes >= counted_alone.memory_bytes
    assert timed.memory_bytes > plan.memory_bytes
    assert "as a step of each stage that trains took it" in plan_text(timed)
    assert "tensors alone" in plan_text(plan)


def test_a_timed_plan_of_a_run_stands_beside_what_it_measured(finished_run: RunFolder) -> None:
    plan = plan_run(finished_run.config(), probe_seconds=0.2, limits=PLENTY)
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in plan.stages)
    rows = {row["what"]: row for row in compare_with_run(plan, finished_run)}
    found = set(rows) - {"memory bytes"}  # which a process that held more before cannot tell
    assert found == {*(f"{s.name} seconds" for s in plan.stages), "all seconds", "preparation seconds", "disk bytes"}
    record = finished_run.record("teach")
    assert record is not None
    assert rows["teach seconds"]["measured"] == record["results"]["seconds"]
    assert rows["disk bytes"]["ratio"] == pytest.approx(1.0, rel=0.03)
    text = plan_text(plan)
    assert "assumed at 30%" in text
    assert all(stage.name in text for stage in plan.stages)


def test_the_memory_of_a_plan_stands_beside_the_most_that_a_run_took(
    plan: RunPlan, finished_run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    for stage, mib in (("teach", 70.0), ("distill", 200.0), ("grow-16", 90.0)):
        run.note(stage, {"memory_mib": mib})
    (row,) = (row for row in compare_with_run(plan, run) if row["what"] == "memory bytes")
    assert (row["estimate"], row["measured"]) == (plan.memory_bytes, 200 * 2**20)
    record = run.record("distill")
    assert record is not None
    assert record["done"]
    assert {"hash", "seconds"} <= set(record["results"]), "what was found out before stays"


def test_a_run_of_its_own_process_records_what_it_took(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = {"teach.loop.steps": 2, "distill.loop.steps": 2, "distill.teacher_pairs.count": 8, "threads": 1}
    sets = [part for name, value in quick.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "pagoda.cli.main", "train", "shapes:count=20", "--out", str(out), "--base", "8"]
    subprocess.run([*command, "--size", "8", "--preset", "tiny", *sets], check=True, capture_output=True)
    taken = [
        RunFolder.open(out).require(stage, "")["results"]["memory_mib"] for stage in ("teach", "encode", "distill")
    ]
    assert taken == sorted(taken), "the most so far can only rise"
    assert taken[0] > 1


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["shapes:count=20", "--base", "8", "--size", "16", "--preset", "tiny", "--probe-seconds", "0"]
    target = tmp_path / "plan.json"
    assert main(["plan", *options, "--gpu", "H100", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "teacher-pairs" in printed
    assert "H100" in printed
    facts = json.loads(target.read_text())
    assert facts["images"] == 20
    assert facts["price"]["pixels"] == 4.0


def test_the_command_refuses_contradicting_options(capsys: pytest.CaptureFixture[str], finished_run: RunFolder) -> None:
    assert main(["plan"]) == 1
    assert main(["plan", "shapes", "--run", str(finished_run.path)]) == 1
    told = {
        "--size": "32",
        "--codec": "nowhere",
        "--condition": "text",
        "--text-encoder": "two-tower",
        "--teacher": "nowhere",
    }
    for option, value in told.items():
        assert main(["plan", "--run", str(finished_run.path), option, value]) == 1
        assert option in capsys.readouterr().err


def test_a_plan_is_kept_where_the_run_shall_be_and_the_run_then_begins_there(plan: RunPlan, tmp_path: Path) -> None:
    config = tiny_config()
    path = keep_plan(tmp_path / "new" / "run", plan, config)
    assert path is not None
    run = RunFolder.create(path.parent, config)
    kept = kept_plan(run)
    assert kept is not None
    assert kept["plan"] == json.loads(json.dumps(plan.to_json()))
    assert kept["done"] == []
    assert changed_since(kept["config"], config) == []
    assert kept_plan(RunFolder.create(tmp_path / "other", config)) is None


def test_a_folder_with_other_things_keeps_no_plan(plan: RunPlan, tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    assert keep_plan(tmp_path, plan, tiny_config()) is None
    assert keep_plan(tmp_path / "photo.png", plan, tiny_config()) is None
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_settings_that_changed_since_the_plan_are_named_but_not_those_that_only_watch() -> None:
    planned = json.loads(json.dumps(to_dict(tiny_config())))
    assert changed_since(planned, tiny_config(teach__loop__log_every=7, evaluation__every=3, seed=5)) == []
    assert changed_since(planned, tiny_config(teach__loop__steps=9)) == ["teach.loop.steps was 6, is 9"]


def test_a_damaged_plan_is_named(finished_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", finished_run.config())
    (run.path / "plan.json").write_text('{"plan": {}}')
    with pytest.raises(ArtifactError, match="holds no plan"):
        kept_plan(run)


def test_the_report_shows_the_plan_beside_what_was_measured(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    assert "No plan is kept in this folder" in write_report(run).read_text()
    assert main(["plan", "--run", str(run.path), "--probe-seconds", "0.1"]) == 0
    assert f"kept in {run.path / 'plan.json'}" in capsys.readouterr().out
    text = write_report(run).read_text()
    assert "taken / planned" in text
    assert "times the plan" in text
    assert "The plan was made when teach, encode, distill, grow-16 had been done" in text
    assert "other settings" not in text
    run.write_config(tiny_config(teach__loop__steps=60))
    assert "The plan was made for other settings: teach.loop.steps was 6, is 60." in write_report(run).read_text()
