"""Images say what made them, and the run makes the same pixels again; what was tampered with is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError
from pagoda.files import load_tensors, save_tensors
from pagoda.images import read_metadata, save_image
from pagoda.stages.provenance import compare_with_run
from pagoda.stages.run_folder import RunFolder

Capture = pytest.CaptureFixture[str]


def sample(run: RunFolder, folder: Path, ending: str) -> tuple[Path, Path]:
    """A grid and one of its images."""
    grid = folder / f"grid.{ending}"
    words = ["--n", "7", "--seed", "40", "--batch-size", "4", "--columns", "3", "--format", ending]
    assert main(["sample", str(run.path), *words, "--out", str(grid), "--each", str(folder / "each")]) == 0
    return grid, folder / "each" / f"000045.{ending}"


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_the_run_makes_the_same_pixels_again(ending: str, finished_run: RunFolder, tmp_path: Path) -> None:
    for path in sample(finished_run, tmp_path, ending):
        facts = read_metadata(path)
        assert facts is not None
        assert {"version", "model", "seeds", "labels", "resolution", "torch"} <= facts.keys()
        assert compare_with_run(path, finished_run.path).equal
    assert (facts["seed"], facts["label"], facts["seeds"]) == (45, 5, [44, 45, 46])  # the second batch of four


def test_webp_is_lossless(finished_run: RunFolder, tmp_path: Path) -> None:
    png, webp = (sample(finished_run, tmp_path / ending, ending)[0] for ending in ("png", "webp"))
    with Image.open(png) as a, Image.open(webp) as b:
        assert b.format == "WEBP"
        assert np.array_equal(np.asarray(a), np.asarray(b.convert("RGB")))


@pytest.mark.parametrize("name", ["final-16.png", "octaves.png"])
def test_what_training_draws_at_its_end_is_made_again(name: str, finished_run: RunFolder) -> None:
    assert compare_with_run(finished_run.path / "samples" / name, finished_run.path).equal


def test_every_picture_of_a_run_says_its_kind_and_version(finished_run: RunFolder) -> None:
    pictures = list(finished_run.path.rglob("samples/**/*.png"))
    assert len(pictures) > 5
    for path in pictures:
        facts = read_metadata(path)
        assert facts is not None
        assert {"kind", "version"} <= facts.keys()


def test_a_preview_is_not_made_by_a_model_and_seeds_alone(finished_run: RunFolder) -> None:
    preview = next(finished_run.path.glob("samples/teach/*.png"))
    with pytest.raises(ArtifactError, match="of the kind 'preview'"):
        compare_with_run(preview, finished_run.path)


def test_an_exported_folder_makes_it_again_too(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    grid, _ = sample(finished_run, tmp_path, "png")
    out = tmp_path / "folder"
    assert main(["export", str(finished_run.path), "--to", "diffusers", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(grid), "--run", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("equal: the run makes the same pixels\n")
    assert "seeds       [40, 41, 42, 43, 44, 45, 46]" in said


def rewrite(path: Path, pixels: np.ndarray | None = None, **changes: Any) -> None:
    """Write an image's pixels, or others, with some of its facts changed."""
    facts = read_metadata(path)
    with Image.open(path) as image:
        array = np.asarray(image) if pixels is None else pixels
    save_image(Image.fromarray(array), path, metadata={**(facts or {}), **changes})


