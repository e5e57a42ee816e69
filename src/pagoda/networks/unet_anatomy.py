"""The anatomy of diffusers' U-Nets.

Encoder layers are what hands a skip to the decoder: a residual block with its attention, or a down-sampler. Decoder layers
are what takes one: a residual block with its attention. An up-sampler belongs to the last decoder layer of its level, so
that the features before decoder layer k always have the size of the skip that layer k takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    SimpleCrossAttnDownBlock2D,
    SimpleCrossAttnUpBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UNetMidBlock2DSimpleCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError
from pagoda.networks.calling import concatenate_image, config_of, resolve_condition, total_stride
from pagoda.networks.parts import Anatomy, Context, EncoderState, Residuals

DOWN_BLOCKS = (
    DownBlock2D,
    AttnDownBlock2D,
    CrossAttnDownBlock2D,
    ResnetDownsampleBlock2D,
    SimpleCrossAttnDownBlock2D,
)
UP_BLOCKS = (UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D, ResnetUpsampleBlock2D, SimpleCrossAttnUpBlock2D)
MIDDLE_BLOCKS = (UNetMidBlock2D, UNetMidBlock2DCrossAttn, UNetMidBlock2DSimpleCrossAttn)
EMBEDDERS = ("time_proj", "time_embedding", "class_embedding", "encoder_hid_proj", "add_embedding")


class _Layer(NamedTuple):
    """One encoder or decoder layer: residual block number `resnet` of a block, or its re-sampler, or (decoder) both."""

    block: Any
    resnet: Any
    resample: bool
    level: int
    adapter: int | None = None
    """Encoder: the number of its block, where an adapter adds to this layer's output."""

    def modules(self) -> list[nn.Module]:
        found = []
        if self.resnet is not None:
            found.append(self.block.resnets[self.resnet])
            if hasattr(self.block, "attentions"):
                found.append(self.block.attentions[self.resnet])
        if self.resample:
            found.extend(getattr(self.block, "upsamplers", None) or self.block.downsamplers)
        return found


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask (B, T), 1 = keep, as a bias (B, 1, T) of attention scores, by diffusers' constant."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def residuals_of(arguments: Mapping[str, Any]) -> Residuals | None:
    """What a ControlNet or a T2I-Adapter adds, from the arguments of a U-Net's own forward.

    Raises:
        ConfigError: skips' residuals without one for the middle, which diffusers deprecates.
    """
    skips, middle = arguments.get("down_block_additional_residuals"), arguments.get("mid_block_additional_residual")
    blocks = arguments.get("down_intrablock_additional_residuals")
    if skips is None and blocks is None:
        return None if middle is None else Residuals()  # diffusers ignores a middle that comes alone
    if skips is not None and middle is None and "down_intrablock_additional_residuals" in arguments:
        raise ConfigError(
            "give adapters' residuals as `down_intrablock_additional_residuals`, ControlNets' with a middle."
        )
    return Residuals(tuple(skips or ()), middle if skips is not None else None, tuple(blocks or ()))


