"""ONNX: the generator for onnxruntime, in float32, or with its weights in float16 or int8."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from pagoda.errors import ArtifactError, ConfigError, ResourceError, did_you_mean, import_extra
from pagoda.export.facts import Exported, export_facts
from pagoda.export.graph import INPUT_NAMES, Graph, ImageMaker, largest_difference, naming_network, quiet_pytrees, trace
from pagoda.files import write_bytes_atomic
from pagoda.images import METADATA_KEY
from pagoda.networks import OneStepGenerator

ONNX_TOLERANCE = 1e-4
"""Largest accepted difference of float32 from PyTorch, of images in [-1, 1]. Smaller weights are reported as they are."""
OPSET = 18
"""Version of the operators: what torch.onnx writes without a conversion, and onnxruntime reads since 1.14."""
Weights = Literal["float32", "float16", "int8"]


def export_onnx(
    generator: OneStepGenerator,
    path: Path | str,
    *,
    size: int | None = None,
    weights: Weights = "float32",
) -> Exported:
    """Write one .onnx file: inputs `z` (B, C, b, b) float32 and, with classes, `labels` (B,) int64; output `images` (B, C, r, r).

    Args:
        generator: Of a finished run.
        path: File to write; its name ends in .onnx.
        size: Side of the images, in pixels; the largest when None.
        weights: "float32"; "float16": stored in half precision, calculated in float32; "int8": onnxruntime's dynamic quantisation.

    Raises:
        ArtifactError: another ending, a network of which PyTorch makes no graph, or a float32 graph that differs from PyTorch by more
            than `ONNX_TOLERANCE`.
        ConfigError: unknown weights.
        MissingExtraError: the extra `export` is not installed.
        ResourceError: more weights than one ONNX file can hold.
        ShapeError: the generator has no level of that size.
    """
    path = Path(path)
    check_weights(weights)
    if path.suffix != ".onnx":
        raise ArtifactError(f"an ONNX graph is written into a file that ends in .onnx, got {path.name!r}.")
    onnx = need_onnx()
    maker = ImageMaker(generator, size)
    needed = sum(p.numel() * 4 for p in maker.parameters())
    if needed > 2**31 - 2**24:
        raise ResourceError(
            f"the weights take {needed / 2**30:.1f} GiB, an ONNX file holds 2. Export a program or a diffusers folder instead."
        )
    model = _to_onnx(maker)
    # The float32 graph is judged in every case, so that what is left is the doing of the smaller weights.
    difference, psnr = largest_difference(maker, run_graph(model.SerializeToString()))
    if not difference <= ONNX_TOLERANCE:
        raise ArtifactError(
            f"the ONNX graph differs from PyTorch by {difference:.2g}, accepted are {ONNX_TOLERANCE:g}. "
            "Nothing was written; try the versions in constraints.txt."
        )
    if weights != "float32":
        model = shrink_weights(model, weights)
        difference, psnr = largest_difference(maker, run_graph(model.SerializeToString()))
    facts = export_facts(generator, size=maker.image_size, weights=weights, difference=difference)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(facts)})
    onnx.checker.check_model(model)
    write_bytes_atomic(path, model.SerializeToString())
    return Exported(path=path, difference=difference, psnr=psnr)


def run_graph(content: bytes) -> Graph:
    """A serialised ONNX graph as a function of tensors, on the CPU by as many threads as PyTorch uses.

    Raises:
        MissingExtraError: the extra `export` is not installed.
    """
    runtime = import_extra("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def read_onnx_facts(path: Path | str) -> dict[str, Any] | None:
    """What `export_onnx` wrote into a file about itself; None for a graph from elsewhere.

    Raises:
        MissingExtraError: the extra `export` is not installed.
    """
    model = import_extra("onnx", "export").load(str(path))
    found = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA_KEY)
    return None if found is None else dict(json.loads(found))


def check_weights(weights: str) -> None:
    """Refuse weights of an unknown kind.

    Raises:
        ConfigError: naming those that are known.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"unknown weights {weights!r}. {did_you_mean(str(weights), get_args(Weights))}")


def need_onnx() -> Any:
    """The package onnx, with the others that an export needs in reach.

    Raises:
        MissingExtraError: the extra `export` is not installed.
    """
    import_extra("onnxscript", "export")
    import_extra("onnxruntime", "export")
    return import_extra("onnx", "export")


def _to_onnx(maker: ImageMaker) -> Any:
    program = trace(maker)
    with naming_network(maker.generator, "torch.onnx"):
        return convert_program(program, list(INPUT_NAMES[: len(maker.inputs(1))]), ["images"])


def convert_program(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> Any:
    """A traced program as an onnx ModelProto, with the first axis of every input and output called `batch`."""
    with quiet_pytrees(), _quiet_exporter():
        made = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
        )
    assert made is not None, "torch.onnx returns a program unless it is given a file"
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # shapes in between, in terms of PyTorch's own symbols
    for node in model.graph.node:  # where each node comes from in PyTorch: half of the file for small models
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def shrink_weights(model: Any, weights: Weights) -> Any:
    """A float32 ModelProto with its weights in float16 or int8; as it is for "float32"."""
    if weights == "float32":
        return model
    return _halve_weights(model) if weights == "float16" else _quantise(model)


def _halve_weights(model: Any) -> Any:
    """Every float32 weight stored as float16 with a cast behind it, which onnxruntime carries out once, when it loads."""
    onnx = import_extra("onnx", "export")
    kept, casts = [], []
    for weight in model.graph.initializer:
        value = onnx.numpy_helper.to_array(weight)
        if value.dtype != np.float32 or value.size < 2 or np.abs(value).max() > np.finfo(np.float16).max:
            kept.append(weight)
            continue
        stored = f"{weight.name}_float16"
        kept.append(onnx.numpy_helper.from_array(value.astype(np.float16), stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [weight.name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return model


def _quantise(model: Any) -> Any:
    """onnxruntime's dynamic quantisation: weights of convolutions and products in 8 bits, activations as they come."""
    onnx = import_extra("onnx", "export")
    quantization = import_extra("onnxruntime.quantization", "export")
    with tempfile.TemporaryDirectory() as folder, _quiet_exporter():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        # Unsigned: onnxruntime's CPU convolutions take no signed weights.
        quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QUInt8)
        return onnx.load(str(target))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Leave out remarks about packages that are not needed here, and about steps that would change nothing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
