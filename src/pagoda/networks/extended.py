"""Networks that are more than their diffusers class: routed by noise level, with experts, or conditioned on themselves.

An extended network is a subclass of its diffusers class, so that everything that takes the one takes the other. What was added is
in its config under `extensions`, and its weights are saved as a variant, `diffusion_pytorch_model.extended.safetensors`. The
plain class finds no weights in such a folder: a network cannot be loaded without its routing by accident, although the names of
its weights may be the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models import DiTTransformer2DModel, UNet2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from pagoda.errors import ConfigError, ShapeError, did_you_mean
from pagoda.networks.calling import DiffusersNetwork, config_of, disable_label_dropout
from pagoda.networks.dit_anatomy import DiTAnatomy
from pagoda.networks.experts import ExpertLayers
from pagoda.networks.extension import Extension
from pagoda.networks.parts import Anatomy, Context, EncoderState
from pagoda.networks.self_conditioning import SelfConditioning
from pagoda.networks.switch_masks import LinearMasks, SwitchMasks
from pagoda.networks.task_masks import TaskMasks
from pagoda.networks.tokens import Attend
from pagoda.networks.unet_anatomy import UNetAnatomy

VARIANT = "extended"
"""Variant under which weights are saved."""
EXTENSIONS: dict[str, type[Extension]] = {
    "task_masks": TaskMasks,
    "switch_masks": SwitchMasks,
    "linear_masks": LinearMasks,
    "experts": ExpertLayers,
    "self_conditioning": SelfConditioning,
}
"""What a network can be extended by, by the name in its config."""


class ExtendedModel:
    """What extended networks share. Their forward runs through their anatomy, part by part."""

    added: nn.ModuleDict

    def _extend(self, extensions: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Build the extensions on a finished base."""
        if not extensions:
            raise ConfigError(f"`{type(self).__name__}` without extensions is the plain class; use that.")
        self.added = nn.ModuleDict()
        for name, options in extensions.items():
            if name not in EXTENSIONS:
                raise ConfigError(f"unknown extension `{name}` of a network. {did_you_mean(name, EXTENSIONS)}")
            extension = EXTENSIONS[name](**options)
            extension.attach(self)
            self.added[name] = extension
        disable_label_dropout(self)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As diffusers', with the weights under a name that the plain class does not look for."""
        super().save_pretrained(save_directory, **{"variant": VARIANT, **options})  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        """As diffusers', from safetensors only."""
        options = {"variant": VARIANT, "use_safetensors": True, **options}
        return super().from_pretrained(path, **options)  # type: ignore[misc]

    def input_mask(self, part: str, hidden: Tensor, context: Context) -> Tensor | None:
        """What the input of a part's residual branches is multiplied by, or None."""
        masks = [extension.input_mask(self, part, hidden, context) for extension in self._each()]
        found = [mask for mask in masks if mask is not None]
        if len(found) > 1:
            raise ConfigError(f"{len(found)} extensions mask the input of `{part}`; one network can have one.")
        return found[0] if found else None

    def shift(self, part: str, context: Context) -> Tensor | None:
        """What is added to the embedding that a part is conditioned on (B, E), or None."""
        shifts = [extension.shift(self, part, context) for extension in self._each()]
        found = [shift for shift in shifts if shift is not None]
        return cast(Tensor, sum(found[1:], found[0])) if found else None

    def after(self, part: str, hidden: Tensor, context: Context) -> None:
        """Tell every extension what a part gave."""
        for extension in self._each():
            extension.after(self, part, hidden, context)

    def _each(self) -> list[Extension]:
        return cast(list[Extension], list(self.added.values()))