class UNetAnatomy(Anatomy):
    """Parts of a `UNet2DModel` or `UNet2DConditionModel` built of plain, self-attention and cross-attention blocks, and of
    those of consistency models and DeepFloyd IF, which resample by residual blocks.

    Raises:
        ConfigError: blocks of other kinds.
    """

    _kinds: tuple[tuple[Any, ...], ...] = (DOWN_BLOCKS, UP_BLOCKS, MIDDLE_BLOCKS)
    """Classes of down, up and middle blocks that can be split into layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._net: Any = model
        self._check_blocks()
        self._encoder: list[_Layer] = []
        self._decoder: list[_Layer] = []
        level = 1
        block: Any
        net: Any = self._net
        for number, block in enumerate(net.down_blocks):
            first = len(self._encoder)
            self._encoder += [_Layer(block, index, False, level) for index in range(len(block.resnets))]
            # T2I-Adapters: before the down-sampler of a cross-attention block, after that of any other.
            at = len(self._encoder) - 1
            if block.downsamplers is not None:
                level *= 2
                self._encoder.append(_Layer(block, None, True, level))
                at = at if getattr(block, "has_cross_attention", False) else at + 1
            assert at >= first
            self._encoder[at] = self._encoder[at]._replace(adapter=number)
        for block in net.up_blocks:
            last = len(block.resnets) - 1
            for index in range(last + 1):
                resample = index == last and block.upsamplers is not None
                level = level // 2 if resample else level
                self._decoder.append(_Layer(block, index, resample, level))

    def _check_blocks(self) -> None:
        middle = [] if self._net.mid_block is None else [self._net.mid_block]
        for blocks, known in zip((self._net.down_blocks, self._net.up_blocks, middle), self._kinds, strict=True):
            for block in blocks:
                if type(block) not in known:
                    names = ", ".join(f"`{kind.__name__}`" for kind in known)
                    raise ConfigError(f"blocks of type `{type(block).__name__}` have no anatomy; these have: {names}.")
        if getattr(config_of(self.model), "addition_embed_type", None) == "image_hint":
            raise ConfigError("addition_embed_type='image_hint' has no anatomy: its hint is part of the image.")

    @property
    def stride(self) -> int:
        return total_stride(self.model)

    @property
    def embedding_dim(self) -> int:
        width = int(self._net.time_embedding.linear_2.out_features)
        concatenated = getattr(config_of(self.model), "class_embeddings_concat", False)
        return 2 * width if concatenated and self._net.class_embedding is not None else width

    def names(self) -> list[str]:
        encoder = [f"encoder.{k}" for k in range(len(self._encoder))]
        middle = [] if self._net.mid_block is None else ["middle"]
        return ["stem", *encoder, *middle, *[f"decoder.{k}" for k in range(len(self._decoder))], "head"]

    def _layer(self, name: str) -> _Layer | None:
        kind, _, index = self.check(name).partition(".")
        layers = {"encoder": self._encoder, "decoder": self._decoder}.get(kind)
        return None if layers is None else layers[int(index)]

    def part(self, name: str) -> list[nn.Module]:
        if name == "embedding":
            candidates = [getattr(self._net, embedder, None) for embedder in EMBEDDERS]
            return [module for module in candidates if isinstance(module, nn.Module)]
        layer = self._layer(name)
        if layer is not None:
            return layer.modules()
        if name == "stem":
            return [self._net.conv_in]
        if name == "middle":
            return [self._net.mid_block]
        return [
            module for module in (self._net.conv_norm_out, self._net.conv_act, self._net.conv_out) if module is not None
        ]

    def channels(self, name: str) -> int:
        layer = self._layer(name)
        if layer is not None:
            return int(layer.block.resnets[-1].out_channels)  # re-samplers keep the width of their block
        if name == "head":
            return int(self._net.conv_out.out_channels)
        if name == "middle":
            return int(self._net.mid_block.resnets[-1].out_channels)
        return int(self._net.conv_in.out_channels)

    def level(self, name: str) -> int:
        layer = self._layer(name)
        if layer is not None:
            return layer.level
        return self.stride if name == "middle" else 1

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        inputs = resolve_condition(self.model, condition, t.shape[0], t.device)
        config = config_of(self.model)
        kinds = (
            # That of "text" is pooled from the tokens, which have a slot.
            getattr(config, "addition_embed_type", None) if config.get("addition_embed_type") != "text" else None,
            getattr(config, "encoder_hid_dim_type", None)
            if config.get("encoder_hid_dim_type") != "text_proj"
            else None,
        )
        if any(kind is not None for kind in kinds):
            raise ConfigError(
                f"embeddings of kind {next(kind for kind in kinds if kind)!r} have no slot in a condition; "
                "use `enter` with the model's own arguments."
            )
        like = self._net.conv_in.weight.new_empty((t.shape[0], 0), device=t.device)
        return self.context(
            {
                "sample": like,
                "timestep": t,
                "class_labels": inputs.labels,
                "encoder_hidden_states": inputs.tokens,
                "encoder_attention_mask": inputs.tokens_mask,
            }
        )

    def context(self, arguments: Mapping[str, Any]) -> Context:
        if isinstance(self.model, UNet2DModel):
            return self._plain_context(arguments)
        given = arguments.get
        sample, tokens, added = arguments["sample"], arguments["encoder_hidden_states"], given("added_cond_kwargs")
        time: Any = self._net.get_time_embed(sample=sample, timestep=given("timestep"))
        embedding = self._net.time_embedding(time, given("timestep_cond"))
        class_embedding = self._net.get_class_embed(sample=sample, class_labels=given("class_labels"))
        if class_embedding is not None:
            concatenated = config_of(self.model).class_embeddings_concat
            embedding = torch.cat([embedding, class_embedding], dim=-1) if concatenated else embedding + class_embedding
        addition = self._net.get_aug_embed(emb=embedding, encoder_hidden_states=tokens, added_cond_kwargs=added)
        if addition is not None:
            embedding = embedding + addition
        if self._net.time_embed_act is not None:
            embedding = self._net.time_embed_act(embedding)
        attention = given("cross_attention_kwargs")
        if attention is not None and attention.get("gligen") is not None:
            attention = {**attention, "gligen": {"objs": self._net.position_net(**attention["gligen"])}}
        return Context(
            time=arguments["timestep"],
            labels=given("class_labels"),
            embedding=embedding,
            tokens=self._net.process_encoder_hidden_states(encoder_hidden_states=tokens, added_cond_kwargs=added),
            tokens_bias=mask_bias(given("encoder_attention_mask"), sample.dtype),
            bias=mask_bias(given("attention_mask"), sample.dtype),
            attention=attention,
            residuals=residuals_of(arguments),
        )

    def _plain_context(self, arguments: Mapping[str, Any]) -> Context:
        """Context of a `UNet2DModel`."""
        sample, labels = arguments["sample"], arguments.get("class_labels")
        time = torch.as_tensor(arguments["timestep"], device=sample.device)
        time = (time[None] if time.ndim == 0 else time) * torch.ones(
            sample.shape[0], dtype=time.dtype, device=time.device
        )
        dtype = self._net.dtype
        embedding = self._net.time_embedding(self._net.time_proj(time).to(dtype))
        if labels is not None:
            embedding = embedding + self._net.class_embedding(labels).to(dtype)
        return Context(time=time, labels=labels, embedding=embedding)

    def first(self, arguments: Mapping[str, Any], context: Context) -> Tensor:
        return self._first(arguments["sample"])

    def _first(self, sample: Tensor) -> Tensor:
        if config_of(self.model).center_input_sample:
            sample = 2 * sample - 1.0
        return self._net.conv_in(sample)

    def first_skips(self, hidden: Tensor, context: Context) -> tuple[Tensor, ...]:
        return (self._skip(hidden, 0, context),)

    def _skip(self, hidden: Tensor, index: int, context: Context) -> Tensor:
        """What encoder layer number `index` - 1 (0 = the stem) hands to the decoder."""
        added = None if context.residuals is None else context.residuals.skips
        return hidden if not added or index >= len(added) else hidden + added[index]

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        return self._first(concatenate_image(self.model, x, condition))

    def advance(self, state: EncoderState, *, stop: int | None = None) -> EncoderState:
        hidden, skips, context = state.hidden, list(state.skips), state.context
        for layer in self._encoder[len(skips) - 1 : stop]:
            hidden = self._run_encoder(layer, hidden, context)
            skips.append(self._skip(hidden, len(skips), context))
        return EncoderState(hidden=hidden, skips=tuple(skips), context=context)

    def middle(self, state: EncoderState) -> Tensor:
        hidden, context, added = state.hidden, state.context, state.context.residuals
        if self._net.mid_block is not None:
            hidden = self._run_middle(hidden, context)
            spare = () if added is None else added.blocks[len(self._net.down_blocks) :]
            if spare and spare[0].shape == hidden.shape:
                hidden = hidden + spare[0]  # T2I-Adapter-XL
        return hidden if added is None or added.middle is None else hidden + added.middle

    def _run_middle(self, hidden: Tensor, context: Context) -> Tensor:
        block = self._net.mid_block
        if isinstance(block, UNetMidBlock2DCrossAttn | UNetMidBlock2DSimpleCrossAttn):
            return block(
                hidden,
                context.embedding,
                encoder_hidden_states=context.tokens,
                attention_mask=context.bias,
                cross_attention_kwargs=context.attention,
                encoder_attention_mask=context.tokens_bias,
            )
        return block(hidden, context.embedding)

    def decode(self, hidden: Tensor, state: EncoderState, *, start: int = 0, stop: int | None = None) -> Tensor:
        for index in range(len(self._decoder))[start:stop]:
            hidden = self._run_decoder(index, hidden, state)
        return hidden

    def head(self, hidden: Tensor, state: EncoderState) -> Tensor:
        if self._net.conv_norm_out is not None:
            hidden = self._net.conv_act(self._net.conv_norm_out(hidden))
        output = self._net.conv_out(hidden)
        if getattr(config_of(self.model), "time_embedding_type", None) == "fourier" and isinstance(
            self.model, UNet2DModel
        ):
            output = output / state.context.time.reshape(-1, 1, 1, 1)  # diffusers' VE networks predict the score
        return output

    def walk(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Iterator[tuple[str, Tensor]]:
        state = self.encode(x, t, condition, stop=0)
        yield "stem", state.hidden
        for index in range(len(self._encoder)):
            state = self.advance(state, stop=index + 1)
            yield f"encoder.{index}", state.hidden
        hidden = self.middle(state)
        if self._net.mid_block is not None:
            yield "middle", hidden
        for index in range(len(self._decoder)):
            hidden = self._run_decoder(index, hidden, state)
            yield f"decoder.{index}", hidden
        yield "head", self.head(hidden, state)

    def as_map(self, hidden: Tensor) -> Tensor:
        return hidden

    def _run_encoder(self, layer: _Layer, hidden: Tensor, context: Context) -> Tensor:
        if layer.resnet is not None:
            hidden = self._run_block(layer, hidden, context)
        else:
            for downsampler in layer.block.downsamplers:
                by_resnet = isinstance(downsampler, ResnetBlock2D)
                hidden = downsampler(hidden, temb=context.embedding) if by_resnet else downsampler(hidden)
        if layer.adapter is None or context.residuals is None or layer.adapter >= len(context.residuals.blocks):
            return hidden
        return hidden + context.residuals.blocks[layer.adapter]

    def _run_decoder(self, index: int, hidden: Tensor, state: EncoderState) -> Tensor:
        layer = self._decoder[index]
        if getattr(layer.block, "s1", None):
            raise ConfigError("FreeU is enabled, which split runs do not apply; call `disable_freeu()` first.")
        skip = len(self._decoder) - 1 - index
        hidden = self._run_block(layer, torch.cat([hidden, state.skips[skip]], dim=1), state.context)
        if layer.resample:
            for upsampler in layer.block.upsamplers:
                if isinstance(upsampler, ResnetBlock2D):
                    hidden = upsampler(hidden, temb=state.embedding)
                    continue
                # Odd sides were rounded up on the way down, so that twice the size overshoots the next skip.
                target = tuple(state.skips[skip - 1].shape[-2:])
                fits = target == (2 * hidden.shape[-2], 2 * hidden.shape[-1])
                hidden = upsampler(hidden) if fits else upsampler(hidden, target)
        return hidden

    def _run_block(self, layer: _Layer, hidden: Tensor, context: Context) -> Tensor:
        """A residual block and its attention."""
        block: Any = layer.block
        hidden = self._run_resnet(block, block.resnets[layer.resnet], hidden, context)
        if isinstance(block, CrossAttnDownBlock2D | CrossAttnUpBlock2D):
            return block.attentions[layer.resnet](
                hidden,
                encoder_hidden_states=context.tokens,
                cross_attention_kwargs=context.attention,
                attention_mask=context.bias,
                encoder_attention_mask=context.tokens_bias,
                return_dict=False,
            )[0]
        if isinstance(block, SimpleCrossAttnDownBlock2D | SimpleCrossAttnUpBlock2D):
            # Tokens and pixels are keys of one attention, with one mask.
            mask = context.tokens_bias if context.bias is None and context.tokens is not None else context.bias
            return block.attentions[layer.resnet](
                hidden, encoder_hidden_states=context.tokens, attention_mask=mask, **(context.attention or {})
            )
        if isinstance(block, AttnDownBlock2D | AttnUpBlock2D):
            return block.attentions[layer.resnet](hidden)
        return hidden

    def _run_resnet(self, block: Any, resnet: Any, hidden: Tensor, context: Context) -> Tensor:
        """A residual block without its attention."""
        if torch.is_grad_enabled() and block.gradient_checkpointing:
            return block._gradient_checkpointing_func(resnet, hidden, context.embedding)
        return resnet(hidden, context.embedding)
