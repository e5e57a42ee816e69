"""Exported graphs: what PyTorch makes, at any batch, at every size; written whole or not at all."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from tests.networks.conftest import make_unet
from tests.tiny_teachers import TEACHERS, WITH_CLASSES, make_teacher

from pagoda.cli.main import main
from pagoda.errors import ArtifactError, ConfigError, MissingExtraError, ShapeError
from pagoda.export import (
    FACTS,
    ONNX_TOLERANCE,
    ImageMaker,
    export_onnx,
    export_program,
    largest_difference,
    read_onnx_facts,
    run_graph,
    trace,
)
from pagoda.export.web_parts import trace_parts
from pagoda.networks import OneStepGenerator, model_hash, open_teacher
from pagoda.pipelines import PagodaPipeline
from pagoda.stages.run_folder import RunFolder
from pagoda.stages.sampling import load_generator

BATCHES = (1, 2, 5, 70)
"""70: diffusers' U-Nets take another way from 64 on."""
ONE_OF_A_CLASS = ("text-unet", "dit", "sd3")
"""The class of the network decides how a program becomes an ONNX graph, which takes ten seconds; `float32` is the fourth."""


@pytest.fixture(scope="module")
def generator(finished_run: RunFolder) -> OneStepGenerator:
    return load_generator(finished_run)


