"""A generator as a chain of small graphs, so that a page computes no further than the size that is asked for.

    base     z, labels, to_labels, mix -> hidden, image, context
    level    hidden, image, context    -> next_hidden, next_image      (one for each octave)

`context` is the embedding of time and class (B, E), `hidden` are features. `mix` goes from one class to another: the
embedding of a class is (1 - mix) E[labels] + mix E[to_labels], so that a walk between images of two classes has no jump.
A generator without classes has `z` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, import_extra
from pagoda.export.graph import CHECKED_BATCHES, ImageMaker, naming_network, quiet_pytrees
from pagoda.export.onnx import convert_program
from pagoda.networks import OneStepGenerator

BASE_INPUTS, BASE_OUTPUTS = ["z", "labels", "to_labels", "mix"], ["hidden", "image", "context"]
LEVEL_INPUTS, LEVEL_OUTPUTS = ["hidden", "image", "context"], ["next_hidden", "next_image"]


@dataclass
class _Blend:
    """What the tables of classes need beyond the labels that they are asked for."""

    to_labels: Tensor | None = None
    mix: Tensor | None = None


class _MixedEmbedding(nn.Embedding):
    """A table of classes that answers with a mixture of two rows."""

    def __init__(self, table: nn.Embedding, blend: _Blend) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self._blend = blend

    def forward(self, input: Tensor) -> Tensor:
        blend, first = self._blend, super().forward(input)
        assert blend.to_labels is not None, "set by the part that runs the base"
        assert blend.mix is not None, "set by the part that runs the base"
        return first + blend.mix[:, None] * (super().forward(blend.to_labels) - first)


class BasePart(nn.Module):
    """The base of a generator: z (B, C, b, b), labels and to_labels (B,) int64 (-1 = none), mix (B,) in [0, 1]."""

    def __init__(self, generator: OneStepGenerator) -> None:
        super().__init__()
        self.generator = generator
        self._num_classes, self._blend = generator.num_classes, _Blend()
        if self._num_classes:
            self._mix_tables()

    def _mix_tables(self) -> None:
        for parent in list(self.generator.base.modules()):
            for name, child in parent.named_children():
                # Labels are embedded by tables of one row a class and one for none (see `networks.calling`).
                if isinstance(child, nn.Embedding) and child.num_embeddings == self._num_classes + 1:
                    setattr(parent, name, _MixedEmbedding(child, self._blend))

    def forward(
        self, z: Tensor, labels: Tensor | None = None, to_labels: Tensor | None = None, mix: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, image (B, C, b, b) and embedding (B, E)."""
        if to_labels is not None:
            to_labels = torch.where(to_labels < 0, self._num_classes, to_labels)
        self._blend.to_labels, self._blend.mix = to_labels, mix
        return self.generator._run_base(z, Condition(label=labels))


@dataclass(frozen=True, kw_only=True)
class WebPart:
    """One graph of the chain.

    Attributes:
        size: Side of the images that it makes.
        model: Its onnx ModelProto.
    """

    size: int
    model: Any


def trace_parts(generator: OneStepGenerator, size: int | None = None) -> list[WebPart]:
    """The graphs of a generator up to `size`, in float32.

    Raises:
        ArtifactError: PyTorch cannot make a graph of this kind of network.
        MissingExtraError: the extra `export` is not installed.
        ShapeError: the generator has no level of that size.
    """
    with naming_network(generator, "torch.export"):
        return _trace_parts(generator, size)


def _trace_parts(generator: OneStepGenerator, size: int | None) -> list[WebPart]:
    copy = ImageMaker(generator, size).generator  # on the CPU, in float32, frozen, with free batches
    octaves, base = list(copy.octaves), BasePart(copy).eval()
    inputs = _mixed(ImageMaker(generator, size).inputs(2))
    names = BASE_INPUTS[: len(inputs)]
    with torch.no_grad():
        state = base(*inputs)
    parts = [WebPart(size=copy.base_size, model=convert_program(_trace(base, inputs, names), names, BASE_OUTPUTS))]
    for number, level in enumerate(octaves, 1):
        with torch.no_grad():
            hidden, image = level(*state)
        program = _trace(level, state, ["hidden", "rgb", "embedding"])
        parts.append(
            WebPart(
                size=copy.base_size * 2**number,
                model=convert_program(program, list(LEVEL_INPUTS), list(LEVEL_OUTPUTS)),
            )
        )
        state = (hidden, image, state[2])
    return parts


def _mixed(inputs: tuple[Tensor, ...], mix: float = 0.0) -> tuple[Tensor, ...]:
    """Inputs of an `ImageMaker` for the base: on the way from each row's class to the next row's."""
    if len(inputs) == 1:
        return inputs
    z, labels = inputs
    return z, labels, labels.roll(1), torch.full((len(z),), mix)


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str]) -> ExportedProgram:
    batch = Dim("batch")
    with quiet_pytrees(), torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes={name: {0: batch} for name in names}, strict=False)


@torch.no_grad()
def compare_parts(generator: OneStepGenerator, parts: Sequence[WebPart]) -> tuple[float, float]:
    """Largest absolute difference of the chain from PyTorch over sizes, batches and both ends of a mixture; PSNR in dB.

    Raises:
        ArtifactError: images of another shape, or values that are not finite.
    """
    runtime = import_extra("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    sessions = [
        runtime.InferenceSession(part.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for part in parts
    ]
    maker = ImageMaker(generator, parts[-1].size)
    largest, squares, count = 0.0, 0.0, 0
    for batch in CHECKED_BATCHES:
        inputs = maker.inputs(batch, first_seed=1000 * batch)
        for mix in (0.0, 1.0) if len(inputs) > 1 else (0.0,):
            mixed = _mixed(inputs, mix)
            condition = Condition(label=None if len(inputs) == 1 else mixed[2] if mix else mixed[1])
            wanted = maker.generator(inputs[0], condition, return_all=True)
            for part, made in zip(parts, run_parts(sessions, mixed), strict=True):
                if made.shape != wanted[part.size].shape or not bool(made.isfinite().all()):
                    raise ArtifactError(
                        f"the graph of {part.size} px gives {tuple(made.shape)} where PyTorch gives "
                        f"{tuple(wanted[part.size].shape)}, or values that are not finite. Nothing was written; try the "
                        "versions in constraints.txt."
                    )
                error = (made.double() - wanted[part.size].double()).abs()
                largest = max(largest, float(error.max()))
                squares, count = squares + float(error.square().sum()), count + error.numel()
    mean = squares / count
    return largest, float("inf") if mean == 0 else float(10 * torch.tensor(4 / mean, dtype=torch.float64).log10())


def run_parts(sessions: Sequence[Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The images of every size, the base first, by onnxruntime sessions of the chain's graphs."""
    state = dict(zip(BASE_INPUTS, (value.numpy() for value in inputs), strict=False))
    images = []
    for session in sessions:
        wanted = {entry.name for entry in session.get_inputs()}
        made = session.run(None, {name: value for name, value in state.items() if name in wanted})
        for entry, value in zip(session.get_outputs(), made, strict=True):
            state[entry.name.removeprefix("next_")] = value
        images.append(torch.from_numpy(state["image"]))
    return images
