"""The pipeline: the same pixels wherever they are made, a round trip that keeps every bit, and questions that are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pagoda import PagodaPipeline
from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.images import read_metadata, to_pil
from pagoda.networks import OneStepGenerator, model_hash
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator, sample_images

FRESH = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from pagoda import PagodaPipeline
images = PagodaPipeline.from_pretrained(sys.argv[1])(num_images=5, seed=3).images
np.save(sys.argv[2], np.stack([np.asarray(image) for image in images]))
"""


@pytest.fixture(scope="module")
def pipeline(finished_run: RunFolder) -> PagodaPipeline:
    return PagodaPipeline.from_pretrained(finished_run.path)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_fresh_process_makes_the_same_pixels(
    finished_run: RunFolder, pipeline: PagodaPipeline, tmp_path: Path
) -> None:
    target = tmp_path / "images.npy"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, str(finished_run.path), str(target)], env=environment, check=True)
    assert np.array_equal(np.load(target, allow_pickle=False), pixels(pipeline(num_images=5, seed=3).images))


def test_the_command_line_makes_the_same_pixels(
    finished_run: RunFolder, pipeline: PagodaPipeline, tmp_path: Path
) -> None:
    each = tmp_path / "each"
    arguments = ["sample", str(finished_run.path), "--n", "5", "--seed", "3", "--each", str(each)]
    assert main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    files = sorted(each.iterdir())
    assert [file.name for file in files] == [f"{seed:06d}.png" for seed in range(3, 8)]
    assert np.array_equal(pixels([Image.open(file) for file in files]), pixels(pipeline(num_images=5, seed=3).images))
    facts = read_metadata(files[2])
    assert facts is not None
    assert (facts["seed"], facts["label"]) == (5, 5)
    assert facts["model"] == model_hash(pipeline.generator)