@pytest.fixture(scope="module")
def float32(generator: OneStepGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(generator, tmp_path_factory.mktemp("onnx") / "made" / "g.onnx").path


@pytest.fixture
def traced_before(float32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds: what is done with a graph afterwards starts from the one that is there."""
    monkeypatch.setattr("pagoda.export.onnx._to_onnx", lambda maker: onnx.load(float32))


def test_onnx_agrees_with_pytorch_at_every_batch(generator: OneStepGenerator, float32: Path) -> None:
    difference, psnr = largest_difference(ImageMaker(generator), run_graph(float32.read_bytes()), BATCHES)
    assert difference < 1e-5 < ONNX_TOLERANCE
    assert psnr > 100


def test_an_onnx_file_names_its_inputs_and_says_what_made_it(generator: OneStepGenerator, float32: Path) -> None:
    session = onnxruntime.InferenceSession(float32, providers=["CPUExecutionProvider"])
    inputs = [(entry.name, entry.shape, entry.type) for entry in session.get_inputs()]
    assert inputs == [("z", ["batch", 3, 8, 8], "tensor(float)"), ("labels", ["batch"], "tensor(int64)")]
    assert [(entry.name, entry.shape) for entry in session.get_outputs()] == [("images", ["batch", 3, 16, 16])]
    facts = read_onnx_facts(float32)
    assert facts is not None
    assert (facts["model"], facts["size"], facts["weights"]) == (model_hash(generator), 16, "float32")


@pytest.mark.parametrize("label", [-2, 10])
def test_a_label_out_of_range_fails_in_a_graph_too(generator: OneStepGenerator, float32: Path, label: int) -> None:
    z, labels = ImageMaker(generator).inputs(2)
    wrong = torch.full_like(labels, label)
    with pytest.raises(Exception, match="out of data bounds"):
        run_graph(float32.read_bytes())((z, wrong))
    with pytest.raises(IndexError):
        trace(ImageMaker(generator, 8)).module()(z, wrong)


def test_a_smaller_size_is_the_lower_level_alone(generator: OneStepGenerator, float32: Path, tmp_path: Path) -> None:
    small = export_onnx(generator, tmp_path / "small.onnx", size=8).path
    inputs = ImageMaker(generator).inputs(3)
    images = run_graph(small.read_bytes())(inputs)
    with torch.no_grad():
        wanted = generator(inputs[0], _condition(inputs[1]), resolution=8)
    torch.testing.assert_close(images, wanted, atol=1e-5, rtol=0)
    assert small.stat().st_size < float32.stat().st_size


def _condition(labels: torch.Tensor):  # type: ignore[no-untyped-def]
    from pagoda.diffusion import Condition

    return Condition.of_labels(labels)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize(("weights", "share", "least"), [("float16", 0.65, 60.0), ("int8", 0.55, 20.0)])
def test_smaller_weights_make_a_smaller_file_and_report_what_they_cost(
    weights: str, share: float, least: float, generator: OneStepGenerator, float32: Path, tmp_path: Path
) -> None:
    made = export_onnx(generator, tmp_path / "g.onnx", weights=weights)  # type: ignore[arg-type]
    difference, psnr = largest_difference(ImageMaker(generator), run_graph(made.path.read_bytes()))
    assert (difference, psnr) == (made.difference, made.psnr)
    assert difference > 1e-6  # it is not float32 under another name
    assert psnr > least
    assert made.path.stat().st_size < share * float32.stat().st_size
    kinds = {weight.data_type for weight in onnx.load(made.path).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 if weights == "float16" else onnx.TensorProto.UINT8) in kinds


@pytest.mark.parametrize("kind", list(TEACHERS))
def test_generators_of_every_kind_of_teacher_export_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = grown_from(kind, tmp_path)
    maker = ImageMaker(generator)
    assert len(maker.inputs(1)) == (2 if kind in WITH_CLASSES else 1)
    program = trace(maker)
    module = program.module()
    assert largest_difference(maker, lambda inputs: module(*inputs), (1, 70))[0] < 1e-6
    if kind in ONE_OF_A_CLASS:
        monkeypatch.setattr("pagoda.export.onnx.trace", lambda maker: program)  # once: it takes seconds
        content = export_onnx(generator, tmp_path / "g.onnx").path.read_bytes()
        assert largest_difference(maker, run_graph(content), (1, 70))[0] < ONNX_TOLERANCE


def grown_from(kind: str, folder: Path) -> OneStepGenerator:
    teacher = open_teacher(make_teacher(folder / kind, kind))
    words, sigma_max = teacher.denoiser.preconditioning, min(50.0, teacher.denoiser.sigma_range[1])
    base = OneStepGenerator.from_teacher(teacher.network, output="unit", sigma_max=sigma_max, **words)
    return base.grow(channels=8).eval()


@pytest.mark.parametrize("to", ["program", "onnx", "web"])
def test_a_network_that_pytorch_makes_no_graph_of_is_named(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = OneStepGenerator.from_teacher(make_unet(num_class_embeds=None)).eval()
    plain = type(generator.base.conv_in).forward
    # A network that asks how large the batch is, as `len` does: a graph of it takes this batch and no other.
    asking = lambda self, x: plain(self, x) * (1 if len(x) == 1 else 2) / 2  # noqa: E731
    monkeypatch.setattr(type(generator.base.conv_in), "forward", asking)
    with pytest.raises(
        ArtifactError, match=r"(?s)torch.export makes no graph of .*`UNet2DModel`: .*batch.*--to diffusers"
    ):
        {"program": export_program, "onnx": export_onnx}.get(to, lambda g, _: trace_parts(g))(
            generator, tmp_path / f"g.{'pt2' if to == 'program' else to}"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_the_same_function_in_pytorch_alone(generator: OneStepGenerator, tmp_path: Path) -> None:
    made = export_program(generator, tmp_path / "g.pt2")
    assert made.difference == 0
    extra = {FACTS: ""}
    module = torch.export.load(made.path, extra_files=extra).module()
    assert json.loads(extra[FACTS])["model"] == model_hash(generator)
    assert largest_difference(ImageMaker(generator), lambda inputs: module(*inputs), BATCHES)[0] < 1e-6
    assert zipfile.is_zipfile(made.path)


def test_exporting_leaves_the_generator_as_it_was(generator: OneStepGenerator) -> None:
    before, sizes = model_hash(generator), generator.sizes
    trainable = [p.requires_grad for p in generator.parameters()]
    ImageMaker(generator, 8)
    assert (model_hash(generator), generator.sizes) == (before, sizes)
    assert [p.requires_grad for p in generator.parameters()] == trainable


def test_a_graph_that_differs_is_refused_and_nothing_is_written(
    generator: OneStepGenerator, float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(float32)
    largest = max(model.graph.initializer, key=lambda weight: len(weight.raw_data))
    largest.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(largest), largest.name))
    monkeypatch.setattr("pagoda.export.onnx._to_onnx", lambda maker: model)
    with pytest.raises(ArtifactError, match=r"differs from PyTorch by .*, accepted are 0\.0001"):
        export_onnx(generator, tmp_path / "g.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_in_words(generator: OneStepGenerator, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"accepted are \[8, 16\]"):
        export_onnx(generator, tmp_path / "g.onnx", size=32)
    with pytest.raises(ArtifactError, match=r"ends in \.onnx, got 'g\.pt'"):
        export_onnx(generator, tmp_path / "g.pt")
    with pytest.raises(ArtifactError, match=r"ends in \.pt2, got 'g\.onnx'"):
        export_program(generator, tmp_path / "g.onnx")
    with pytest.raises(ConfigError, match="unknown weights 'int4'"):
        export_onnx(generator, tmp_path / "g.onnx", weights="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_names_its_pip_line(
    missing: str, generator: OneStepGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pagoda\[export\]'"):
        export_onnx(generator, tmp_path / "g.onnx")


# The folder, and the command line.


def test_a_diffusers_folder_stands_alone(finished_run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert (
        main(["export", str(finished_run.path), "--to", "diffusers", "--out", str(out), "--licence", "cc-by-4.0"]) == 0
    )
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    weights = "generator/diffusion_pytorch_model.safetensors"
    assert names == ["README.md", "generator/config.json", weights, "model_index.json", FACTS]
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    a = PagodaPipeline.from_pretrained(out)(num_images=3, output_type="pt").images
    b = PagodaPipeline.from_pretrained(finished_run.path)(num_images=3, output_type="pt").images
    assert torch.equal(a, b)
    card = (out / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert json.loads((out / FACTS).read_text())["model"] in card
    assert "`shapes:count=40`" in card
    assert str(finished_run.path) not in card
    assert main(["export", str(finished_run.path), "--to", "diffusers", "--out", str(out)]) == 0  # replaced
    assert "export again with `--licence`" in (out / "README.md").read_text()


def test_a_folder_with_other_things_is_left_alone(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    for out in (tmp_path, finished_run.path):
        assert main(["export", str(finished_run.path), "--to", "diffusers", "--out", str(out)]) == 1
        assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "words"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "program", "--weights", "int8"), "--weights is for --to onnx and web"),
        (("--to", "onnx", "--licence", "mit"), "--licence goes into a model card"),
        (("--to", "onnx", "--runtime", "x.tgz"), "--runtime is for --to web"),
        (("--to", "diffusers", "--size", "64"), "has generators of [8, 16] pixels, none of 64"),
    ],
)
def test_options_of_another_format_are_refused(
    words: tuple[str, ...], message: str, finished_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished_run.path), *words]) == 1
    assert message in capsys.readouterr().err


def test_the_command_line_says_how_far_it_is_from_pytorch(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "g.pt2"
    assert main(["export", str(finished_run.path), "--to", "program", "--size", "8", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\nlargest difference from PyTorch 0, PSNR inf dB\n"