def test_one_changed_pixel_is_found(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    path = sample(finished_run, tmp_path, "png")[1]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[3, 4, 1] ^= 1
    rewrite(path, pixels)
    found = compare_with_run(path, finished_run.path)
    assert (found.equal, found.pixels, found.largest) == (False, 1, 1)
    capsys.readouterr()
    assert main(["inspect", str(path), "--run", str(finished_run.path)]) == 1
    assert "not equal: 1 pixels differ, by 1 of 255 at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "0" * 64}, "was made by the model 000000000000"),
        ({"seeds": [1, "x"]}, "says seeds = .*tampered"),
        ({"seeds": []}, "says seeds = .*tampered"),
        ({"labels": [99, 0, 0]}, "what its model cannot do .*tampered"),
        ({"resolution": 64}, "what its model cannot do .*tampered"),
        ({"row": 9}, "what its model cannot do .*tampered"),
        ({"batch_size": 0}, "says batch_size = 0"),
        ({"batch_size": True}, "says batch_size = True"),
        ({"resolution": 8}, "is 16 x 16 px, by its metadata it was 8 x 8"),
    ],
)
def test_tampered_facts_are_refused_in_words(
    changes: dict[str, Any], message: str, finished_run: RunFolder, tmp_path: Path
) -> None:
    path = sample(finished_run, tmp_path, "png")[1]
    rewrite(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        compare_with_run(path, finished_run.path)


def test_another_seed_is_not_the_same_image(finished_run: RunFolder, tmp_path: Path) -> None:
    path = sample(finished_run, tmp_path, "png")[1]
    rewrite(path, seeds=[44, 145, 46])
    assert not compare_with_run(path, finished_run.path).equal


def test_a_grid_of_absurd_width_is_refused_before_it_is_drawn(finished_run: RunFolder, tmp_path: Path) -> None:
    path = sample(finished_run, tmp_path, "png")[0]
    rewrite(path, columns=60000)
    with pytest.raises(ArtifactError, match="columns = 60000 for 7 images"):
        compare_with_run(path, finished_run.path)


def test_another_run_is_named(finished_run: RunFolder, tmp_path: Path) -> None:
    grid, _ = sample(finished_run, tmp_path, "png")
    other = tmp_path / "other"
    assert main(["export", str(finished_run.path), "--to", "diffusers", "--out", str(other)]) == 0
    weights = other / "generator" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_tensors(weights)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    save_tensors(weights, {**tensors, name: tensors[name] + 1}, metadata)
    with pytest.raises(ArtifactError, match="it is of another run, or one of both was changed"):
        compare_with_run(grid, other)


def test_an_image_from_elsewhere_says_nothing(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(path)
    assert read_metadata(path) is None
    assert main(["inspect", str(path)]) == 1
    assert "does not say what made it" in capsys.readouterr().err
    comment = Image.Exif()
    comment.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0our holidays"
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg", exif=comment)
    assert read_metadata(tmp_path / "photo.jpg") is None


@pytest.mark.parametrize("text", ["{", "[1]", '"words"'])
def test_metadata_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("pagoda", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ArtifactError, match="tampered"):
        read_metadata(tmp_path / "x.png")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    for name, content in (("empty.png", b""), ("text.png", b"words"), ("cut.png", b"\x89PNG\r\n\x1a\n\0\0")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be read as an image"):
            read_metadata(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot be read as an image"):
        read_metadata(tmp_path / "nowhere.png")


def test_files_are_written_whole_in_the_format_of_their_name(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ConfigError, match=r"\.jpeg, \.jpg, \.png, \.webp, got the name 'x\.gif'"):
        save_image(image, tmp_path / "x.gif")
    with pytest.raises(ConfigError, match="a JPEG holds"):
        save_image(image, tmp_path / "x.jpg", metadata={"seeds": list(range(20_000))})
    assert list(tmp_path.iterdir()) == []
    save_image(image, tmp_path / "x.webp", metadata={"seeds": list(range(20_000)), "word": "ü"})
    facts = read_metadata(tmp_path / "x.webp")
    assert facts is not None
    assert (len(facts["seeds"]), facts["word"]) == (20_000, "ü")


def test_a_run_that_has_grown_still_knows_its_smaller_images(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run.path, copy)
    shutil.rmtree(copy / "generator-16")
    small = tmp_path / "small.png"
    assert main(["sample", str(copy), "--n", "4", "--out", str(small)]) == 0
    facts = read_metadata(small)
    assert json.dumps(facts)
    assert compare_with_run(small, finished_run.path).equal
