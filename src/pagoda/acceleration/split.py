"""Carries out layouts that split a network into an encoder, a middle and a decoder: DeepCache, Faster Diffusion, and both together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pagoda.acceleration.plan import Layout, PlannedStep
from pagoda.networks import Anatomy, EncoderState, JointTokens, TransformerAnatomy

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Kept:
    """What one stream keeps from step to step."""

    signature: Any = None
    skips: tuple[Tensor, ...] = ()
    middle: Any = None
    """Output of the middle; of a transformer, of the last block of its encoder."""
    feature: Tensor | None = None
    """What the decoder had before it took the skip of the branch."""
    output: Tensor | None = None
    estimate: Tensor | None = None
    """The clean image that the last output means, where that is known."""
    outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of steps to come: their time and their output."""
    forced: bool = False
    """Shapes have changed in this run; nothing is let go before the next full step."""

    def held(self) -> list[Any]:
        """Everything that is held."""
        steps_to_come = [output for _, output in self.outputs.values()]
        return [self.skips, self.middle, self.feature, self.output, self.estimate, steps_to_come]

    def clear(self) -> None:
        """Let everything go."""
        self.skips, self.middle, self.feature, self.output, self.estimate = (), None, None, None, None
        self.outputs.clear()


@dataclass(frozen=True)
class Reads:
    """What later steps read of what a step leaves behind."""

    skips: int = 0
    middle: bool = False
    feature: bool = False
    output: bool = False

    @property
    def anything(self) -> bool:
        return self.skips > 0 or self.middle or self.feature or self.output


def later_reads(layout: Layout, num_skips: int) -> list[Reads]:
    """For each step, what is read after it before it is computed anew."""
    need = Reads()
    result = []
    for step in reversed(layout.steps):
        result.append(need)
        if step.kind == "full":
            need = Reads()
        elif step.kind == "skipped":
            need = replace(need, output=True)
        elif step.kind == "reused":
            fresh = step.skips or 0
            if step.branch is None:  # passes the branch on its way, and brings the feature there up to date
                need = Reads(skips=num_skips, middle=True, output=need.output)
            else:
                read = max(need.skips, step.branch + 1 if fresh == 0 else 0)
                need = replace(need, skips=0 if read <= fresh else read, feature=True)
    return result[::-1]


class SplitNetwork:
    """The two halves of a network as pure functions of tensors, compiled if wanted."""

    def __init__(self, parts: Anatomy, *, encoder_blocks: int | None = None, compile: Compile | None = None) -> None:
        self._parts = parts
        self._cut = encoder_blocks
        wrap: Compile = (lambda function: function) if compile is None else compile
        self.encode, self.decode, self.context = wrap(self._encode), wrap(self._decode), wrap(parts.context)

    @property
    def num_skips(self) -> int:
        """Number of skips; 0 in a transformer."""
        return sum(name.startswith("decoder.") for name in self._parts.names())

    def _encode(self, arguments: Mapping[str, Any], skips: int | None) -> tuple[EncoderState, Any]:
        """The first `skips` skips; with None all of them, and the middle."""
        state = self._parts.enter(arguments)
        if isinstance(self._parts, TransformerAnatomy):
            return state, self._parts.decode(state.hidden, state, stop=self._cut)
        state = self._parts.advance(state, stop=None if skips is None else skips - 1)
        return state, self._parts.middle(state) if skips is None else None

    def _decode(self, hidden: Any, state: EncoderState, enter: int | None, tap: int | None) -> tuple[Tensor, Any]:
        """Output, and the features at branch `tap`. Starts from the middle, or with `enter` from the features at that branch."""
        if isinstance(self._parts, TransformerAnatomy):
            return self._parts.head(self._parts.decode(hidden, state, start=self._cut or 0), state), None
        count = self.num_skips
        start = 0 if enter is None else count - 1 - enter
        feature = None
        if tap is not None and enter is None:
            hidden = self._parts.decode(hidden, state, stop=count - 1 - tap)
            feature, start = hidden, count - 1 - tap
        return self._parts.head(self._parts.decode(hidden, state, start=start), state), feature


