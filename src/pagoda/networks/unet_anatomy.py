"""The anatomy of diffusers' U-Nets.

Encoder layers are what hands a skip to the decoder: a residual block with its attention, or a down-sampler. Decoder layers
are what takes one: a residual block with its attention. An up-sampler belongs to the last decoder layer of its level, so
that the features before decoder layer k always have the size of the skip that layer k takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models import UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError
from pagoda.networks.calling import concatenate_image, config_of, count_classes, resolve_condition, total_stride
from pagoda.networks.parts import Anatomy, Context, EncoderState

DOWN_BLOCKS = (DownBlock2D, AttnDownBlock2D, CrossAttnDownBlock2D)
UP_BLOCKS = (UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D)
MIDDLE_BLOCKS = (UNetMidBlock2D, UNetMidBlock2DCrossAttn)
EMBEDDERS = ("time_proj", "time_embedding", "class_embedding", "encoder_hid_proj")


class _Layer(NamedTuple):
    """One encoder or decoder layer: residual block number `resnet` of a block, or its re-sampler, or (decoder) both."""

    block: Any
    resnet: Any
    resample: bool
    level: int

    def modules(self) -> list[nn.Module]:
        found = []
        if self.resnet is not None:
            found.append(self.block.resnets[self.resnet])
            if hasattr(self.block, "attentions"):
                found.append(self.block.attentions[self.resnet])
        if self.resample:
            found.extend(getattr(self.block, "upsamplers", None) or self.block.downsamplers)
        return found


class UNetAnatomy(Anatomy):
    """Parts of a `UNet2DModel` or `UNet2DConditionModel` built of plain, self-attention and cross-attention blocks.

    Raises:
        ConfigError: blocks or embeddings of other kinds.
    """

    def __init__(self, model: UNet2DModel | UNet2DConditionModel) -> None:
        super().__init__(model)
        self._net: Any = model
        self._check_blocks()
        count_classes(model)  # refuses embeddings that are not tables
        self._encoder: list[_Layer] = []
        self._decoder: list[_Layer] = []
        level = 1
        block: Any
        for block in self._net.down_blocks:
            self._encoder += [_Layer(block, index, False, level) for index in range(len(block.resnets))]
            if block.downsamplers is not None:
                level *= 2
                self._encoder.append(_Layer(block, None, True, level))
        for block in self._net.up_blocks:
            last = len(block.resnets) - 1
            for index in range(last + 1):
                resample = index == last and block.upsamplers is not None
                level = level // 2 if resample else level
                self._decoder.append(_Layer(block, index, resample, level))

    def _check_blocks(self) -> None:
        middle = [] if self._net.mid_block is None else [self._net.mid_block]
        for blocks, known in (
            (self._net.down_blocks, DOWN_BLOCKS),
            (self._net.up_blocks, UP_BLOCKS),
            (middle, MIDDLE_BLOCKS),
        ):
            for block in blocks:
                if type(block) not in known:
                    names = ", ".join(f"`{kind.__name__}`" for kind in known)
                    raise ConfigError(f"blocks of type `{type(block).__name__}` have no anatomy; these have: {names}.")
        config = config_of(self.model)
        if getattr(config, "addition_embed_type", None) is not None:
            raise ConfigError(f"addition_embed_type={config.addition_embed_type!r} has no anatomy; accepted: None.")
        if getattr(config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
            raise ConfigError(
                f"encoder_hid_dim_type={config.encoder_hid_dim_type!r} has no anatomy; accepted: text_proj."
            )

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
        inputs = resolve_condition(self.model, condition, len(t), t.device)
        dtype = self._net.conv_in.weight.dtype
        embedding = self._net.time_embedding(self._net.time_proj(t).to(dtype))
        if inputs.labels is not None:
            class_embedding = self._net.class_embedding(inputs.labels).to(dtype)
            concatenated = getattr(config_of(self.model), "class_embeddings_concat", False)
            embedding = torch.cat([embedding, class_embedding], dim=-1) if concatenated else embedding + class_embedding
        if getattr(self._net, "time_embed_act", None) is not None:
            embedding = self._net.time_embed_act(embedding)
        tokens, bias = inputs.tokens, None
        if tokens is not None and getattr(self._net, "encoder_hid_proj", None) is not None:
            tokens = self._net.encoder_hid_proj(tokens)
        if inputs.tokens_mask is not None:
            bias = ((1 - inputs.tokens_mask.to(dtype)) * -10000.0).unsqueeze(1)  # diffusers' constant
        return Context(time=t, labels=inputs.labels, embedding=embedding, tokens=tokens, tokens_bias=bias)

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        sample = concatenate_image(self.model, x, condition)
        if config_of(self.model).center_input_sample:
            sample = 2 * sample - 1.0
        return self._net.conv_in(sample)

    def encode(
        self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL, *, stop: int | None = None
    ) -> EncoderState:
        context = self.embed(t, condition)
        hidden = self.stem(x, condition)
        skips = [hidden]
        for layer in self._encoder[:stop]:
            hidden = self._run_encoder(layer, hidden, context)
            skips.append(hidden)
        return EncoderState(hidden=hidden, skips=tuple(skips), context=context)

    def middle(self, state: EncoderState) -> Tensor:
        block = self._net.mid_block
        if block is None:
            return state.hidden
        if isinstance(block, UNetMidBlock2DCrossAttn):
            return block(
                state.hidden,
                state.embedding,
                encoder_hidden_states=state.context.tokens,
                encoder_attention_mask=state.context.tokens_bias,
            )
        return block(state.hidden, state.embedding)

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
        context = self.embed(t, condition)
        hidden = self.stem(x, condition)
        skips = [hidden]
        yield "stem", hidden
        for index, layer in enumerate(self._encoder):
            hidden = self._run_encoder(layer, hidden, context)
            skips.append(hidden)
            yield f"encoder.{index}", hidden
        state = EncoderState(hidden=hidden, skips=tuple(skips), context=context)
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
            return self._run_block(layer, hidden, context)
        for downsampler in layer.block.downsamplers:
            by_resnet = getattr(layer.block, "downsample_type", "conv") == "resnet"
            hidden = downsampler(hidden, temb=context.embedding) if by_resnet else downsampler(hidden)
        return hidden

    def _run_decoder(self, index: int, hidden: Tensor, state: EncoderState) -> Tensor:
        layer = self._decoder[index]
        if getattr(layer.block, "s1", None):
            raise ConfigError("FreeU is enabled, which split runs do not apply; call `disable_freeu()` first.")
        skip = len(self._decoder) - 1 - index
        hidden = self._run_block(layer, torch.cat([hidden, state.skips[skip]], dim=1), state.context)
        if layer.resample:
            for upsampler in layer.block.upsamplers:
                by_resnet = getattr(layer.block, "upsample_type", "conv") == "resnet"
                if by_resnet:
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
        resnet = block.resnets[layer.resnet]
        if torch.is_grad_enabled() and block.gradient_checkpointing:
            hidden = block._gradient_checkpointing_func(resnet, hidden, context.embedding)
        else:
            hidden = resnet(hidden, context.embedding)
        if isinstance(block, CrossAttnDownBlock2D | CrossAttnUpBlock2D):
            return block.attentions[layer.resnet](
                hidden,
                encoder_hidden_states=context.tokens,
                encoder_attention_mask=context.tokens_bias,
                return_dict=False,
            )[0]
        if isinstance(block, AttnDownBlock2D | AttnUpBlock2D):
            return block.attentions[layer.resnet](hidden)
        return hidden
