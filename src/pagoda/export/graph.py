"""The generator as a graph: noise and labels in, images of one size out, any batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pagoda.diffusion import Condition
from pagoda.errors import ArtifactError, ConfigError, PagodaError
from pagoda.networks import ImageCodec, OneStepGenerator, PixelCodec
from pagoda.training import noise_of_seeds

CHECKED_BATCHES = (1, 3)
"""Batch sizes at which a graph is compared with PyTorch when it is made."""

INPUT_NAMES = ("z", "labels", "guidance")
"""Inputs of a graph, as far as the generator takes them."""

Graph = Callable[[tuple[Tensor, ...]], Tensor]
"""What is compared: (z,), (z, labels) or (z, labels, guidance) -> images."""


class ImageMaker(nn.Module):
    """A generator with its size chosen: z (B, C, b, b) of unit variance, labels (B,) int64 (-1 = none) -> (B, C, r, r).

    A generator that was trained with guidance takes weights (B,) float32 in [1, guidance_max] as a third input. A graph cannot look
    at values: it computes something for weights outside of that range, and nobody knows what it means.

    Args:
        generator: Copied, to the CPU and float32; levels above `size` are left out.
        size: Side of the images, in pixels (of latents, where it makes these); the largest when None.

    Raises:
        ShapeError: the generator has no level of that size.
    """

    def __init__(self, generator: OneStepGenerator, size: int | None = None) -> None:
        super().__init__()
        if generator.token_dim:
            raise ConfigError(
                "generators that read texts cannot be exported as graphs yet; use `pagoda sample --prompt`."
            )
        levels = generator._index(generator.size if size is None else size)
        self.generator = copy.deepcopy(generator)
        nn.Module.to(self.generator, device="cpu", dtype=torch.float32)
        del self.generator.octaves[levels:]
        self.generator.requires_grad_(False)
        _free_batch(self.generator)
        codec = self.generator.codec
        self.codec: ImageCodec | None = None if isinstance(codec, PixelCodec) else codec
        if self.codec is not None:
            _free_batch(self.codec)
        self.eval()

    @property
    def image_size(self) -> int:
        """Side of the images that it makes, in pixels."""
        return self.generator.picture_shape()[-1]

    def forward(self, z: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """Images (B, C, r, r), nominally in [-1, 1] and not clamped; decoded where the generator makes latents."""
        made: Tensor = self.generator(z, Condition(label=labels, guidance=guidance))
        return made if self.codec is None else self.codec.decode(made)

    def inputs(self, batch: int, first_seed: int = 0) -> tuple[Tensor, ...]:
        """Noise of successive seeds, with labels in turn, the null label among them, where there are classes."""
        g = self.generator
        seeds = list(range(first_seed, first_seed + batch))
        z = noise_of_seeds(seeds, (g.channels, g.base_size, g.base_size))
        if g.num_classes == 0:
            return (z,)
        labels = torch.tensor([(seed - 1) % (g.num_classes + 1) - 1 for seed in seeds], dtype=torch.int64)
        if g.guidance_max is None:
            return z, labels
        return z, labels, 1 + (g.guidance_max - 1) * (torch.arange(batch) % 3) / 2


class _Enlarge(nn.Module):
    """What diffusers' `Upsample2D` does, without its question whether the batch is 64 or larger.

    A graph would take the answer for a bound on the batch.
    """

    def __init__(self, upsampler: Upsample2D) -> None:
        super().__init__()
        conv = upsampler.conv if upsampler.name == "conv" else upsampler.Conv2d_0
        self.conv: nn.Module = nn.Identity() if conv is None or not upsampler.use_conv else conv

    def forward(self, hidden: Tensor, output_size: Any = None) -> Tensor:
        size = [2 * side for side in hidden.shape[-2:]] if output_size is None else output_size
        return cast(Tensor, self.conv(F.interpolate(hidden, size=size, mode="nearest")))


def _free_batch(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            # Those that enlarge in another way keep the question, and a graph of them a batch below 64.
            if isinstance(child, Upsample2D) and child.interpolate and child.norm is None:
                setattr(parent, name, _Enlarge(child))
        if isinstance(parent, ResnetBlock2D) and isinstance(parent.upsample, _Enlarge):
            # A residual block asks it too before it enlarges, and does not where it reduces, in the same place.
            parent.upsample, parent.downsample = None, parent.upsample


def trace(maker: ImageMaker) -> ExportedProgram:
    """The graph of a generator, with a batch of any size.

    A label out of range asks for a row that the table of classes lacks, so the graph fails on it.

    Raises:
        ArtifactError: PyTorch cannot make a graph of this kind of network.
    """
    batch = Dim("batch")
    inputs = maker.inputs(2)
    names = INPUT_NAMES[: len(inputs)]
    with quiet_pytrees(), torch.no_grad(), naming_network(maker.generator, "torch.export"):
        return torch.export.export(maker, inputs, dynamic_shapes={name: {0: batch} for name in names})


@contextmanager
def naming_network(generator: OneStepGenerator, exporter: str) -> Iterator[None]:
    """Say of which network an exporter of PyTorch, which fails by errors of many kinds, could make nothing.

    Raises:
        ArtifactError: it failed; the exporter's own error is its cause.
    """
    try:
        yield
    except (PagodaError, MemoryError):
        raise
    except Exception as error:
        kind, words = type(generator.base).__name__, (str(error).strip() or repr(error)).splitlines()[0]
        raise ArtifactError(
            f"{exporter} makes no graph of a generator built from `{kind}`: {words} Nothing was written; try the versions in "
            "constraints.txt, or export a folder (`--to diffusers`), which needs no graph."
        ) from error


@torch.no_grad()
def largest_difference(
    maker: ImageMaker, graph: Graph, batches: Sequence[int] = CHECKED_BATCHES
) -> tuple[float, float]:
    """Largest absolute difference of a graph from PyTorch over some batches, and its PSNR in dB (peak to peak 2).

    Raises:
        ArtifactError: images of another shape, or values that are not finite.
    """
    largest, squares, count = 0.0, 0.0, 0
    for number, batch in enumerate(batches):
        inputs = maker.inputs(batch, first_seed=1000 * number)
        wanted, made = maker(*inputs), graph(inputs)
        if made.shape != wanted.shape or not bool(made.isfinite().all()):
            raise ArtifactError(
                f"the exported graph gives {tuple(made.shape)} where PyTorch gives {tuple(wanted.shape)}, or values "
                "that are not finite. Nothing was written; try the versions in constraints.txt."
            )
        error = (made.double() - wanted.double()).abs()
        largest = max(largest, float(error.max()))
        squares, count = squares + float(error.square().sum()), count + error.numel()
    mean = squares / count
    return largest, float("inf") if mean == 0 else float(10 * torch.tensor(4 / mean, dtype=torch.float64).log10())


@contextmanager
def quiet_pytrees() -> Iterator[None]:
    """PyTorch's exporters use a deprecated part of PyTorch; nobody here can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec", category=FutureWarning)
        yield