def run_split(
    network: SplitNetwork,
    step: PlannedStep,
    reads: Reads,
    branch: int | None,
    arguments: Mapping[str, Any],
    kept: Kept,
    time_of: Callable[[int], Tensor] | None,
    counted: Callable[[], int],
) -> tuple[Tensor, float]:
    """One call of the network under the plan.

    Args:
        step: What the plan says.
        reads: What later steps read of this one.
        branch: Where features are kept, if anywhere.
        arguments: The model's own.
        kept: Read and brought up to date.
        time_of: Time input of steps to come; needed where decoders of several steps run at once.
        counted: Multiply-adds so far.

    Returns:
        The output, and the share of this call that one without decoders of later steps would have cost.
    """
    start = counted()
    if step.skips == 0:
        state = EncoderState(hidden=None, skips=kept.skips, context=network.context(arguments))
        middle = kept.middle
    else:
        state, middle = network.encode(arguments, step.skips)
    encoded = counted() - start
    hidden = middle if step.branch is None else kept.feature
    tap = branch if reads.feature or kept.forced else None
    group = step.decodes or (step.index,)
    if len(group) == 1:
        output, feature = network.decode(hidden, state, step.branch, tap)
        outputs = [output]
    else:
        assert time_of is not None
        times = [time_of(index) for index in group]
        wide = repeated(arguments, len(group), arguments_batch(arguments), times)
        tiled = EncoderState(None, tuple(tile(skip, len(group)) for skip in state.skips), network.context(wide))
        output, feature = network.decode(tile(hidden, len(group)), tiled, step.branch, None)
        outputs = list(output.chunk(len(group)))
        kept.outputs = {
            index: (time, part) for index, time, part in zip(group[1:], times[1:], outputs[1:], strict=True)
        }
    if feature is not None:
        kept.feature = feature
    if step.skips != 0:
        kept.skips = (*state.skips, *kept.skips[len(state.skips) :])
        kept.middle = middle if step.skips is None else kept.middle
    if not kept.forced:
        prune(kept, reads)
    if reads.output:
        kept.output = outputs[0]
    whole = counted() - start
    return outputs[0], (encoded + (whole - encoded) / len(group)) / whole if whole else 1.0


def prune(kept: Kept, reads: Reads) -> None:
    """Let go what no later step reads."""
    kept.skips = kept.skips[: reads.skips]
    kept.middle = kept.middle if reads.middle else None
    kept.feature = kept.feature if reads.feature else None
    kept.output = kept.output if reads.output else None


def arguments_batch(arguments: Mapping[str, Any]) -> int:
    """Batch size of a model's arguments."""
    return len(arguments["sample"] if "sample" in arguments else arguments["hidden_states"])


def tile(value: Any, count: int) -> Any:
    """A batch, `count` times after itself: sample-minor, so that `chunk(count)` gives each step's batch."""
    if isinstance(value, JointTokens):
        return JointTokens(tile(value.image, count), None if value.text is None else tile(value.text, count))
    return value.repeat(count, *[1] * (value.ndim - 1))


def repeated(arguments: Mapping[str, Any], count: int, batch: int, times: list[Tensor]) -> dict[str, Any]:
    """A model's arguments for several steps in one batch."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            # Text for video comes once per frame; everything else once per sample.
            return tile(value, count) if value.ndim > 0 and len(value) % batch == 0 and len(value) > 0 else value
        if isinstance(value, dict):
            return {name: widen(item) for name, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(widen(item) for item in value)
        return value

    wide = {name: value if name in UNTILED else widen(value) for name, value in arguments.items()}
    device = arguments["sample" if "sample" in arguments else "hidden_states"].device
    given = arguments["timestep"]
    dtype = given.dtype if torch.is_tensor(given) else None
    wide["timestep"] = torch.stack([torch.as_tensor(t, device=device, dtype=dtype).flatten()[0] for t in times])
    wide["timestep"] = wide["timestep"].repeat_interleave(batch)
    return wide


UNTILED = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""Arguments that belong to the encoder's run, and have been added already."""
