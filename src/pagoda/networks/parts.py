"""The interface of every anatomy: names of parts, and runs that are split between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Residuals:
    """What side networks add to the features of a run, in the places where diffusers adds it."""

    skips: tuple[Tensor, ...] = ()
    """ControlNet: one per skip, added to what the decoder takes, not to what the encoder goes on with."""
    middle: Tensor | None = None
    """ControlNet: added to the output of the middle."""
    blocks: tuple[Tensor, ...] = ()
    """T2I-Adapter: one per encoder block, added to the output of its last layer; a further one to the middle's. Transformers:
    spread over the blocks."""


class JointTokens(NamedTuple):
    """The two streams of a joint transformer between its blocks."""

    image: Tensor
    """(B, N, D)."""
    text: Tensor | None
    """(B, T, D); None after the last block."""


@dataclass(frozen=True)
class Context:
    """What every layer of one run is conditioned on."""

    time: Tensor
    """Time or noise input (B,)."""
    labels: Tensor | None
    """(B,) rows of the embedding table, or None."""
    embedding: Tensor
    """Time and class embedding (B, E)."""
    tokens: Any = None
    """(B, T, D), already projected; with an image prompt adapter, a pair of these and a list of image tokens."""
    tokens_bias: Tensor | None = None
    """(B, 1, T): added to the scores of cross-attention."""
    bias: Tensor | None = None
    """(B, 1, N): added to the scores of self-attention."""
    modulation: Tensor | None = None
    """(B, 6 D): shifts, scales and gates of all blocks of a PixArt."""
    attention: Mapping[str, Any] | None = None
    """What attention processors receive besides; diffusers' `cross_attention_kwargs`."""
    residuals: Residuals | None = None
    """What a ControlNet or an adapter adds."""
    frames: int = 1
    """Frames of a video; each has its own row in the batch of the layers, (B F, ...)."""
    grid: tuple[int, int] | None = None
    """Rows and columns of a transformer's tokens."""
    skipped: tuple[int, ...] = ()
    """Blocks of a transformer that are left out."""
    carried: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """What one part of this run leaves for later parts of it, by name; see `Extension`."""


@dataclass(frozen=True)
class EncoderState:
    """A run that has passed the encoder. `dataclasses.replace(state, context=...)` decodes it under another condition."""

    hidden: Any
    """The last features: (B, C, h, w) in a U-Net, tokens (B, N, D) in a DiT, `JointTokens` in a joint transformer."""
    skips: tuple[Tensor, ...]
    """U-Net: what the stem and each encoder layer hand to the decoder, in the order they were made."""
    context: Context

    @property
    def embedding(self) -> Tensor:
        """Time and class embedding (B, E)."""
        return self.context.embedding


class Anatomy(ABC):
    """Parts of a network by name, in the order in which they run.

    Modules are looked up when they are needed, so that an adapter may replace them in the meantime.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def stride(self) -> int:
        """Factor by which the deepest features are smaller than the input."""

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Width of `Context.embedding`."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the parts, in the order in which they run."""

    @abstractmethod
    def part(self, name: str) -> list[nn.Module]:
        """The modules of a part. Besides `names()`, "embedding" gives what embeds time, labels and tokens.

        Raises:
            ConfigError: an unknown name; the message has the nearest one.
        """

    @abstractmethod
    def channels(self, name: str) -> int:
        """Channels of a part's output. Raises ConfigError like `part`."""

    @abstractmethod
    def level(self, name: str) -> int:
        """Factor by which a part's output is smaller than the input, in pixels. Raises ConfigError like `part`."""

    @abstractmethod
    def context(self, arguments: Mapping[str, Any]) -> Context:
        """Everything that the layers are conditioned on, from the arguments of the model's own forward, by name.

        Nothing of the image goes in but its shape and type.
        """

    @abstractmethod
    def first(self, arguments: Mapping[str, Any], context: Context) -> Any:
        """The first features, from the arguments of the model's own forward, by name."""

    @abstractmethod
    def advance(self, state: EncoderState, *, stop: int | None = None) -> EncoderState:
        """Run the encoder layers that `state` has not passed yet; with `stop`, only the first `stop` of all."""

    def enter(self, arguments: Mapping[str, Any]) -> EncoderState:
        """What the model's own forward does before its first layer, from its own arguments by name.

        `head(decode(middle(advance(state)), state), state)` is then the forward's output, bit for bit, with every input that the
        model takes: ControlNet residuals, adapters, size embeddings, image prompts.
        """
        context = self.context(arguments)
        hidden = self.first(arguments, context)
        return EncoderState(hidden=hidden, skips=self.first_skips(hidden, context), context=context)

    def first_skips(self, hidden: Any, context: Context) -> tuple[Tensor, ...]:
        """What the stem hands to the decoder; a transformer has no skips."""
        return ()

    @abstractmethod
    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        """Embed time input (B,) and condition.

        Raises:
            ConfigError: the condition does not suit the model.
        """

    @abstractmethod
    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Any:
        """The first features of x (B, C, H, W).

        Raises:
            ShapeError: channels or sides that the model cannot take.
        """

    def encode(
        self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL, *, stop: int | None = None
    ) -> EncoderState:
        """Run stem and encoder; with `stop`, only the first `stop` encoder layers. A DiT has none: only the stem."""
        context = self.embed(t, condition)
        hidden = self.stem(x, condition)
        context = replace(context, grid=self.grid_of(x))
        return self.advance(EncoderState(hidden, self.first_skips(hidden, context), context), stop=stop)

    def grid_of(self, x: Tensor) -> tuple[int, int] | None:
        """Rows and columns of the tokens of x (B, C, H, W); None in a network that keeps maps."""
        return None

    @abstractmethod
    def middle(self, state: EncoderState) -> Tensor:
        """Run the middle on `state.hidden`; nothing happens where there is none."""

    @abstractmethod
    def decode(self, hidden: Tensor, state: EncoderState, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run decoder layers (DiT: blocks) `start` up to `stop` (excluded; None = all). `state` gives skips and context."""

    @abstractmethod
    def head(self, hidden: Tensor, state: EncoderState) -> Tensor:
        """The model's output (B, C_out, H, W) from its last features."""

    @abstractmethod
    def walk(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Iterator[tuple[str, Tensor]]:
        """Run part by part: yields each part's name and output as a map, and computes no further than it is asked."""

    @abstractmethod
    def as_map(self, hidden: Any) -> Tensor:
        """Features as a map (B, C, h, w), whatever they are inside the network."""

    def last_state(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> tuple[Tensor, EncoderState]:
        """Everything but the head: its input, and the state that it needs too."""
        state = self.encode(x, t, condition)
        return self.decode(self.middle(state), state), state

    def last_hidden(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """The head's input: (B, C, H, W) in a U-Net, tokens (B, N, D) in a DiT."""
        return self.last_state(x, t, condition)[0]

    def check(self, name: str) -> str:
        """`name` itself, if there is such a part.

        Raises:
            ConfigError: there is none; the message has the nearest name.
        """
        if name not in self.names():
            raise ConfigError(f"`{type(self.model).__name__}` has no part `{name}`. {did_you_mean(name, self.names())}")
        return name
