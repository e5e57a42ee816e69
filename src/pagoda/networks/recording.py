"""One training step's view into a network: outputs of parts on the way, and a shift of the class embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.anatomy import anatomy
from pagoda.networks.calling import DiffusersNetwork, count_classes, keep_mean


class RecordingNetwork:
    """A network that keeps what some of its parts gave in its last call; the output is the network's own, bit for bit.

    Made for one call and thrown away, so that nothing is left behind in the network.

    Args:
        network: What is called.
        names: Parts (see `anatomy`).

    Raises:
        ConfigError: an unknown part.
    """

    def __init__(self, network: DiffusersNetwork, names: Sequence[str]) -> None:
        self.network = network
        self._parts = anatomy(network)
        self._names = {self._parts.check(name) for name in names}
        self.found: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Run the network; afterwards `found` holds maps (B, C, h, w) by name."""
        output = x
        for name, value in self._parts.walk(x, t, condition):
            if name in self._names:
                self.found[name] = value
            output = value
        return keep_mean(output, x.shape[1])


def class_embedders(model: nn.Module) -> list[nn.Module]:
    """The modules that turn rows of the label table into class embeddings (B, D): one, or one a block in a DiT.

    Raises:
        ConfigError: the model has no classes.
    """
    if isinstance(model, DiffusersNetwork):
        model = model.model
    net: Any = model
    found: list[nn.Module] = []
    if isinstance(model, DiTTransformer2DModel):
        found = [block.norm1.emb.class_embedder for block in net.transformer_blocks]
    elif isinstance(getattr(net, "class_embedding", None), nn.Embedding):
        found = [net.class_embedding]
    if not found or count_classes(model) == 0:
        raise ConfigError(
            f"this `{type(model).__name__}` is not conditioned on classes, so it has no class embedding to change. "
            "Train with labels, or leave the technique out."
        )
    return found


def class_tables(model: nn.Module) -> list[Tensor]:
    """The label tables (num_classes + 1, D) of `class_embedders`, the null row last."""
    embedders: list[Any] = class_embedders(model)
    return [getattr(embedder, "embedding_table", embedder).weight for embedder in embedders]


@contextlib.contextmanager
def shift_class_embedding(model: nn.Module, shift: Tensor | None) -> Iterator[None]:
    """Inside, `shift` (B, D) is added to the class embedding of every sample, before it meets the time embedding.

    Raises:
        ConfigError: a model without classes, or one that recomputes its activations in the backward pass (gradient
            checkpointing), when the shift is gone.
        ShapeError: a shift of another width.
    """
    if shift is None:
        yield
        return
    net: Any = model.model if isinstance(model, DiffusersNetwork) else model
    embedders = class_embedders(net)
    if getattr(net, "is_gradient_checkpointing", False):
        raise ConfigError("the class embedding cannot be shifted under gradient checkpointing; switch that off.")
    width = class_tables(net)[0].shape[1]
    if shift.ndim != 2 or shift.shape[1] != width:
        raise ShapeError(f"the class embedding is {width} wide, the shift has the shape {tuple(shift.shape)}.")
    handles = [module.register_forward_hook(lambda _, __, output: output + shift) for module in embedders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
