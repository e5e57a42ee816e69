"""The edit pipeline: a user's own image of any size, known pixels byte for byte, runs that are not ready, files that say what made them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import tiny_config
from torch import Tensor

from pagoda import PagodaEditPipeline
from pagoda.cli.main import main
from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, DataError, ShapeError
from pagoda.images import read_metadata, to_pil, to_uint8
from pagoda.networks import model_hash
from pagoda.stages.amortise import load_encoder
from pagoda.stages.amortise_run import amortise_run
from pagoda.stages.editing import EditedFrames, TeacherEncoder
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import sample_images
from pagoda.steering import MaskOperator, box_blur
from pagoda.training import seeded_generator

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pipeline(finished_run: RunFolder) -> PagodaEditPipeline:
    return PagodaEditPipeline.from_pretrained(finished_run.path)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some grain."""
    random = np.random.default_rng(0)
    down, across = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [255 * across, 255 * down, 128 + 100 * np.sin(9 * across), 255 * (across > 0.2)][: len(mode)]
    pixels = np.stack(channels, -1) + random.integers(-9, 9, (height, width, len(mode)))
    return Image.fromarray(
        pixels.clip(0, 255).astype(np.uint8).squeeze(-1) if mode == "L" else pixels.clip(0, 255).astype(np.uint8)
    )


