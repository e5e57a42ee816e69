"""The watermark by its laws: what an unmarked image reads, what marking costs, what survives, and that a key is needed."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pagoda.cli.main import main
from pagoda.data import ShapesSource
from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.images import read_metadata, to_pil
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.provenance import compare_with_run, read_mark_of
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.watermark import (
    FALSE_POSITIVES,
    MARK_PSNR,
    MarkReading,
    mark_images,
    mark_picture,
    read_mark,
)

Capture = pytest.CaptureFixture[str]


def shapes(count: int, size: int) -> list[Image.Image]:
    source = ShapesSource(count=count, size=size)
    return [source.image(i) for i in range(count)]


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float64)).permute(2, 0, 1)[None] / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("kind", ["shape", "noise", "edge"])
def test_an_unmarked_image_reads_a_unit_gaussian_whatever_it_shows(kind: str) -> None:
    picture = shapes(1, 32)[0]
    if kind != "shape":
        array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if kind == "edge":
            array[:] = 40
            array[5:21, 9:] = 250
        picture = Image.fromarray(array)
    found = torch.tensor([read_mark(picture, f"key {i}").statistic for i in range(400)], dtype=torch.float64)
    # Standard errors of 400 draws: 0.05 of the mean, 0.035 of the std. Four of them.
    assert abs(float(found.mean())) < 0.2
    assert abs(float(found.std()) - 1) < 0.15
    exact = 0.5 * torch.erfc(-found.sort().values / math.sqrt(2))
    steps = torch.arange(1, 401) / 400
    assert float((exact - steps).abs().max()) < 0.1  # Kolmogorov's bound for 400 at a level of 0.001 is 0.098


def test_another_key_reads_nothing() -> None:
    for i, picture in enumerate(shapes(10, 64)):
        marked = mark_picture(picture, "mine")
        assert read_mark(marked, "mine").statistic > 15
        assert not read_mark(marked, f"theirs {i}").found()


@pytest.mark.parametrize("wanted", [34.0, MARK_PSNR, 44.0])
def test_marking_costs_what_is_allowed(wanted: float) -> None:
    picture = as_tensor(shapes(1, 64)[0]) * 0.8  # away from black and white, where nothing is clamped
    marked = mark_images(picture, "mine", psnr=wanted)
    assert wanted <= psnr(marked, picture) < wanted + 0.1
    change = marked - picture
    torch.testing.assert_close(change[:, :1].expand_as(change), change)  # brightness alone


def test_a_stronger_mark_reads_louder() -> None:
    picture = as_tensor(shapes(1, 32)[0])
    heard = [read_mark(to_pil(mark_images(picture, "mine", psnr=p))[0], "mine").statistic for p in (46, 42, 38, 34)]
    assert heard == sorted(heard)


def test_it_survives_jpeg_and_resizing() -> None:
    for picture in shapes(10, 64):
        marked = mark_picture(picture, "mine")
        file = io.BytesIO()
        marked.save(file, "JPEG", quality=75)
        assert read_mark(Image.open(file), "mine").found()
        small = marked.resize((48, 48), Image.Resampling.BICUBIC)
        assert read_mark(small.resize((64, 64), Image.Resampling.BICUBIC), "mine").found()


def test_a_cropped_image_is_found_where_it_lay() -> None:
    marked = mark_picture(shapes(1, 64)[0], "mine").crop((3, 5, 61, 62))
    reading = read_mark(marked, "mine", cropped_from=(64, 64))
    assert reading.placements == 7 * 8
    assert reading.found()
    assert not read_mark(marked, "mine").found()  # at the wrong place it is noise
    with pytest.raises(ShapeError, match="58 x 57 pixels, more than the 50 x 64"):
        read_mark(marked, "mine", cropped_from=(50, 64))


def test_images_need_not_be_square_nor_coloured_nor_alone() -> None:
    picture = shapes(1, 64)[0].convert("L").resize((80, 48))
    assert read_mark(mark_picture(picture, "mine"), "mine").found()
    batch = torch.cat([as_tensor(p) for p in shapes(3, 32)]).float()
    marked = mark_images(batch, "mine")
    assert marked.dtype == torch.float32
    assert torch.equal(marked[1:2], mark_images(batch[1:2], "mine"))


def test_the_probability_is_the_normal_tail_times_the_places() -> None:
    assert MarkReading(statistic=0.0).probability == 0.5
    assert MarkReading(statistic=4.2649, placements=1).probability == pytest.approx(FALSE_POSITIVES, rel=1e-3)
    assert MarkReading(statistic=4.3).found()
    assert not MarkReading(statistic=4.3, placements=100).found()
    assert MarkReading(statistic=-3.0, placements=9).probability == 1.0


def test_what_cannot_be_marked_is_refused() -> None:
    with pytest.raises(ShapeError, match="an image of 8 x 8 pixels has"):
        mark_images(torch.zeros(1, 3, 8, 8), "mine")
    with pytest.raises(ShapeError, match="got 4 channels"):
        mark_images(torch.zeros(1, 4, 32, 32), "mine")
    with pytest.raises(ConfigError, match="key of a watermark is empty"):
        mark_images(torch.zeros(1, 3, 32, 32), "")
    with pytest.raises(ConfigError, match="must lie in 20 to 60 dB, got 90"):
        mark_images(torch.zeros(1, 3, 32, 32), "mine", psnr=90)


def test_a_run_marks_finds_and_makes_again(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    grid, each = tmp_path / "grid.png", tmp_path / "each"
    words = ["sample", str(finished_run.path), "--n", "6", "--out", str(grid), "--each", str(each)]
    assert main([*words, "--watermark", "a long secret"]) == 0
    facts = read_metadata(grid)
    assert facts is not None
    assert facts["watermark"] == {"psnr": MARK_PSNR}
    assert "a long secret" not in str(facts)
    image = each / "000003.png"
    for path in (grid, image):
        assert compare_with_run(path, finished_run.path, watermark="a long secret").equal
        assert not compare_with_run(path, finished_run.path, watermark="another").equal
        with pytest.raises(ConfigError, match="give the key of its watermark"):
            compare_with_run(path, finished_run.path)
    assert read_mark_of(grid, "a long secret").found()
    capsys.readouterr()
    assert main(["inspect", str(grid), "--watermark", "a long secret", "--run", str(finished_run.path)]) == 0
    said = capsys.readouterr().out
    assert "the mark of this key is found: statistic" in said
    assert said.endswith("equal: the run makes the same pixels\n")
    assert main(["inspect", str(grid), "--watermark", "another"]) == 1
    assert "the mark of this key is not found" in capsys.readouterr().err
    assert main(["inspect", str(grid), "--cropped-from", "60", "60"]) == 1
    assert "--cropped-from is for the search of a watermark" in capsys.readouterr().err
    pipe = PagodaPipeline.from_pretrained(finished_run.path)
    same = pipe(num_images=6, watermark="a long secret").images[3]
    assert np.array_equal(np.asarray(same), np.asarray(Image.open(image)))


def test_a_mark_is_found_where_the_metadata_is_gone(finished_run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    grid, bare = tmp_path / "grid.png", tmp_path / "bare.png"
    words = ["sample", str(finished_run.path), "--n", "16", "--out", str(grid), "--watermark", "mine"]
    assert main(words) == 0
    with Image.open(grid) as image:
        Image.fromarray(np.asarray(image)).save(bare)
    assert main(["inspect", str(bare)]) == 1
    capsys.readouterr()
    assert main(["inspect", str(bare), "--watermark", "mine"]) == 0
    assert capsys.readouterr().out.startswith("the mark of this key is found")


@pytest.mark.parametrize("said", [{"psnr": "x"}, {"psnr": 400}, 3, {}])
def test_a_mark_that_was_tampered_with_is_refused(said: object, finished_run: RunFolder, tmp_path: Path) -> None:
    from pagoda.images import save_image

    path = tmp_path / "grid.png"
    assert main(["sample", str(finished_run.path), "--n", "4", "--out", str(path), "--watermark", "mine"]) == 0
    with Image.open(path) as image:
        save_image(image.copy(), path, metadata={**(read_metadata(path) or {}), "watermark": said})
    with pytest.raises(ArtifactError, match=r"says watermark = .*tampered"):
        compare_with_run(path, finished_run.path, watermark="mine")
