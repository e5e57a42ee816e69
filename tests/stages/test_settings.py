"""Settings that a run was given by name: read by something, by every octave, and fitting whatever size is asked for."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tests.conftest import tiny_config

import pagoda
from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError
from pagoda.stages.config import LossConfig, RunConfig, override, to_dict
from pagoda.stages.config_checks import check_crops
from pagoda.stages.context import open_context
from pagoda.stages.grow import grow
from pagoda.stages.presets import PRESETS, preset_config
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.unread_settings import check_read
from pagoda.training import Runtime

UNJUDGED = {"grow.loss.adversarial": 0.0}
UNREAD = [
    ({}, "grow.loop.steps", 5, "octaves have steps of their own: set grow.steps"),
    ({}, "grow.loop.batch_size", 8, "set grow.batch_size"),
    ({}, "backbone.depth", 3, "the backbone is a U-Net"),
    ({"backbone": "dit_nano"}, "backbone.channels", [16], "the backbone is a DiT"),
    ({"distill.mode": "rec"}, "distill.teacher_pairs.count", 7, "set distill.mode to both or dstl"),
    ({}, "distill.matching.optimizer.lr", 0.1, "distill.matching.weight is 0"),
    ({"distill.loss.adversarial": 0.0}, "distill.discriminator.lr", 0.1, "the distillation has no discriminator"),
    ({"distill.loss.adversarial": 0.0}, "distill.loss.raw_pixels", False, "distill.loss trains no discriminator"),
    ({"teacher.path": "somewhere"}, "teach.loop.steps", 5, "the teacher is brought"),
    ({"teacher.path": "somewhere"}, "teach.condition_dropout", 0.2, "the teacher is brought"),
    ({"teacher.path": "somewhere"}, "backbone.channels", [16, 32], "the teacher is brought"),
    ({"teacher.path": "somewhere"}, "noise_scale", 250.0, "the teacher is brought"),
    ({"distill.mode": "dstl"}, "distill.teacher_pairs.share", 0.3, "distill.mode=dstl learns one kind of pair"),
    ({"distill.mode": "dstl"}, "distill.loss.pairs", 0.3, "distill.mode=dstl rebuilds no images"),
    (UNJUDGED, "grow.loss.augment", [], "grow.loss trains no discriminator"),
    (UNJUDGED, "grow.loss.heads", "tokens", "grow.loss trains no discriminator"),
    (UNJUDGED, "grow.loss.adversarial_from", 0.1, "grow.loss trains no discriminator"),
    (UNJUDGED, "grow.loss.adaptive", False, "grow.loss trains no discriminator"),
    (UNJUDGED, "grow.discriminator.lr", 0.1, "no octave has a discriminator"),
    (UNJUDGED, "grow.fakes", 8, "no octave looks at samples of the prior"),
    ({**UNJUDGED, "grow.loss.reconstruction_judge": 0.5}, "grow.fakes", 8, "no octave looks at samples of the prior"),
    ({"grow.cache_gib": 0.0}, "grow.fakes", 8, "grow.cache_gib=0 caches nothing"),
    ({"distill.loss.adversarial": 0.0}, "distill.loss.adaptive", False, "distill.loss trains no discriminator"),
    ({"distill.loss.updates": "separate"}, "distill.loss.adaptive", False, "set distill.loss.updates=joint"),
    ({"distill.loss.pixel": 0.0}, "distill.loss.huber", 0.1, "set distill.loss.pixel above 0"),
    ({}, "grow.loss.lpips_size", 64, "set grow.loss.lpips above 0"),
    ({**UNJUDGED, "grow.loss.feature": 0.0}, "grow.loss.crop", 4, "nothing looks through the window"),
    ({"grow.blocks": [1]}, "grow.num_blocks", 3, "set grow.blocks"),
    ({"grow.heads": ["skip_rgb"]}, "grow.head_init", "zero", "set grow.heads"),
    *(
        ({}, f"grow.{name}", [4, 4], "than the octaves of the run, .16.")
        for name in ("steps", "batch_size", "channels")
    ),
    ({}, "grow.heads", ["skip_rgb", "zero"], "than the octaves of the run, .16."),
    ({"size": 32, "grow.at_once": 2}, "grow.blocks", [1, 1, 2], "than the octaves of the run"),
    ({"size": 32}, "grow.attention", 8, "those of the run are 16 px and more"),
    ({}, "grow.at_once", 2, "more than the octaves of the run, which grows through .8, 16."),
    (
        {"grow.loss.pixel": 0.0, "grow.loss.feature": 0.0, "grow.loss.adaptive": False},
        "grow.targets",
        "consistent",
        "no octave rebuilds images",
    ),
    ({}, "evaluation.metrics", ["kd"], "evaluation.every=0 evaluates never while training"),
    ({}, "evaluation.count", 64, "evaluation.every=0"),
    ({}, "evaluation.features", "random", "evaluation.every=0"),
    ({}, "evaluation.levels", [1.0], "evaluation.every=0"),
    ({"evaluation.gap.count": 0}, "evaluation.gap.features", "teacher", "measures no prior gap"),
    ({"evaluation.gap.count": 0}, "evaluation.gap.fractions", [0.5], "measures no prior gap"),
    ({"evaluation.gap.count": 0}, "evaluation.data", "shapes:seed=1", "nothing is compared with it"),
    ({}, "distill.loss.adversarial_from", 1.0, "no step is judged"),
    ({"grow.loss.adversarial_from": 1.0}, "grow.loss.adversarial", 0.1, "no step is judged"),
    ({"grow.loss.adversarial_from": 1.0}, "grow.loss.augment", [], "no step is judged"),
    ({"grow.train_from": "decoder.1"}, "grow.cache_gib", 1.0, "decoder.1 trains a part of the base"),
    ({"grow.train_from": "8"}, "grow.cache_gib", 1.0, "8 trains a part of the base"),
]


@pytest.mark.parametrize(
    ("changes", "name", "value", "said"), UNREAD, ids=[f"{name} {'; '.join(c)}" for c, name, _, _ in UNREAD]
)
def test_a_setting_that_nothing_reads_is_refused(
    changes: dict[str, object], name: str, value: object, said: str
) -> None:
    config = override(override(tiny_config(), changes), {name: value})
    with pytest.raises(ConfigError, match=f"nothing reads `{name}` in this run: .*{said}"):
        check_read(config, [name])
    check_read(config, [])  # what a preset or a file brings is not asked for by name


def test_settings_that_are_read_pass() -> None:
    config = override(tiny_config(), {"distill.mode": "both", "distill.matching.weight": 1.0})
    read = ["teach.loop.steps", "grow.loop.log_every", "distill.teacher_pairs.count", "distill.matching.optimizer.lr"]
    check_read(config, [*read, "distill.discriminator.lr", "backbone.channels", "noise_scale"])
    guided = {"distill.mode": "rec", "guidance.scale_max": 2.0, "guidance.assignment": "teacher", **UNJUDGED}
    check_read(override(config, guided), ["distill.teacher_pairs.count"])  # for the discriminator


READ = [
    ({}, ["grow.discriminator.lr", "grow.fakes", "grow.cache_gib", "grow.num_blocks", "grow.head_init"]),
    ({}, [f"grow.loss.{name}" for name in ("adversarial_from", "adaptive", "augment", "heads", "huber", "crop")]),
    ({**UNJUDGED, "grow.loss.reconstruction_judge": 0.5}, ["grow.discriminator.lr", "grow.loss.augment"]),
    ({"grow.loss.updates": "separate", "grow.loss.reconstruction_judge": 0.5}, ["grow.loss.adaptive"]),
    ({"distill.mode": "both"}, ["distill.teacher_pairs.share", "distill.loss.pairs"]),
    ({"grow.loss.lpips": 1.0}, ["grow.loss.lpips_size"]),
    ({"size": 32, "grow.at_once": 2, "grow.blocks": [1, 2]}, ["grow.blocks"]),
    ({"grow.train_from": "16"}, ["grow.cache_gib"]),
    ({"size": 8, "grow.channels": [16, 16]}, ["grow.channels"]),  # of later stages
    ({"size": 32, "grow.attention": 16, "grow.at_once": 2}, ["grow.attention", "grow.at_once", "grow.targets"]),
    ({"grow.attention": 0}, ["grow.attention"]),  # none
    ({"size": 8, "grow.attention": 8, "grow.at_once": 3}, ["grow.attention", "grow.at_once"]),  # of later stages
    (
        {
            f"grow.loss.{n}": v
            for n, v in {"pixel": 0.0, "feature": 0.0, "adaptive": False, "reconstruction_judge": 1.0}.items()
        },
        ["grow.targets"],
    ),
    ({"evaluation.every": 5, "evaluation.gap.count": 0}, [f"evaluation.{n}" for n in ("metrics", "count", "data")]),
    ({"evaluation.gap.count": 8}, ["evaluation.gap.features", "evaluation.gap.fractions", "evaluation.data"]),
    # One octave of two is judged: what judges are told is read by it.
    (
        {"size": 32, "grow.octave_losses": [{"adversarial": 0.0}, {"adversarial": 0.1}]},
        ["grow.loss.augment", "grow.fakes", "grow.discriminator.lr"],
    ),
]


@pytest.mark.parametrize(("changes", "names"), READ, ids=[" ".join(changes) or "tiny" for changes, _ in READ])
def test_what_is_read_under_some_setting_is_not_refused_there(changes: dict[str, object], names: list[str]) -> None:
    check_read(override(tiny_config(), changes), names)


def test_the_commands_and_the_functions_refuse_it(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    given = ["--set", "grow.loop.steps=5"]
    start = [
        "train",
        "shapes:count=40",
        "--base",
        "8",
        "--size",
        "16",
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "a"),
    ]
    for command in ([*start, *given], ["grow", str(tmp_path / "run"), *given]):
        assert main(command) == 1
        assert "nothing reads `grow.loop.steps` in this run: octaves have steps of their own" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    one = pagoda.Generator(finished_run, 8)
    with pytest.raises(ConfigError, match=r"nothing reads `grow.channels` .* octaves of the run, \[16\]"):
        pagoda.grow(one, size=16, settings={"grow.channels": [8, 8]})
    with pytest.raises(ConfigError, match="nothing reads `grow"):
        pagoda.teach("shapes:count=40", size=8, out=tmp_path / "b", preset="tiny", settings={"grow.loop.steps": 5})
    assert not (tmp_path / "b").exists()


def test_a_loss_of_the_octaves_reaches_each_of_them() -> None:
    two = override(tiny_config(size=32), {"grow.octave_losses": [to_dict(LossConfig(huber=h)) for h in (0.1, 0.2)]})
    changed = override(two, {"grow.loss.adversarial": 0.03, "grow.loss.stack.mixing": True})
    losses = [changed.grow.loss_of(octave) for octave in (0, 1)]
    assert [loss.huber for loss in losses] == [0.1, 0.2]  # what was not named stays
    assert [loss.adversarial for loss in losses] == [0.03, 0.03]
    assert all(loss.stack.mixing for loss in losses)
    for name in ("official", "pagoda"):
        config = override(preset_config(name, "shapes", base=64, size=512), {"grow.loss.adversarial_every": 4})
        assert {config.grow.loss_of(octave).adversarial_every for octave in range(3)} == {4}


def test_a_named_loss_comes_before_single_settings_of_it() -> None:
    config = override(
        preset_config("small", "shapes", base=16, size=256), {"grow.loss": "pagoda", "grow.loss.feature": 7.0}
    )
    assert {config.grow.loss_of(octave).feature for octave in range(4)} == {7.0}


@pytest.mark.parametrize("base", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_looks_through_windows_that_its_network_can_see(name: str, base: int) -> None:
    if name not in ("tiny", "small") and base < 32:
        with pytest.raises(ConfigError, match="meant for images of 32 px and more"):
            preset_config(name, "shapes", base=base, size=2 * base)
        return
    config = preset_config(name, "shapes", base=base, size=4 * base)
    assert isinstance(config, RunConfig)
    check_crops(config, config.backbone.stride)
    assert base % config.backbone.stride == 0


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_on_latents_windows_show_the_same_part_of_the_picture(name: str, factor: int) -> None:
    pixels = preset_config(name, "shapes", base=16, size=64)
    latents = preset_config(name, "shapes", base=16, size=64, codec_factor=factor)
    stride = latents.backbone.stride
    check_crops(latents, stride)
    assert 0 <= latents.grow.loss.crop * factor - pixels.grow.loss.crop < stride * factor
    same = dataclasses.replace(latents.grow.loss, crop=pixels.grow.loss.crop)
    assert dataclasses.replace(latents, grow=dataclasses.replace(latents.grow, loss=same)) == pixels
    with pytest.raises(ConfigError, match="codec_factor must be >= 1, got 0"):
        preset_config(name, "shapes", base=16, size=64, codec_factor=0)


def test_the_teacher_sees_no_window_that_is_no_multiple_of_its_stride() -> None:
    config = override(tiny_config(), {"grow.loss.crop": 10})
    check_crops(config, 2)
    with pytest.raises(ConfigError, match=r"grow\.loss\.crop=10: .* its stride 4\. Set it to 8 or 12, or to 0"):
        check_crops(config, 4)
    check_crops(override(config, {"grow.loss.crop": 18}), 4)  # larger than the image: nothing is cut
    random = override(config, {"grow.loss.stack.networks": ["random"]})
    check_crops(random, 4)


def test_an_octave_that_was_begun_with_the_cache_is_not_continued_without_it(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    """Its samples of the prior come from a pool with it, and are drawn anew without."""
    for begun, now in ((2.0, 0.0), (0.0, 2.0)):
        folder = tmp_path / f"{begun}"
        shutil.copytree(finished_run.path, folder)
        run = RunFolder.open(folder)
        shutil.rmtree(run.generator(16))
        (folder / "stages" / "grow-16.json").unlink()

        def one_octave(gib: float, run: RunFolder = run) -> None:
            config = tiny_config(grow__cache_gib=gib, grow__steps=[4])
            grow(open_context(run, config, Runtime("cpu"), quiet=True), 16)

        one_octave(begun)
        record = run.record("grow-16")
        assert record is not None
        run.write_record("grow-16", {**record, "done": False})  # as if it had been killed
        with pytest.raises(ArtifactError, match="lower_outputs was"):
            one_octave(now)
        run.write_record("grow-16", record)
        one_octave(now)  # a finished one takes any value
