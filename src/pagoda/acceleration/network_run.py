"""One network under a plan: stands in for its `forward` while `accelerate` is active."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from pagoda.acceleration.accounting import Call, Ledger, num_bytes
from pagoda.acceleration.clock import Clock
from pagoda.acceleration.faster_diffusion import FasterDiffusion
from pagoda.acceleration.plan import Layout, Plan, PlannedStep, lay_out
from pagoda.acceleration.ras import RAS
from pagoda.acceleration.reading import Preconditioning, Reading
from pagoda.acceleration.sparse import SparseNetwork, TokenChoice
from pagoda.acceleration.split import Compile, Kept, Reads, SplitNetwork, later_reads, run_split
from pagoda.errors import ConfigError
from pagoda.networks import Anatomy, MultiplyAdds, TransformerAnatomy, anatomy

ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs")


class NetworkRun:
    """Carries a plan out on one network. Follows the clock; keeps features per stream.

    Streams are the calls within one call of the solver: one where guidance shares a batch, two where it does not. Features of
    the two calls of a Heun step are kept apart too.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Plan],
        clock: Clock,
        *,
        locate: Callable[[Any], None] | None,
        preconditioning: Preconditioning | None,
        compile: Compile | None,
        differentiable: bool,
        watch: bool,
    ) -> None:
        self.model = model
        self.parts: Anatomy = anatomy(model)
        for plan in plans:
            plan.check(self.parts)
        self._plans, self._clock, self._locate = tuple(plans), clock, locate
        self._preconditioning = preconditioning
        self._compiled, self._differentiable, self._watch = compile is not None, differentiable, watch
        self._signature = inspect.signature(type(model).forward)
        self._original = model.forward
        self._ras = next((plan for plan in plans if isinstance(plan, RAS)), None)
        propagation = next((plan for plan in plans if isinstance(plan, FasterDiffusion)), None)
        blocks = None
        if propagation is not None and isinstance(self.parts, TransformerAnatomy):
            blocks = propagation.encoder_blocks(len(self.parts.blocks))
        self._split = SplitNetwork(self.parts, encoder_blocks=blocks, compile=compile)
        self._sparse = SparseNetwork(self.parts, compile) if isinstance(self.parts, TransformerAnatomy) else None
        self.layout: Layout | None = None
        self._reads: list[Reads] = []
        self._kept: dict[tuple[int, int], Kept] = {}
        self._choice: TokenChoice | None = None
        self._tick, self._ordinal = -1, 0
        self._costs: dict[Any, tuple[int, float]] = {}
        self.ledger = Ledger()
        self.changes: list[float] = []
        self._watched: tuple[Tensor, ...] = ()

    # The clock's follower.

    def begin(self, clock: Clock) -> None:
        """Lay the plan out for a run."""
        layout = lay_out(self._plans, clock.num_steps)
        several = any(len(step.decodes) > 1 for step in layout.steps)
        if several and clock.calls_per_step > 1:
            raise ConfigError(
                f"FasterDiffusion(parallel=True) needs one call a step, {clock.solver} makes {clock.calls_per_step}; "
                "use parallel=False."
            )
        if self._ras is not None and not layout.neutral and (clock.calls_per_step > 1 or not clock.first_order):
            raise ConfigError(
                f"RAS needs a first-order solver, {clock.solver} mixes outputs of several steps, which are of different age here; "
                "use Euler or DDIM."
            )
        self.layout = layout
        self._reads = later_reads(layout, self._split.num_skips)
        self._kept.clear()
        self._tick, self._ordinal = -1, 0
        self._choice = None if self._ras is None else TokenChoice(self._ras, clock.num_steps, self.parts)
        self.changes, self._watched = [], ()
        self.ledger = Ledger(layout.plan, type(self.model).__name__, clock.num_steps)

    def observe(self, clock: Clock, prediction: Tensor) -> None:
        """Choose the tokens of the next step."""
        if self._choice is not None:
            self._choice.observe(clock.index, prediction)

    def change(self, clock: Clock, state: Tensor) -> Tensor:
        """Add initial noise where the plan says so."""
        assert self.layout is not None
        scale = self.layout[clock.index].inject
        if not scale:
            return state
        assert clock.start_state is not None
        assert clock.scale_of is not None
        return state + scale * clock.scale_of(clock.index) / clock.scale_of(0) * clock.start_state

    def end(self) -> None:
        """Let all features go."""
        self._kept.clear()
        self._choice, self._watched = None, ()

    # In place of the network's forward.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward under the plan."""
        arguments = self._bind(args, kwargs)
        self.locate(arguments["timestep"])
        clock = self._clock
        if not clock.running or self.layout is None:
            raise ConfigError(
                f"`{type(self.model).__name__}` was called and nobody has said in which step of a run: sample with "
                "`pagoda.diffusion.sample` or `solve`, or announce the steps with `for t in run.steps(timesteps)`."
            )
        if torch.is_grad_enabled() and not self._differentiable and self._needs_gradients(arguments):
            raise ConfigError(
                "an accelerated network was called for gradients; sample under `torch.no_grad()`, or use "
                "`accelerate(..., differentiable=True)`."
            )
        if clock.tick != self._tick:
            self._tick, self._ordinal = clock.tick, 0
        stream, self._ordinal = (clock.stage, self._ordinal), self._ordinal + 1
        kept = self._kept.setdefault(stream, Kept())
        with self._lora_scale(arguments), self._offloaded(arguments) as arguments:
            output = self._run(self.layout[clock.index], arguments, kept)
        self.ledger.bytes_held = max(
            self.ledger.bytes_held, num_bytes([k.held() for k in self._kept.values()]) + num_bytes(self._sparse_held())
        )
        return self._wrap(output, arguments)

    def locate(self, timestep: Any) -> None:
        """Find the place in the run of a call at a timestep, where a pipeline's scheduler says it."""
        if self._locate is not None:
            self._locate(timestep)

    def _sparse_held(self) -> list[Any]:
        return [] if self._choice is None else self._choice.held()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(self.model, *args, **kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def _needs_gradients(self, arguments: Mapping[str, Any]) -> bool:
        inputs = any(isinstance(v, Tensor) and v.requires_grad for v in arguments.values())
        return inputs or any(parameter.requires_grad for parameter in self.model.parameters())

    @contextlib.contextmanager
    def _lora_scale(self, arguments: dict[str, Any]) -> Iterator[None]:
        """The weight of LoRA layers, which diffusers hands over among the attention arguments."""
        scale = 1.0
        for name in ATTENTION_ARGUMENTS:
            if arguments.get(name) is not None:
                arguments[name] = dict(arguments[name])
                scale = arguments[name].pop("scale", 1.0)
                arguments[name] = arguments[name] or None
        if not USE_PEFT_BACKEND or scale == 1.0:
            yield
            return
        scale_lora_layers(self.model, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.model, scale)

    @contextlib.contextmanager
    def _offloaded(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Where diffusers moves the network in and out (`enable_model_cpu_offload`), do so."""
        hook = getattr(self.model, "_hf_hook", None)
        if hook is None:
            yield arguments
            return
        _, moved = hook.pre_forward(self.model, **arguments)
        yield moved
        hook.post_forward(self.model, None)

    def _wrap(self, output: Tensor, arguments: Mapping[str, Any]) -> Any:
        if not arguments.get("return_dict", True):
            return (output,)
        return output_class(type(self.model))(sample=output)

    # One call.

    def _run(self, step: PlannedStep, arguments: dict[str, Any], kept: Kept) -> Tensor:
        reads = self._reads[step.index]
        signature = shapes(arguments)
        forced = False
        if step.kind != "full" and kept.signature != signature:
            step, forced = PlannedStep(step.index), True
            kept.clear()
            kept.forced = True
        elif step.kind == "full":
            kept.forced = False
        kept.signature = signature
        if step.kind == "batched" and step.index not in kept.outputs:  # its key step had other shapes
            step = PlannedStep(step.index, "reused", skips=0)
        if step.kind == "reused" and kept.forced and not self._available(step, kept):
            step, forced = PlannedStep(step.index), True
        device = image_input(arguments).device
        reads_output = step.kind == "skipped" or reads.output or self._choice is not None
        reading = self._reading(step.index) if reads_output else None
        call = Call(step.index, step.kind, None, forced=forced, tokens=step.tokens)
        key = (step.kind, step.skips, step.branch, len(step.decodes), step.tokens, reads.anything, forced, signature)
        with self._counting(key) as counter, self.ledger.timed(call, device):
            if step.kind == "batched":
                output, share = self._batched(step, arguments, kept), 0.0
            elif step.kind == "skipped":
                output, share = self._kept_output(reading, arguments, kept), 0.0
            elif self._choice is not None and self._sparse is not None:
                output, share = self._choice.run(self._sparse, step, arguments, kept, self._plain, reading), 1.0
            else:
                output, share = self._split_or_plain(step, reads, arguments, kept, counter)
                kept.estimate = None if reading is None else reading.estimate(image_input(arguments), output)
        if counter is not None:
            self._costs[key] = (counter.total, share)
        if not self._compiled:
            call.multiply_adds, call.plain_share = self._costs[key]
        if self._watch:
            self._record_change(kept)
        return output

    def _time_of(self) -> Callable[[int], Tensor] | None:
        """Time inputs of steps to come, where they are known."""
        sigma_of, known = self._clock.sigma_of, self._preconditioning
        if sigma_of is None or known is None:
            return self._clock.time_of
        return lambda index: known.time(sigma_of(index))

    def _reading(self, index: int) -> Reading | None:
        """How the output of a step is read, where that is known."""
        clock, known = self._clock, self._preconditioning
        if clock.sigma_of is None or known is None:
            return None
        assert clock.start_state is not None
        return known.reading(clock.sigma_of(index), clock.start_state.shape[1])

    @staticmethod
    def _kept_output(reading: Reading | None, arguments: Mapping[str, Any], kept: Kept) -> Tensor:
        """The output of the last step that computed one, or what means the same here."""
        assert kept.output is not None
        if reading is None or kept.estimate is None:
            return kept.output
        return reading.output(kept.estimate, image_input(arguments), kept.output)

    @staticmethod
    def _available(step: PlannedStep, kept: Kept) -> bool:
        return kept.feature is not None if step.branch is not None else kept.middle is not None

    def _split_or_plain(
        self, step: PlannedStep, reads: Reads, arguments: dict[str, Any], kept: Kept, counter: MultiplyAdds | None
    ) -> tuple[Tensor, float]:
        assert self.layout is not None
        branches = self.layout.branches()
        wanted = reads.anything or len(step.decodes) > 1 or self._watch or kept.forced
        if step.kind == "full" and not wanted:
            kept.clear()
            return self._plain(arguments), 1.0
        if reads.output and not (reads.skips or reads.middle or reads.feature):
            kept.output = self._plain(arguments)
            return kept.output, 1.0
        time_of = self._time_of()
        if len(step.decodes) > 1 and time_of is None:
            raise ConfigError(
                "decoders of several steps in one batch need the times of steps to come, which are not known here; "
                "use FasterDiffusion(parallel=False), or announce the run by its timesteps: `run.steps(timesteps)`."
            )
        if self._watch:
            reads = Reads(skips=self._split.num_skips, middle=True, feature=reads.feature, output=reads.output)
        return run_split(
            self._split,
            step,
            reads,
            branches[0] if branches else None,
            {name: value for name, value in arguments.items() if name != "return_dict"},
            kept,
            time_of,
            (lambda: 0) if counter is None else (lambda: counter.total),
        )

    def _plain(self, arguments: dict[str, Any]) -> Tensor:
        """The network's own forward."""
        output: Tensor = self._original(**{**arguments, "return_dict": False})[0]
        return output

    def _batched(self, step: PlannedStep, arguments: Mapping[str, Any], kept: Kept) -> Tensor:
        expected, output = kept.outputs.pop(step.index)
        given = torch.as_tensor(arguments["timestep"])
        if given.device.type == "cpu" and bool(
            (given.to(expected.dtype) != expected.flatten()[0].to(given.device)).any()
        ):
            raise ConfigError(
                f"step {step.index} was computed beforehand for time {float(expected.flatten()[0]):g}, the network is called at "
                f"{float(given.flatten()[0]):g}; use FasterDiffusion(parallel=False) with this sampler."
            )
        return output

    @contextlib.contextmanager
    def _counting(self, key: Any) -> Iterator[MultiplyAdds | None]:
        """Count the first call of each sort; later ones cost the same."""
        if self._compiled or key in self._costs:
            yield None
            return
        with MultiplyAdds() as counter:
            yield counter

    def _record_change(self, kept: Kept) -> None:
        now = kept.skips or ((kept.middle,) if isinstance(kept.middle, Tensor) else tuple(kept.middle or ())[:1])
        if self._ordinal > 1 or not now:
            return
        if self._watched:
            pairs = zip(now, self._watched, strict=True)
            self.changes.append(sum(float((a - b).square().mean()) for a, b in pairs) / len(now))
        self._watched = now


def image_input(arguments: Mapping[str, Any]) -> Tensor:
    """What a network is given for a state, and whatever is concatenated to it."""
    given: Tensor = arguments["sample" if "sample" in arguments else "hidden_states"]
    return given


def shapes(value: Any) -> Any:
    """Shapes and types of all tensors in a model's arguments but its time, and all numbers and names."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, shapes(item)) for name, item in value.items() if name not in ("timestep", "return_dict"))
    if isinstance(value, tuple | list):
        return tuple(shapes(item) for item in value)
    return value if isinstance(value, int | float | str | bool | type(None)) else type(value)


def output_class(kind: type[nn.Module]) -> Any:
    """What a diffusers model wraps its output in when it is not asked for a tuple."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
    from diffusers.models.unets.unet_motion_model import UNetMotionOutput

    named = {
        "UNet2DModel": UNet2DOutput,
        "UNet2DConditionModel": UNet2DConditionOutput,
        "UNet3DConditionModel": UNet3DConditionOutput,
        "UNetMotionModel": UNetMotionOutput,
    }
    return next((named[base.__name__] for base in kind.__mro__ if base.__name__ in named), Transformer2DModelOutput)