def _with_extensions(parent: type[nn.Module]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give an `__init__(self, extensions, **base)` the parent's own arguments by name: diffusers reads configs by signature."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(parent.__init__)
        extra = inspect.Parameter("extensions", inspect.Parameter.KEYWORD_ONLY, default=None)
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
        return init

    return decorate


class ExtendedDiT(ExtendedModel, DiTTransformer2DModel):  # type: ignore[misc]  # diffusers' own mixins disagree
    """A `DiTTransformer2DModel` with extensions.

    Args:
        extensions: Options of each extension by its name in `EXTENSIONS`.
        base: Arguments of `DiTTransformer2DModel`.
    """

    @register_to_config
    @_with_extensions(DiTTransformer2DModel)
    def __init__(self, *, extensions: Mapping[str, Mapping[str, Any]] | None = None, **base: Any) -> None:
        super().__init__(**base)
        self._extend(extensions)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers'."""
        arguments = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "class_labels": class_labels,
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        output = run(ExtendedDiTAnatomy(self), arguments)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class ExtendedUNet(ExtendedModel, UNet2DModel):  # type: ignore[misc]
    """A `UNet2DModel` with extensions.

    Args:
        extensions: Options of each extension by its name in `EXTENSIONS`.
        base: Arguments of `UNet2DModel`.
    """

    @register_to_config
    @_with_extensions(UNet2DModel)
    def __init__(self, *, extensions: Mapping[str, Mapping[str, Any]] | None = None, **base: Any) -> None:
        super().__init__(**base)
        self._extend(extensions)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """As diffusers'."""
        arguments = {"sample": sample, "timestep": timestep, "class_labels": class_labels}
        output = run(ExtendedUNetAnatomy(self), arguments)
        return UNet2DOutput(sample=output) if return_dict else (output,)


EXTENDED_MODELS: tuple[Any, ...] = (ExtendedDiT, ExtendedUNet)
"""All extended classes."""


def run(parts: Anatomy, arguments: Mapping[str, Any]) -> Tensor:
    """A whole forward pass, part by part."""
    state = parts.advance(parts.enter(arguments))
    return parts.head(parts.decode(parts.middle(state), state), state)


class ExtendedDiTAnatomy(DiTAnatomy):
    """Parts of an `ExtendedDiT`."""

    def _run_block(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        name = f"block.{index}"
        mask, shift, inputs = self._net.input_mask(name, hidden, context), self._net.shift(name, context), hidden
        if mask is not None:
            hidden = mask * hidden
        if shift is None:
            hidden = super()._run_block(index, hidden, context)
        else:
            hidden = run_shifted(self._net.transformer_blocks[index], hidden, context, shift)
        if mask is not None:
            hidden = torch.addcmul(hidden, 1 - mask, inputs)  # what the branches did not see goes past them
        self._net.after(name, hidden, context)
        return hidden

    def _run_block_over(self, index: int, hidden: Tensor, context: Context, attending: Attend) -> Tensor:
        names = ", ".join(self._net.added)
        raise ConfigError(f"a network extended by {names} has no run over a part of its tokens.")

    def head_tokens(self, hidden: Tensor, state: EncoderState) -> Tensor:
        shift = self._net.shift("head", state.context)
        if shift is not None:
            state = replace(state, context=replace(state.context, embedding=state.embedding + shift))
        return super().head_tokens(hidden, state)


def run_shifted(block: Any, hidden: Tensor, context: Context, shift: Tensor) -> Tensor:
    """diffusers' adaLN-Zero block, conditioned on its own embedding of time and label plus `shift` (B, D); the same order of sums."""
    norm = block.norm1
    embedding = norm.emb(context.time, context.labels, hidden_dtype=hidden.dtype) + shift
    modulation = norm.linear(norm.silu(embedding))[:, None].chunk(6, dim=2)  # six of (B, 1, D)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
    normed = norm.norm(hidden) * (1 + scale_msa) + shift_msa
    hidden = gate_msa * block.attn1(normed, **(context.attention or {})) + hidden
    normed = block.norm3(hidden) * (1 + scale_mlp) + shift_mlp
    return gate_mlp * block.ff(normed) + hidden


class ExtendedUNetAnatomy(UNetAnatomy):
    """Parts of an `ExtendedUNet`. Masks act on the residual blocks of encoder and decoder, not on the middle's."""

    def _run_encoder(self, layer: Any, hidden: Tensor, context: Context) -> Tensor:
        name = f"encoder.{self._encoder.index(layer)}"
        hidden = super()._run_encoder(layer, hidden, self._conditioned(name, context))
        self._net.after(name, hidden, context)
        return hidden

    def _run_middle(self, hidden: Tensor, context: Context) -> Tensor:
        hidden = super()._run_middle(hidden, self._conditioned("middle", context))
        self._net.after("middle", hidden, context)
        return hidden

    def _run_decoder(self, index: int, hidden: Tensor, state: EncoderState) -> Tensor:
        name = f"decoder.{index}"
        hidden = super()._run_decoder(index, hidden, replace(state, context=self._conditioned(name, state.context)))
        self._net.after(name, hidden, state.context)
        return hidden

    def _conditioned(self, name: str, context: Context) -> Context:
        shift = self._net.shift(name, context)
        return context if shift is None else replace(context, embedding=context.embedding + shift)

    def _run_resnet(self, block: Any, resnet: Any, hidden: Tensor, context: Context) -> Tensor:
        mask = self._net.input_mask("resnet", hidden, context)
        if mask is None:
            return super()._run_resnet(block, resnet, hidden, context)
        output = super()._run_resnet(block, resnet, mask * hidden, context)
        # The shortcut sees everything: what the mask took from it is linear, and is added again.
        missing = (1 - mask) * hidden
        if resnet.conv_shortcut is not None:
            missing = F.conv2d(missing, resnet.conv_shortcut.weight)
        return output + missing / resnet.output_scale_factor


def extend_model(model: nn.Module, name: str, options: Mapping[str, Any]) -> nn.Module:
    """A copy of a model with one more extension, whose new weights come from torch's global generator.

    Args:
        model: A `DiTTransformer2DModel` or `UNet2DModel`, extended already or not; left as it is.
        name: In `EXTENSIONS`.
        options: Its arguments, plain values: they become part of the config.

    Raises:
        ConfigError: another class, an unknown name, an extension that is there already, or options that do not suit the model.
        ShapeError: a tensor of the model has another shape in the extended one.
    """
    model = model.model if isinstance(model, DiffusersNetwork) else model
    kinds = {DiTTransformer2DModel: ExtendedDiT, UNet2DModel: ExtendedUNet}
    kind = next((extended for plain, extended in kinds.items() if isinstance(model, plain)), None)
    if kind is None:
        raise ConfigError(
            f"`{type(model).__name__}` cannot be extended; these can: {', '.join(k.__name__ for k in kinds)}."
        )
    fields = {key: value for key, value in dict(config_of(model)).items() if not key.startswith("_")}
    before = dict(fields.pop("extensions", None) or {})
    if name in before:
        raise ConfigError(f"the network is extended by `{name}` already.")
    extended: Any = kind(**fields, extensions={**before, name: dict(options)})
    old, new = model.state_dict(), extended.state_dict()
    replaced = [key for key in old if key not in new]
    owned = tuple(extended.added[name].owned(extended))
    lost = [key for key in replaced if not key.startswith(owned)] + [
        key for key in new if key not in old and not key.startswith((f"added.{name}.", *owned))
    ]
    if lost:
        raise ShapeError(f"tensors such as `{lost[0]}` do not fit the extended network.")
    extended.load_state_dict({key: value for key, value in old.items() if key in new}, strict=False)
    extended.added[name].inherit(extended, model)
    parameter = next(model.parameters())
    nn.Module.to(extended, device=parameter.device, dtype=parameter.dtype)
    return cast(nn.Module, extended.train(model.training))


def extension_of(model: nn.Module, name: str) -> Extension:
    """An extension of a model, by its name in the config.

    Raises:
        ConfigError: the model has none of that name.
    """
    model = model.model if isinstance(model, DiffusersNetwork) else model
    extensions = getattr(model, "added", {})
    if name not in extensions:
        raise ConfigError(f"this `{type(model).__name__}` is not extended by `{name}`.")
    return cast(Extension, extensions[name])


def merge_switch_masks(model: nn.Module, t: float) -> nn.Module:
    """A model with switch masks, at one time input for good: one linear layer a block in place of gates and experts, exactly.

    Args:
        model: An `ExtendedDiT` with the extension `switch_masks`; left as it is.
        t: The time input at which the result will be called; at others it is another network.

    Raises:
        ConfigError: a model without switch masks.
    """
    model = model.model if isinstance(model, DiffusersNetwork) else model
    switch = cast(SwitchMasks, extension_of(model, "switch_masks"))
    fields = {key: value for key, value in dict(config_of(model)).items() if not key.startswith("_")}
    extensions = {key: value for key, value in fields.pop("extensions").items() if key != "switch_masks"}
    merged: Any = ExtendedDiT(**fields, extensions={**extensions, "linear_masks": {}})
    parameter = next(model.parameters())
    nn.Module.to(merged, device=parameter.device, dtype=parameter.dtype)
    old = {key: value for key, value in model.state_dict().items() if not key.startswith("added.switch_masks.")}
    with torch.no_grad():
        gates = switch.routing_map(model, torch.full((1,), t, device=parameter.device))[0]  # (L, M)
        kept = torch.zeros_like(gates).scatter(1, gates.topk(switch.top_k, dim=1).indices, 1.0) * gates
        old["added.linear_masks.weight"] = torch.einsum("lm,lmij->lij", kept.to(switch.weight), switch.weight)
        old["added.linear_masks.bias"] = torch.einsum("lm,lmi->li", kept.to(switch.bias), switch.bias)
    merged.load_state_dict(old)
    return cast(nn.Module, merged.train(model.training))