def test_a_round_trip_keeps_every_bit(pipeline: PagodaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    again = PagodaPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is PagodaPipeline
    assert model_hash(again.generator) == model_hash(pipeline.generator)
    assert again.resolutions == pipeline.resolutions == [8, 16]
    assert again.config.class_names == pipeline.config.class_names
    a, b = (p(num_images=4, seed=1, output_type="pt").images for p in (pipeline, again))
    assert torch.equal(a, b)
    assert not list((tmp_path / "saved").rglob("*.bin"))


@pytest.mark.parametrize("names", [None, ["cat"], ["cat", "dog"], ["a", "b", "c"]])
def test_class_names_survive_whatever_their_number(
    pipeline: PagodaPipeline, tmp_path: Path, names: list[str] | None
) -> None:
    """diffusers reads lists of two in a pipeline's description as (library, class): names must not be taken for that."""
    PagodaPipeline(pipeline.generator, names).save_pretrained(tmp_path)
    assert PagodaPipeline.from_pretrained(tmp_path).config.class_names == names


def test_a_pickle_in_a_saved_pipeline_is_not_read(pipeline: PagodaPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    weights = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.generator.state_dict(), tmp_path / "generator" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        PagodaPipeline.from_pretrained(tmp_path)


def test_classes_have_the_names_of_the_data(finished_run: RunFolder, pipeline: PagodaPipeline) -> None:
    facts = json.loads((finished_run.teacher / "denoiser.json").read_text())
    names = pipeline.config.class_names
    assert names == facts["class_names"]
    assert [pipeline.label_of(name) for name in names] == list(range(10))
    by_name = pipeline(names[3], num_images=3, output_type="pt").images
    assert torch.equal(by_name, pipeline(3, num_images=3, output_type="pt").images)
    mixed = pipeline([names[3], 4], seed=[0, 1], output_type="pt").images
    assert torch.equal(mixed, pipeline([3, 4], output_type="pt").images)
    assert not torch.equal(by_name, pipeline(4, num_images=3, output_type="pt").images)


def test_an_unknown_class_is_refused_with_the_known_ones(pipeline: PagodaPipeline) -> None:
    with pytest.raises(ConfigError, match=r"no class 'dragon'; classes are \['circle'"):
        pipeline("dragon")
    with pytest.raises(ConfigError, match=r"labels must lie in 0\.\.9 .* got \[10\]"):
        pipeline(10)


def test_without_labels_the_classes_come_in_turn(pipeline: PagodaPipeline) -> None:
    in_turn = pipeline(num_images=12, output_type="pt").images
    named = pipeline([seed % 10 for seed in range(12)], output_type="pt").images
    assert torch.equal(in_turn, named)


def test_seeds_belong_to_images(pipeline: PagodaPipeline) -> None:
    listed = pipeline([1, 1, 1], seed=[7, 3, 7], output_type="pt").images
    counted = pipeline(1, num_images=5, seed=3, output_type="pt").images
    torch.testing.assert_close(listed[[0, 1]], counted[[4, 0]], atol=1e-5, rtol=0)
    torch.testing.assert_close(listed[0], listed[2], atol=1e-5, rtol=0)
    assert not torch.allclose(listed[0], listed[1], atol=1e-3)
    for kind in (np.array([7, 3, 7]), torch.tensor([7, 3, 7]), (7, 3, 7)):
        assert torch.equal(pipeline([1, 1, 1], seed=kind, output_type="pt").images, listed)


def test_a_smaller_resolution_is_the_level_below(finished_run: RunFolder, pipeline: PagodaPipeline) -> None:
    small = pipeline(num_images=3, resolution=8, output_type="pt").images
    assert small.shape == (3, 3, 8, 8)
    assert torch.equal(small, sample_images(load_generator(finished_run, 8), range(3)))
    assert pipeline(num_images=3).images[0].size == (16, 16)
    with pytest.raises(ShapeError, match=r"\[8, 16\]"):
        pipeline(resolution=32)


@pytest.mark.parametrize("steps", [0, 2, 50])
def test_more_than_one_step_is_refused(pipeline: PagodaPipeline, steps: int) -> None:
    with pytest.raises(ConfigError, match=f"num_inference_steps=1, got {steps}"):
        pipeline(num_inference_steps=steps)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"class_labels": [1, 2, 3], "seed": [0, 1]}, "class_labels asks for 3, seed asks for 2"),
        ({"class_labels": [1, 2], "num_images": 3}, "num_images asks for 3, class_labels asks for 2"),
        ({"seed": [1, 2], "num_images": 5}, "num_images asks for 5, seed asks for 2"),
        ({"num_images": 0}, "num_images asks for 0"),
        ({"class_labels": []}, "class_labels asks for 0"),
    ],
)
def test_counts_that_do_not_agree_are_refused(pipeline: PagodaPipeline, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pipeline(**asked)


def test_a_count_comes_from_whoever_names_it(pipeline: PagodaPipeline) -> None:
    assert len(pipeline().images) == 1
    assert len(pipeline(2, num_images=3).images) == 3
    assert len(pipeline(2, seed=[4, 9]).images) == 2
    assert len(pipeline([1, 2, 3], num_images=3, seed=5).images) == 3


def test_output_types_show_the_same_images(pipeline: PagodaPipeline) -> None:
    tensor = pipeline(num_images=3, output_type="pt").images
    array = pipeline(num_images=3, output_type="np").images
    images = pipeline(num_images=3).images
    assert (tensor.shape, array.shape) == ((3, 3, 16, 16), (3, 16, 16, 3))
    assert float(tensor.abs().max()) <= 1
    assert 0 <= array.min() <= array.max() <= 1
    assert np.allclose(array, (tensor.permute(0, 2, 3, 1).numpy() + 1) / 2)
    assert np.array_equal(pixels(images), pixels(to_pil(tensor)))
    assert torch.equal(pipeline(num_images=3, output_type="pt", return_dict=False)[0], tensor)
    with pytest.raises(ConfigError, match="output_type must be pil, np or pt, got 'latent'"):
        pipeline(output_type="latent")


def test_it_computes_in_the_type_that_was_asked_for(finished_run: RunFolder, pipeline: PagodaPipeline) -> None:
    half = PagodaPipeline.from_pretrained(finished_run.path, torch_dtype=torch.bfloat16)
    assert next(half.generator.parameters()).dtype == torch.bfloat16
    made = half(num_images=4, output_type="pt").images
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, pipeline(num_images=4, output_type="pt").images, atol=0.1, rtol=0)
    with pytest.raises(ConfigError, match="loaded without revision"):
        PagodaPipeline.from_pretrained(finished_run.path, revision="main")


def test_an_unfinished_run_is_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    for size in (8, 16):
        shutil.rmtree(tmp_path / "run" / f"generator-{size}")
    with pytest.raises(ArtifactError, match="no generator yet"):
        PagodaPipeline.from_pretrained(tmp_path / "run")


def test_damaged_weights_are_noticed(finished_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished_run.path, tmp_path / "run")
    weights = tmp_path / "run" / "generator-16" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    content = bytearray(whole)
    content[-3] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="exchanged or damaged"):
        PagodaPipeline.from_pretrained(tmp_path / "run")
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=r"diffusion_pytorch_model\.safetensors` is not a complete"):
        PagodaPipeline.from_pretrained(tmp_path / "run")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match="Only safetensors"):
        PagodaPipeline.from_pretrained(tmp_path / "run")


def test_a_generator_of_grey_images_without_labels_gives_grey_images() -> None:
    base = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    grey = PagodaPipeline(OneStepGenerator(base).eval())
    assert grey(num_images=2).images[0].mode == "L"
    assert grey(num_images=2, output_type="np").images.shape == (2, 8, 8, 1)
    with pytest.raises(ConfigError, match="without labels"):
        grey(3)
    with pytest.raises(ConfigError, match="no class 'cat'"):
        grey("cat")
