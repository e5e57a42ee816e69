"""A teacher that was trained elsewhere goes the whole way: as the run's own would, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.conftest import TINY
from tests.tiny_adopted import AdoptedRuns, config_for
from tests.tiny_teachers import DATA, SIZE, TEACHERS, WITH_CLASSES, ddpm, linear, make_teacher

import pagoda
from pagoda.cli.main import main
from pagoda.data import Downsampler, LatentStore
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.networks import model_hash, num_parameters, open_teacher
from pagoda.stages.adopt import teacher_settings
from pagoda.stages.amortise import load_encoder
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.config import RunConfig, override
from pagoda.stages.context import load_teacher, open_context
from pagoda.stages.encode import inversion_grid, start_noise
from pagoda.stages.plan_hardware import Limits
from pagoda.stages.plan_text import plan_text
from pagoda.stages.planning import plan_run
from pagoda.stages.presets import preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images
from pagoda.stages.teach import measure_std
from pagoda.stages.train import train
from pagoda.training import Runtime


@pytest.fixture(scope="module")
def folders(adopted_runs: AdoptedRuns) -> dict[str, Path]:
    return adopted_runs.folders


@pytest.mark.parametrize("kind", list(TEACHERS))
def test_a_brought_teacher_is_encoded_distilled_and_grown(kind: str, adopted_runs: AdoptedRuns) -> None:
    run, labels = adopted_runs[kind], kind in WITH_CLASSES
    config = run.config()
    assert open_teacher(config.teacher.path).fingerprint == open_teacher(adopted_runs.folders[kind]).fingerprint
    assert run.generator_sizes() == [SIZE, 2 * SIZE]
    assert run.record("encode")["results"]["round_trip_psnr"] > 20
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row["stage"] == "distill" and "generator/adversarial" in row]
    assert judged[-1]["discriminator/gradient_norm"] > 0
    assert judged[-1]["generator/adversarial"] != 0
    generator = load_generator(run)
    assert generator.num_classes == (10 if labels else 0)
    images = sample_images(generator, range(4))
    assert images.shape == (4, 3, 16, 16)
    assert bool(images.isfinite().all())
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    train(config, str(run.path), quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*.safetensors")}
    assert_planned(config, run)


def assert_planned(config: RunConfig, run: RunFolder) -> None:
    """A plan of the run has its stages and networks, and no price: nothing is trained in place of the teacher."""
    plan = plan_run(config, probe_seconds=0, limits=Limits(disk_bytes=1 << 50, memory_bytes=1 << 50))
    stages = {stage.name: stage for stage in plan.stages}
    assert set(stages) == {path.stem for path in (run.path / "stages").glob("*.json")}
    teacher, _ = load_teacher(run.teacher)
    assert stages["teach"].parameters == num_parameters([teacher.network])
    assert stages["teach"].trained == stages["teach"].total_multiply_adds == 0
    for size, name in ((SIZE, "distill"), (2 * SIZE, f"grow-{2 * SIZE}")):
        assert stages[name].disk_bytes == pytest.approx(4 * num_parameters([load_generator(run, size)]), rel=0.05)
    assert plan.price is None
    assert "No price" in plan_text(plan)


def test_the_command_plans_a_run_of_a_teacher(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", str(2 * SIZE), "--preset", "tiny", "--probe-seconds", "0", "--set", "distill.mode=rec"]
    assert main(["plan", DATA, "--teacher", str(folders["dit"]), *options]) == 0
    assert "No price" in capsys.readouterr().out


def test_a_plan_refuses_a_teacher_that_does_not_suit_the_run(folders: dict[str, Path]) -> None:
    limits = Limits(disk_bytes=1 << 50, memory_bytes=1 << 50)
    with pytest.raises(ShapeError, match="base is 16"):
        plan_run(config_for(folders["ddpm"], base=16, size=32), probe_seconds=0, limits=limits)
    with pytest.raises(ArtifactError):
        plan_run(config_for(folders["ddpm"], teacher__path="nowhere"), probe_seconds=0, limits=limits)


def test_the_run_s_teacher_is_the_one_that_was_brought(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("dit", "sd3"):
        run = train(
            config_for(folders[kind], teacher__labels=kind == "dit"), str(tmp_path / kind), until="teach", quiet=True
        )
        theirs, (ours, facts) = open_teacher(folders[kind]), load_teacher(run.teacher)
        x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        condition = Condition.of_labels([1, -1] if kind == "dit" else None)
        with torch.no_grad():
            assert torch.equal(ours(x, 1.0, condition), theirs.denoiser(x, 1.0, condition))
        assert facts["source"] == theirs.fingerprint
        assert facts["num_classes"] == (10 if kind == "dit" else 0)


def test_the_folder_may_move_or_go_but_not_be_exchanged(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source" / "ddpm"
    shutil.copytree(folders["ddpm"], source)
    run = train(config_for(source), str(tmp_path / "run"), until="teach", quiet=True)
    digest = load_teacher(run.teacher)[1]["hash"]
    moved = config_for(folders["ddpm"])
    shutil.rmtree(source)
    train(run.config(), str(run.path), until="teach", quiet=True)
    train(moved, str(run.path), until="teach", quiet=True)
    assert load_teacher(run.teacher)[1]["hash"] == digest
    other = make_teacher(tmp_path / "other" / "ddpm", "ddpm")
    with pytest.raises(ArtifactError, match=r"started with another configuration: source was"):
        train(config_for(other), str(run.path), until="teach", quiet=True)
    own = override(run.config(), {"teacher.path": "", "teacher.null_class": "auto"})
    with pytest.raises(ArtifactError, match="started with another configuration: teacher was 'brought'"):
        train(own, str(run.path), until="teach", quiet=True)


def test_a_run_with_a_teacher_of_its_own_does_not_take_another(
    folders: dict[str, Path], finished_run: RunFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    config = override(finished_run.config(), {"teacher.path": str(folders["ddpm"])})
    with pytest.raises(ArtifactError, match="started with another configuration"):
        train(config, str(copy), quiet=True)


def test_another_run_s_teacher_can_be_brought(finished_run: RunFolder, tmp_path: Path) -> None:
    run = train(config_for(finished_run.teacher), str(tmp_path / "run"), until="teach", quiet=True)
    assert load_teacher(run.teacher)[1]["hash"] == load_teacher(finished_run.teacher)[1]["hash"]
    assert (run.teacher / "denoiser.json").read_text() != ""
    facts = json.loads((run.teacher / "denoiser.json").read_text())
    assert facts["noise_scale"] == finished_run.config().noise_scale


def test_a_teacher_of_another_downsampler_is_refused_and_its_own_is_kept(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    source = shutil.copytree(finished_run.teacher, tmp_path / "source")
    facts = json.loads((source / "denoiser.json").read_text())
    ours, theirs = (Downsampler(kind).fingerprint for kind in ("box_bicubic", "lanczos"))
    assert facts["downsampler"] == ours
    config = config_for(source, downsampler="lanczos")
    with pytest.raises(ConfigError, match=f"box_bicubic .{ours}.*lanczos .{theirs}.*downsampler=box_bicubic"):
        train(config, str(tmp_path / "run"), quiet=True)
    (source / "denoiser.json").write_text(json.dumps({**facts, "downsampler": "0123456789abcdef"}))
    with pytest.raises(ConfigError, match=r"does not have .0123456789abcdef.*of this version"):
        train(config, str(tmp_path / "run"), quiet=True)
    (source / "denoiser.json").write_text(json.dumps({**facts, "downsampler": theirs}))
    run = train(config, str(tmp_path / "run"), until="teach", quiet=True)
    assert open_teacher(run.teacher).downsampler == theirs


def test_a_teacher_from_a_scheduler_is_amortised_with_the_text_that_it_is_told(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "text-unet", "text-unet")
    quick = {f"amortise__loop__{key}": value for key, value in (("steps", 3), ("batch_size", 8), ("preview_every", 0))}
    config = config_for(
        folder, size=SIZE, teacher__labels=False, encode__num_nodes=3, encode__renormalise=True, **quick
    )
    run = train(config, str(tmp_path / "run"), until="encode", quiet=True)
    amortise_run(str(run.path), config, quiet=True)
    network, teacher = load_encoder(run).network, open_teacher(folder)
    assert torch.equal(network.null.tokens, teacher.network.null.tokens)
    context = open_context(run, run.config(), Runtime("cpu"), quiet=True)
    images, _ = context.load(SIZE, torch.arange(3), torch.zeros(3, dtype=torch.bool))
    sd, low, high = measure_std(context), config.encode.sigma_min, config.sigma_max
    linear = ((sd**2 + high**2) / (sd**2 + low**2)) ** 0.5 / high
    # With the teacher's weights, its last layer among them, the network sees what the teacher sees at sigma_min.
    network.base.load_state_dict(teacher.network.model.state_dict())
    with torch.no_grad():
        z = load_encoder(run)(images, seed=3)
        level = teacher.denoiser.network_input(images, torch.full((3,), low))
        torch.testing.assert_close(network(images), linear * images + teacher.network(*level, Condition()))
        for row in network.null.rows().values():
            row.add_(1)
        assert not torch.allclose(network(images), linear * images + teacher.network(*level, Condition()), atol=1e-3)
    assert z.shape == images.shape
    assert bool(z.isfinite().all())


def test_settings_are_chosen_inside_of_the_teacher_s_range(folders: dict[str, Path], tmp_path: Path) -> None:
    text = make_teacher(tmp_path / "text", "text-unet")
    settings = teacher_settings(str(text))
    low, high = open_teacher(text).denoiser.sigma_range
    assert settings["sigma_max"] == high < 15
    assert low <= settings["encode.sigma_min"]
    assert settings["distill.output"] == "unit"  # it predicts eps
    assert not [name for name in settings if "matching" in name]
    small = preset_config("small", DATA, base=SIZE, size=SIZE)
    assert teacher_settings(str(text), config=small)["distill.matching.sigma_max"] == high
    assert teacher_settings(str(text), {"distill.matching.weight": 0.0}, config=small) == settings
    assert teacher_settings(str(text), {"distill.matching.weight": 2.0})["distill.matching.sigma_max"] == high
    assert "distill.output" not in teacher_settings(str(folders["sd3"]))
    assert teacher_settings(str(folders["sd3"]))["sigma_max"] == 80
    with pytest.raises(ConfigError, match=r"noise levels go from 0\.\d+ to 14\.6.*sigma_max=14\.6"):
        train(config_for(text, sigma_max=80.0, teacher__labels=False), str(tmp_path / "run"), until="teach", quiet=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"base": 16, "size": 32},
            ShapeError,
            "8 pixels, the run's base is 16.*`pagoda train` with --teacher and --base 8",
        ),
        ({"teacher__labels": False}, ConfigError, "the data have no labels"),
        ({"techniques": ["dtr"]}, ConfigError, "leave out one of the two"),
        ({"teacher__null_condition": "zeros"}, ConfigError, "takes no text"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_made(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config_for(folders["ddpm"], **changes), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "teacher").exists()


def test_other_channels_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    for label in range(10):
        (tmp_path / "grey" / str(label)).mkdir(parents=True)
        for k in range(2):
            Image.new("L", (16, 16), 20 * label + k).save(tmp_path / "grey" / str(label) / f"{k}.png")
    config = config_for(folders["ddpm"], data=str(tmp_path / "grey"))
    with pytest.raises(ShapeError, match="3 channels, the data have 1"):
        train(config, str(tmp_path / "run"), quiet=True)


def test_the_command_line_and_python_make_the_same_run(folders: dict[str, Path], tmp_path: Path) -> None:
    read = {key: value for key, value in TINY.items() if not key.startswith(("teach.", "backbone."))}
    tiny = [f"{key}={json.dumps(value)}" for key, value in read.items()]
    arguments = ["train", DATA, "--out", str(tmp_path / "cli"), "--size", "8", "--preset", "tiny", "--quiet"]
    assert main([*arguments, "--teacher", str(folders["dit"]), "--set", *tiny]) == 0
    teacher = pagoda.adopt(folders["dit"], DATA, out=tmp_path / "python", preset="tiny", settings=read, quiet=True)
    assert teacher.sample(2, label=3)[0].size == (SIZE, SIZE)
    generator = pagoda.distill(teacher, quiet=True)
    assert model_hash(generator.model) == model_hash(load_generator(RunFolder.open(tmp_path / "cli")))


GUIDED = {"guidance__scale_max": 3.0, "size": SIZE, "distill__mode": "rec"}


def write_unet(folder: Path, rows: int) -> Path:
    """An untrained teacher whose label table has `rows` rows."""
    torch.manual_seed(0)
    ddpm(num_class_embeds=rows).save_pretrained(folder)
    linear().save_pretrained(folder)
    return folder


def test_guidance_by_a_teacher_without_a_null_class_is_refused_before_anything_is_made(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    ten = write_unet(tmp_path / "ten", 10)
    with pytest.raises(ConfigError, match=r"knows 10 classes and no image without one.*Set guidance.scale_max=1"):
        train(config_for(ten, **GUIDED), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "teacher").exists()
    # Without guidance it goes on, and what was made up stays known: a later stage cannot ask for it either.
    plain = {**GUIDED, "guidance__scale_max": 1.0}
    run = train(config_for(ten, **plain), str(tmp_path / "run"), until="teach", quiet=True)
    assert load_teacher(run.teacher)[1]["knows_null"] is False
    for path in (ten, run.teacher):
        with pytest.raises(ConfigError, match="knows 10 classes and no image without one"):
            train(config_for(path, **GUIDED), str(run.path if path == ten else tmp_path / "other"), quiet=True)
    # The same of a teacher of pagoda that never lost a label, whatever the run that brings it says.
    source = shutil.copytree(finished_run.teacher, tmp_path / "pagoda")
    facts = json.loads((source / "denoiser.json").read_text())
    assert facts["knows_null"] is True
    (source / "denoiser.json").write_text(json.dumps({**facts, "knows_null": False}))
    with pytest.raises(ConfigError, match=r"no image without one.*condition_dropout=0\.1"):
        train(config_for(source, **GUIDED, teach__condition_dropout=0.5), str(tmp_path / "third"), quiet=True)
    with pytest.raises(ConfigError, match="says that it was not trained on images without a class"):
        train(config_for(source, **GUIDED, teacher__null_class="last"), str(tmp_path / "third"), quiet=True)
    # One of an earlier version does not say; its owner may.
    (source / "denoiser.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "knows_null"}))
    with pytest.raises(ConfigError, match=r"nothing says whether.*teacher.null_class=last"):
        train(config_for(source, **GUIDED), str(tmp_path / "third"), quiet=True)
    train(config_for(source, **GUIDED, teacher__null_class="last"), str(tmp_path / "third"), until="teach", quiet=True)


def test_a_brought_teacher_with_a_null_class_guides(folders: dict[str, Path], tmp_path: Path) -> None:
    quick = {
        "distill__loop__steps": 1,
        "encode__num_nodes": 4,
        "encode__solver": "euler",
        "distill__loss__adversarial": 0.0,
    }
    run = train(config_for(folders["dit"], **GUIDED, **quick), str(tmp_path / "run"), quiet=True)
    generator = load_generator(run)
    assert generator.guidance_max == 3
    store, denoiser = LatentStore.open(run.latents), load_teacher(run.teacher)[0]
    context = open_context(run, run.config(), Runtime("cpu"), quiet=True)
    rows = torch.tensor([0, 7])
    images, condition = context.load(SIZE, rows, torch.zeros(2, dtype=torch.bool))
    weights, config = store.guidance(rows, torch.zeros_like(rows)), run.config()
    assert weights is not None
    grid, x = inversion_grid(config.encode, config.sigma_max), images

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D_null + w (D - D_null), with the row that was trained for no class."""
        null = denoiser(x, float(sigma), Condition.of_labels([-1, -1]))
        return null + weights[:, None, None, None] * (denoiser(x, float(sigma), condition) - null)

    noise = start_noise(config.seed, rows, torch.zeros_like(rows), (3, SIZE, SIZE))
    with torch.no_grad():
        x = images + float(grid[0]) * noise
        for low, high in pairwise(grid):
            x = x + (high - low) / low * (x - field(x, low))
    z = x / float(grid[-1])
    torch.testing.assert_close(store.get(rows, torch.zeros_like(rows)), z, atol=5e-3, rtol=5e-3)  # half precision