def hole_of(width: int, height: int) -> np.ndarray:
    keep = np.ones((height, width), bool)
    keep[height // 4 : height // 2, width // 4 : width // 2 + 1] = False
    return keep


# Inpainting.


@pytest.mark.parametrize("size", [(16, 16), (50, 37), (37, 50), (9, 12), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_known_pixels_come_back_byte_for_byte(
    pipeline: PagodaEditPipeline, size: tuple[int, int], mode: str, tmp_path: Path
) -> None:
    image, keep = photo(*size, mode), hole_of(*size)
    edited = pipeline.inpaint(image, keep, label=3, steps=2)
    edited.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        made = np.asarray(written)
    before = np.asarray(image if mode != "L" else image.convert("RGB"))
    assert made.shape == before.shape
    assert np.array_equal(made[keep], before[keep])
    assert not np.array_equal(made[~keep], before[~keep])
    edited.save(tmp_path / "x.webp")
    with Image.open(tmp_path / "x.webp") as written:
        lossless = np.asarray(written.convert(image.mode if mode != "L" else "RGB"))
    visible = keep if mode != "RGBA" else keep & (before[..., 3] > 0)  # WebP may drop colours that nobody sees
    assert np.array_equal(lossless[visible], before[visible])


def test_a_mask_may_be_a_file_an_array_painted_or_boxes(pipeline: PagodaEditPipeline, tmp_path: Path) -> None:
    image, keep = photo(24, 20), hole_of(24, 20)
    Image.fromarray((keep * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    painted = np.array(image)
    painted[~keep] = (255, 0, 255)
    erased = np.dstack([np.asarray(image), (keep * 255).astype(np.uint8)])
    options = {"label": 2, "steps": 2, "seed": 4, "strength": 0.5}
    made = [
        pipeline.inpaint(image, keep, **options),
        pipeline.inpaint(image, tmp_path / "mask.png", **options),
        pipeline.inpaint(image, torch.from_numpy(keep), **options),
        pipeline.inpaint(image, ~keep, mask_is="holes", **options),
        pipeline.inpaint(image, holes=[(6, 5, 7, 5)], **options),
        pipeline.inpaint(Image.fromarray(painted), paint="magenta", **options),
    ]
    for edited in made[1:]:
        assert np.array_equal(np.asarray(edited.image), np.asarray(made[0].image))
    hole = pipeline.inpaint(Image.fromarray(erased), paint="transparent", **options)
    assert hole.image.mode == "RGBA"
    assert np.array_equal(np.asarray(hole.image.convert("RGB")), np.asarray(made[0].image))
    assert not np.array_equal(
        np.asarray(pipeline.inpaint(image, keep, **{**options, "seed": 5}).image), np.asarray(made[0].image)
    )


def test_a_large_image_is_edited_within_a_box_alone(pipeline: PagodaEditPipeline) -> None:
    image, keep = photo(200, 120), np.ones((120, 200), bool)
    keep[50:60, 70:85] = False
    edited = pipeline.inpaint(image, keep, box=(60, 40, 48), label=1, steps=1)
    assert np.array_equal(np.asarray(edited.image)[keep], np.asarray(image)[keep])
    assert edited.facts["square"] == [60, 40, 48]
    with pytest.raises(DataError, match="the hole reaches beyond the model's square"):
        pipeline.inpaint(image, keep, box=(0, 0, 40), label=1)


# Other edits.


def test_edits_have_the_size_of_the_image(pipeline: PagodaEditPipeline) -> None:
    image = photo(41, 30)
    plain = pipeline.reconstruct(image, label=3)
    assert plain.image.size == (41, 30)
    assert plain.square.shape == (1, 3, 16, 16)
    centre = pipeline.transfer(image, 5, label=3, fit="crop")
    outside = np.asarray(centre.image)[:, 36:]
    assert np.array_equal(outside, np.asarray(image)[:, 36:])
    assert pipeline.reconstruct(photo(16, 16, "RGBA"), label=3).image.mode == "RGB"
    clear = photo(24, 20, "RGBA")
    made = pipeline.reconstruct(clear, label=3, box=(2, 3, 16)).image
    beside = np.ones((20, 24), bool)
    beside[3:19, 2:18] = False
    assert np.array_equal(np.asarray(made)[beside], np.asarray(clear)[beside])
    assert (np.asarray(made)[~beside][:, 3] == 255).all()
    assert pipeline.reconstruct(image, label=3, resolution=8).square.shape == (1, 3, 8, 8)


def test_a_strength_of_1_is_the_sample_of_the_seed(pipeline: PagodaEditPipeline) -> None:
    fresh = pipeline.transfer(photo(16, 16), 6, label=3, strength=1.0, seed=11)
    expected = sample_images(pipeline.editor.generator, [11], labels=[6])
    assert torch.equal(fresh.square, expected)
    assert np.array_equal(np.asarray(fresh.image), np.asarray(to_pil(expected)[0]))
    plain = pipeline.reconstruct(photo(16, 16), label=3)
    assert torch.equal(pipeline.transfer(photo(16, 16), 3, label=3, seed=9).square, plain.square)


def test_the_ends_of_the_way_are_the_reconstructions(pipeline: PagodaEditPipeline, tmp_path: Path) -> None:
    first, second = photo(16, 16), photo(30, 20).rotate(180)
    way = pipeline.interpolate(first, second, frames=5, labels=(3, 8))
    assert torch.equal(way.frames[:1], pipeline.reconstruct(first, label=3).square)
    assert torch.equal(way.frames[-1:], pipeline.reconstruct(second, label=8).square)
    way.save(tmp_path / "way.webp", seconds=1.0)
    way.save(tmp_path / "way.gif")
    way.save(tmp_path / "way.png")
    for name, count in (("way.webp", 8), ("way.gif", 8), ("way.png", 1)):
        with Image.open(tmp_path / name) as written:
            assert getattr(written, "n_frames", 1) == count
        facts = read_metadata(tmp_path / name)
        assert facts is not None
        assert (facts["kind"], facts["edit"], facts["frames"], facts["second_shows"]) == ("edit", "interpolate", 5, 8)
    with Image.open(tmp_path / "way.webp") as written:
        written.seek(4)
        written.load()
        assert written.info["duration"] == 200
        shown = np.asarray(written.convert("RGB"))
    assert np.array_equal(shown, to_uint8(way.frames[-1]).permute(1, 2, 0).numpy())


def test_the_way_as_a_film_says_what_made_it(
    pipeline: PagodaEditPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    film = tmp_path / "way.mp4"
    way = pipeline.interpolate(photo(16, 16), photo(30, 20), frames=5, labels=(3, 8))
    way.save(film, seconds=1.0, there_and_back=False)
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert main(["inspect", str(film)]) == 0
    assert '"interpolate"' in capsys.readouterr().out
    assert main(["inspect", str(film), "--run", "RUN"]) == 1
    assert "no run makes it again" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(8, 8), (10, 7), (4, 6)])
def test_an_enlarged_image_has_the_shape_of_the_small_one(pipeline: PagodaEditPipeline, size: tuple[int, int]) -> None:
    edited = pipeline.upscale(photo(*size), label=3, steps=2)
    assert edited.square.shape == (1, 3, 16, 16)
    assert max(edited.image.size) == 16
    assert abs(edited.image.width / edited.image.height - size[0] / size[1]) < 0.15
    with pytest.raises(ConfigError, match="images of 16 px are not enlarged by a result of 16 px"):
        pipeline.upscale(photo(16, 12), label=3)


def test_blurs_and_masks_are_undone(pipeline: PagodaEditPipeline) -> None:
    x = torch.from_numpy(np.asarray(photo(16, 16)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    for operator in (box_blur(16, 3), MaskOperator(torch.rand(16, 16) > 0.3)):
        edited = pipeline.restore(operator(x), operator, label=3, steps=2)
        assert float((operator(edited.square) - operator(x)).abs().mean()) < 0.02
        assert edited.image.size == (16, 16)
        assert edited.facts["operator"] == type(operator).__name__


@pytest.mark.parametrize("placed", [{}, {"fit": "crop"}, {"box": (4, 2, 24)}])
def test_a_measured_image_of_any_size_comes_back_in_its_place(
    pipeline: PagodaEditPipeline, placed: dict[str, Any]
) -> None:
    image, operator = photo(50, 37), box_blur(16, 3)
    measured = pipeline.measure(image, operator, **placed)
    assert torch.equal(measured.values, to_uint8(measured.values).float() / 127.5 - 1)
    told: dict[str, Any] = {"label": 3, "method": "project"}
    found, bare = (pipeline.restore(y, operator, **told) for y in (measured, measured.values))
    assert torch.equal(found.square, bare.square)
    assert (found.image.size, bare.image.size) == ((50, 37), (16, 16))
    rebuilt = pipeline.reconstruct(image, label=3, **placed)
    assert found.facts["square"] == rebuilt.facts["square"]
    outside = (np.asarray(rebuilt.image) == np.asarray(image)).all(-1)
    left, top, side = found.facts["square"]
    outside[max(0, top) : top + side, max(0, left) : left + side] = False
    assert np.array_equal(np.asarray(found.image)[outside], np.asarray(image)[outside])
    assert outside.any() == bool(placed)


# What an image shows.


def test_classes_go_by_number_name_condition_or_a_guess(pipeline: PagodaEditPipeline) -> None:
    names, image = pipeline.class_names, photo(16, 16)
    assert names is not None
    plain = pipeline.reconstruct(image, label=3)
    for given in ({"label": names[3]}, {"label": "3"}, {"condition": Condition.of_labels([3])}):
        assert torch.equal(pipeline.reconstruct(image, **given).square, plain.square)  # type: ignore[arg-type]
    assert torch.equal(
        pipeline.transfer(image, Condition.of_labels([4]), label=3).square, pipeline.transfer(image, 4, label=3).square
    )
    guessed = pipeline.reconstruct(image)
    assert torch.equal(guessed.square, pipeline.reconstruct(image, label=guessed.facts["shows"]).square)
    for wrong in ("zebra", 10, "-2"):
        with pytest.raises(ConfigError, match=f"no class {wrong!r}".replace("'-2'", "-2")):
            pipeline.reconstruct(image, label=wrong)
    with pytest.raises(ConfigError, match="label, prompt and condition say the same thing"):
        pipeline.reconstruct(image, label=3, condition=Condition.of_labels([3]))


# Runs and encoders.


def test_an_encoder_may_be_handed_in_and_the_teacher_is_then_not_needed(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    shutil.rmtree(copy / "teacher")
    with pytest.raises(ArtifactError, match="holds no teacher of pagoda"):
        PagodaEditPipeline.from_pretrained(copy)

    def encoder(images: Tensor, condition: Condition) -> Tensor:
        return images * 2

    pipeline = PagodaEditPipeline.from_pretrained(copy, encoder=encoder)
    edited = pipeline.reconstruct(photo(16, 16), label=3)
    assert edited.facts["encoder"] == "function"
    with pytest.raises(ConfigError, match=r"no class 'square'; classes are 0\.\.9\."):
        pipeline.reconstruct(photo(16, 16), label="square")


def test_the_encoder_in_one_call_reads_images_with_the_noise_that_the_inversion_gives_them(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(finished_run.path, tmp_path / "run"))
    with pytest.raises(ArtifactError, match=r"pagoda amortise"):
        PagodaEditPipeline.from_pretrained(copy, encoder="amortised")
    with pytest.raises(ConfigError, match=r"unknown encoder 'amortized'.*amortised"):
        PagodaEditPipeline.from_pretrained(copy, encoder="amortized")
    quick = {"amortise__loop__steps": 2, "amortise__loop__batch_size": 4, "amortise__loop__preview_every": 0}
    run = amortise_run(str(copy), tiny_config(**quick), quiet=True)
    pipeline = PagodaEditPipeline.from_pretrained(run, encoder="amortised")
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    labels = Condition.of_labels([1, 2, 3])
    noise = torch.randn(3, 8, 8, generator=seeded_generator(run.config().seed, "edit")).expand(3, 3, 8, 8)
    found = pipeline.editor.encode(images, labels)
    torch.testing.assert_close(found, load_encoder(run)(images, labels, noise=noise))
    alone = pipeline.editor.encode(images[1:2], labels[1:2])  # an image's latent depends on the image alone
    torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=1e-4)
    photo(20, 16).save(tmp_path / "photo.png")
    command = ["reconstruct", copy, tmp_path / "photo.png", "--label", 3, "--encoder", "amortised"]
    assert edit(*command, "--out", tmp_path / "made.png") == 0, capsys.readouterr().err
    facts = read_metadata(tmp_path / "made.png")
    assert facts is not None
    assert facts["encoder"] == f"OneCallEncoder {model_hash(load_encoder(run).network)}"


def test_a_run_that_is_not_ready_is_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a run folder"):
        PagodaEditPipeline.from_pretrained(tmp_path)
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(finished_run.config_path, early)
    shutil.copytree(finished_run.teacher, early / "teacher")
    with pytest.raises(ArtifactError, match="has no generator yet"):
        PagodaEditPipeline.from_pretrained(early)


def test_bad_settings_are_refused(pipeline: PagodaEditPipeline) -> None:
    image, keep = photo(16, 16), hole_of(16, 16)
    for options in ({}, {"mask": keep, "paint": "red"}, {"mask": keep, "holes": [(0, 0, 2, 2)]}):
        with pytest.raises(ConfigError, match="needs one of mask, paint and holes"):
            pipeline.inpaint(image, label=3, **options)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"makes images of \[8, 16\] px, none of 32"):
        pipeline.inpaint(image, keep, resolution=32, label=3)
    with pytest.raises(ConfigError, match=r"strength must lie in \[0, 1\], got 1.5"):
        pipeline.reconstruct(image, label=3, strength=1.5)
    spread = np.ones((64, 64), bool)
    spread[::4, ::4] = False  # every pixel of the model has some of it
    with pytest.raises(DataError, match="leaves no pixel of the model's 16 px"):
        pipeline.inpaint(photo(64, 64), spread, label=3)


def test_what_a_method_does_not_read_is_refused_and_not_recorded(pipeline: PagodaEditPipeline, tmp_path: Path) -> None:
    image, blur = photo(16, 16), box_blur(16, 3)
    x = blur(torch.rand(1, 3, 16, 16))
    for call in (
        lambda: pipeline.inpaint("nowhere.png", hole_of(16, 16), rounds=6),
        lambda: pipeline.upscale("nowhere.png", method="project", steps=3),
        lambda: pipeline.restore(x, blur, method="project", strength=0.5),
    ):
        with pytest.raises(ConfigError, match=r"is read by the methods? "):
            call()
    project = pipeline.restore(x, blur, label=3, method="project").facts
    assert not {"rounds", "steps", "strength"} & project.keys()
    turns = pipeline.inpaint(image, hole_of(16, 16), label=3, method="alternate", rounds=1).facts
    assert "drawn_by" not in turns
    assert (
        pipeline.editor.encoder.fingerprint
        in pipeline.inpaint(image, hole_of(16, 16), label=3, steps=1).facts["drawn_by"]
    )
    assert turns["rounds"] == 1
    assert "steps" not in turns
    with pytest.raises(
        ConfigError, match=r"seconds=3 is read for animations \(.gif, .webp, .mp4\), 'way.png' is a strip"
    ):
        EditedFrames(torch.zeros(2, 3, 8, 8), {}).save(tmp_path / "way.png", seconds=3)


# The command line.


def edit(*arguments: object) -> int:
    return main(["edit", *(str(argument) for argument in arguments)])


def test_every_edit_writes_a_file_that_says_what_made_it(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    image, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    photo(40, 30).save(image)
    photo(8, 8).save(tmp_path / "small.png")
    photo(16, 16).save(tmp_path / "square.png")
    Image.fromarray((hole_of(40, 30) * 255).astype(np.uint8)).save(mask)
    run, out = finished_run.path, tmp_path / "out"
    calls = {
        "reconstruct": [image, "--strength", 0.3, "--seed", 2],
        "transfer": [image, "--to", 4],
        "interpolate": [image, tmp_path / "square.png", "--second-label", 5, "--frames", 3],
        "inpaint": [image, "--mask", mask, "--steps", 2],
        "upscale": [tmp_path / "small.png", "--steps", 2],
        "restore": [image, "--blur", 3, "--simulate", "--method", "project"],
    }
    for name, arguments in calls.items():
        target = out / f"{name}.png"
        assert edit(name, run, *arguments, "--label", 3, "--out", target) == 0, capsys.readouterr().err
        assert str(target) in capsys.readouterr().out
        facts = read_metadata(target)
        assert facts is not None
        assert (facts["kind"], facts["edit"], facts["shows"]) == ("edit", name, 3)
        assert {"version", "model", "encoder", "source", "resolution", "torch", "device"} <= facts.keys()
        assert facts["encoder"].startswith("TeacherEncoder ")
        json.dumps(facts)
    with Image.open(out / "restore-measured.png") as measured, Image.open(out / "restore.png") as restored:
        assert (measured.size, restored.size) == ((16, 16), (40, 30))
    assert main(["inspect", str(out / "inpaint.png")]) == 0
    assert 'edit        "inpaint"' in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="of the kind 'edit'"):
        compare_with_run(out / "inpaint.png", run)
    with Image.open(out / "inpaint.png") as made, Image.open(image) as before:
        keep = hole_of(40, 30)
        assert np.array_equal(np.asarray(made)[keep], np.asarray(before)[keep])


def test_a_frame_of_an_animation_is_edited_as_the_image_that_it_is(
    pipeline: PagodaEditPipeline, finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    frames = [photo(16, 16).rotate(90 * k) for k in range(3)]
    moving = tmp_path / "moving.webp"
    frames[0].save(moving, save_all=True, append_images=frames[1:], lossless=True)
    run = finished_run.path

    for name, more, option in (
        ("restore", ["--blur", 3], r"--frame (in Python frame=)"),
        ("interpolate", [moving], r"--frame (in Python frame=)"),
        ("interpolate", [moving, "--frame", 0], r"--second-frame (in Python second_frame=)"),
    ):
        assert edit(name, run, moving, *more, "--label", 3) == 1
        assert option in capsys.readouterr().err

    way = pipeline.interpolate(moving, moving, frames=2, labels=(3, 4), frame=2, second_frame=1)
    assert torch.equal(way.frames, pipeline.interpolate(frames[2], frames[1], frames=2, labels=(3, 4)).frames)
    told = ["--label", 3, "--second-label", 4, "--frame", 2, "--second-frame", 1, "--frames", 2]
    assert edit("interpolate", run, moving, moving, *told, "--out", tmp_path / "way.png") == 0
    facts = read_metadata(tmp_path / "way.png")
    assert facts is not None
    assert (facts["source"], facts["second"]) == (way.facts["source"], way.facts["second"])

    frames[1].save(tmp_path / "still.png")
    sharpen = ["--blur", 3, "--method", "project", "--label", 3]
    for given, target in (([moving, "--frame", 1], "a.png"), ([tmp_path / "still.png"], "b.png")):
        assert edit("restore", run, *given, *sharpen, "--out", tmp_path / target) == 0
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_known_pixels_are_kept_of_deep_turned_and_moving_files(
    finished_run: RunFolder, tmp_path: Path, capsys: Capture
) -> None:
    pixels = np.asarray(photo(20, 14))
    deep = np.random.default_rng(0).integers(0, 65536, (14, 20), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    others = [Image.new("RGB", (20, 14), (k, 0, 0)) for k in (40, 90)]
    others[0].save(
        tmp_path / "moving.webp", save_all=True, append_images=[Image.fromarray(pixels), others[1]], lossless=True
    )
    inpaint = ["--hole", 3, 4, 5, 6, "--label", 3, "--steps", 1]

    def edited(name: str, *more: object) -> np.ndarray:
        target = tmp_path / f"{name}.out.png"
        assert edit("inpaint", finished_run.path, tmp_path / name, *inpaint, *more, "--out", target) == 0
        with Image.open(target) as made:
            return np.asarray(made)

    with pytest.warns(UserWarning, match=r"deep.png has 16 bits a channel"):
        grey = edited("deep.png")
    for made, expected in (
        (grey, np.round(deep / 257).astype(np.uint8)[..., None].repeat(3, -1)),
        (edited("turned.png"), np.rot90(pixels, -1)),
        (edited("moving.webp", "--frame", 1), pixels),
    ):
        keep = np.ones(expected.shape[:2], bool)
        keep[4:10, 3:8] = False
        assert np.array_equal(made[keep], expected[keep])
        assert not np.array_equal(made[~keep], expected[~keep])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["inpaint", "RUN", "x.png", "--out", "y.jpg", "--hole", 1, 1, 2, 2],
            "a JPEG does not keep pixels as they are",
        ),
        (
            ["inpaint", "nowhere", "x.png", "--paint", "red", "--mask-is", "holes"],
            "mask_is=holes is read for a mask alone",
        ),
        (
            ["inpaint", "RUN", "x.png", "--hole", 1, 1, 2, 2, "--mask-threshold", 9],
            "mask_threshold=9 is read for a mask",
        ),
        (["inpaint", "RUN", "x.png", "--mask", "x.png"], "or say which value is white by --mask-threshold N"),
        (["inpaint", "RUN", "x.png"], "needs one of mask, paint and holes"),
        (["reconstruct", "RUN", "x.png", "--out", "y.gif"], "--out ends with .png, .webp"),
        (["reconstruct", "RUN", "nowhere.png"], "nowhere.png cannot be edited: unreadable"),
        (["transfer", "RUN", "x.png", "--to", "zebra"], "no class 'zebra'"),
        (["interpolate", "RUN", "x.png", "x.png", "--out", "y.gif", "--seconds", 0], "seconds must be > 0, got 0"),
        (["interpolate", "nowhere", "x.png", "x.png", "--seconds", 1], "seconds=1 is read for animations"),
        (
            ["restore", "nowhere", "x.png", "--blur", 3, "--method", "project", "--strength", 0.5],
            "strength=0.5 is read by",
        ),
        (["inpaint", "nowhere", "x.png", "--rounds", 2], "rounds=2 is read by the method alternate alone"),
        (
            ["upscale", "nowhere", "x.png", "--method", "project", "--steps", 2],
            "steps=2 is read by the method optimise",
        ),
        (
            ["reconstruct", "nowhere", "clear.png", "--box", 0, 0, 8, "--out", "y.jpg"],
            "clear.png is transparent and keeps that beside the square",
        ),
        (["restore", "RUN", "x.png"], "give one of --blur and --rays"),
        (["restore", "RUN", "x.png", "--blur", 3], "x.png has 20 x 12 px, 16 x 16 are needed here"),
        (
            ["restore", "nowhere", "x.png", "--blur", 3, "--fit", "crop"],
            "--fit places the model's square in a whole image",
        ),
        (["restore", "RUN", "x.png", "--blur", 4], "odd width from 1 to the image's 16 px, got 4"),
        (["upscale", "RUN", "x.png"], "images of 20 px are not enlarged by a result of 16 px"),
        (["reconstruct", "nowhere", "x.png"], "nowhere is not a run folder"),
    ],
)
def test_mistakes_are_told_in_words(
    arguments: list[object],
    message: str,
    finished_run: RunFolder,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    photo(20, 12).save("x.png")
    photo(20, 12, "RGBA").save("clear.png")
    assert edit(*(finished_run.path if word == "RUN" else word for word in arguments)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("y.*"))


def test_edits_are_encoded_by_every_setting_of_the_run(pipeline: PagodaEditPipeline) -> None:
    encoder = pipeline.editor.encoder
    assert isinstance(encoder, TeacherEncoder)
    settings = dataclasses.replace(encoder.config.encode, renormalise=True)
    other = TeacherEncoder(encoder.denoiser, dataclasses.replace(encoder.config, encode=settings), encoder.fingerprint)
    images, condition = torch.rand(2, 3, 8, 8) * 2 - 1, Condition.of_labels([1, 2])
    plain, unit = encoder(images, condition), other(images, condition)
    rms = plain.square().flatten(1).mean(1).sqrt()
    assert float((rms - 1).abs().max()) > 1e-3
    torch.testing.assert_close(unit, plain / rms.reshape(-1, 1, 1, 1))