def test_distill_takes_a_teacher_where_none_was_trained_yet(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_for(folders["ddpm"])
    RunFolder.create(
        tmp_path / "run", override(config, {"teacher.path": "", "teacher.null_class": "auto", "size": SIZE})
    )
    told = ["--set", "teacher.null_class=last"]
    assert main(["distill", str(tmp_path / "run"), "--teacher", str(folders["ddpm"]), "--quiet", *told]) == 0
    assert RunFolder.open(tmp_path / "run").generator_sizes() == [SIZE]


def test_distill_starts_the_run_that_train_goes_on_with(folders: dict[str, Path], tmp_path: Path) -> None:
    read = {key: value for key, value in TINY.items() if not key.startswith(("teach.", "backbone."))}
    run = tmp_path / "run"
    common = ["--teacher", str(folders["ddpm"]), "--size", str(2 * SIZE), "--preset", "tiny", "--quiet"]
    common += ["--set", "teacher.null_class=last", *(f"{key}={json.dumps(value)}" for key, value in read.items())]
    assert main(["distill", str(run), "--data", DATA, *common]) == 0
    opened = RunFolder.open(run)
    assert opened.generator_sizes() == [SIZE]
    assert opened.config().size == 2 * SIZE
    before = model_hash(load_generator(opened)), opened.record("distill")
    assert main(["distill", str(run), "--data", DATA, *common]) == 0  # nothing is left to do
    assert main(["train", DATA, "--out", str(run), *common]) == 0
    assert opened.generator_sizes() == [SIZE, 2 * SIZE]
    assert before == (model_hash(load_generator(opened, SIZE)), opened.record("distill"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", DATA], "add --teacher. For one of its own run `pagoda teach"),
        (["--teacher", "somewhere"], "say which images it is made from, --data"),
        (["--teacher", "somewhere", "--size", "16"], "--size 16 is for a run that starts here: add --data"),
        (["--preset", "tiny"], "--preset tiny is for a run that starts here"),
    ],
)
def test_distill_says_what_a_run_lacks_to_start(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", str(tmp_path / "run"), *arguments]) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
