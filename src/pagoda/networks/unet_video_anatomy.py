"""The anatomy of diffusers' U-Nets for video: `UNet3DConditionModel` and `UNetMotionModel`.

A video (B, C, F, H, W) runs as B F images through the layers of `unet_anatomy`; each layer has temporal parts besides, which see the
frames of one video together. The layers, and so the branches, are those of the image U-Net of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnDownBlock3D,
    CrossAttnUpBlock3D,
    DownBlock3D,
    UNetMidBlock3DCrossAttn,
    UpBlock3D,
)
from diffusers.models.unets.unet_motion_model import (
    CrossAttnDownBlockMotion,
    CrossAttnUpBlockMotion,
    DownBlockMotion,
    UNetMidBlock2DCrossAttn,
    UNetMidBlockCrossAttnMotion,
    UpBlockMotion,
)
from torch import Tensor, nn

from pagoda.diffusion.conditions import UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.calling import config_of
from pagoda.networks.parts import Context, EncoderState, Residuals
from pagoda.networks.unet_anatomy import EMBEDDERS, UNetAnatomy, mask_bias

TEMPORAL = ("temp_convs", "temp_attentions", "motion_modules")
"""Lists of a block's parts that see several frames together, one entry per residual block."""


class VideoUNetAnatomy(UNetAnatomy):
    """Parts of a `UNet3DConditionModel` or `UNetMotionModel`; runs start from the model's own arguments (`enter`).

    Raises:
        ConfigError: blocks of other kinds.
    """

    _kinds = (
        (DownBlock3D, CrossAttnDownBlock3D, DownBlockMotion, CrossAttnDownBlockMotion),
        (UpBlock3D, CrossAttnUpBlock3D, UpBlockMotion, CrossAttnUpBlockMotion),
        (UNetMidBlock3DCrossAttn, UNetMidBlockCrossAttnMotion, UNetMidBlock2DCrossAttn),
    )

    def part(self, name: str) -> list[nn.Module]:
        if name == "embedding":
            names = (*EMBEDDERS, "add_time_proj")
            found = [getattr(self._net, embedder, None) for embedder in names]
            return [module for module in found if isinstance(module, nn.Module)]
        layer, modules = self._layer(name), super().part(name)
        if layer is not None and layer.resnet is not None:
            temporal = [getattr(layer.block, kind)[layer.resnet] for kind in TEMPORAL if hasattr(layer.block, kind)]
            resampling = 1 if layer.resample else 0
            modules[len(modules) - resampling : len(modules) - resampling] = temporal
        if name == "stem" and hasattr(self._net, "transformer_in"):
            modules.append(self._net.transformer_in)
        return modules

    def embed(self, t: Tensor, condition: Condition = UNCONDITIONAL) -> Context:
        raise ConfigError(f"`{type(self.model).__name__}` takes no `Condition`; use `enter` with its own arguments.")

    def stem(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        raise ConfigError(f"`{type(self.model).__name__}` takes no `Condition`; use `enter` with its own arguments.")

    def context(self, arguments: Mapping[str, Any]) -> Context:
        given = arguments.get
        sample, time, tokens = (
            arguments["sample"],
            torch.as_tensor(arguments["timestep"]),
            arguments["encoder_hidden_states"],
        )
        if sample.ndim != 5:
            raise ShapeError(f"videos must have shape (B, C, F, H, W), got {tuple(sample.shape)}.")
        frames = int(sample.shape[2])
        time = (time[None] if time.ndim == 0 else time).to(sample.device).expand(len(sample))
        embedding = self._net.time_embedding(self._net.time_proj(time).to(self._net.dtype), given("timestep_cond"))
        config, added = config_of(self.model), given("added_cond_kwargs") or {}
        if config.get("addition_embed_type") == "text_time":
            text, sizes = added["text_embeds"], self._net.add_time_proj(added["time_ids"].flatten())
            both = torch.concat([text, sizes.reshape(len(text), -1)], dim=-1)
            embedding = embedding + self._net.add_embedding(both.to(embedding.dtype))
        # The two models disagree about who repeats the text: this one's pipelines hand it over once per frame.
        if hasattr(self._net, "transformer_in"):
            tokens = tokens.repeat_interleave(frames, dim=0)
        if (
            getattr(self._net, "encoder_hid_proj", None) is not None
            and config.get("encoder_hid_dim_type") == "ip_image_proj"
        ):
            images = self._net.encoder_hid_proj(added["image_embeds"])
            tokens = (tokens, [image.repeat_interleave(frames, dim=0) for image in images])
        skips, middle = given("down_block_additional_residuals"), given("mid_block_additional_residual")
        return Context(
            time=time,
            labels=None,
            embedding=embedding.repeat_interleave(frames, dim=0),
            tokens=tokens,
            bias=mask_bias(given("attention_mask"), sample.dtype),
            attention=given("cross_attention_kwargs"),
            residuals=None if skips is None and middle is None else Residuals(tuple(skips or ()), middle),
            frames=frames,
        )

    def first(self, arguments: Mapping[str, Any], context: Context) -> Tensor:
        sample = arguments["sample"]
        sample = sample.permute(0, 2, 1, 3, 4).reshape(len(sample) * context.frames, -1, *sample.shape[3:])
        hidden = self._net.conv_in(sample)
        if not hasattr(self._net, "transformer_in"):
            return hidden
        return self._net.transformer_in(
            hidden, num_frames=context.frames, cross_attention_kwargs=context.attention, return_dict=False
        )[0]

    def head(self, hidden: Tensor, state: EncoderState) -> Tensor:
        images = super().head(hidden, state)
        return images.unflatten(0, (-1, state.context.frames)).permute(0, 2, 1, 3, 4)

    def _run_middle(self, hidden: Tensor, context: Context) -> Tensor:
        block = self._net.mid_block
        frames = {} if type(block) is UNetMidBlock2DCrossAttn else {"num_frames": context.frames}
        return block(
            hidden,
            context.embedding,
            encoder_hidden_states=context.tokens,
            attention_mask=context.bias,
            cross_attention_kwargs=context.attention,
            **frames,
        )

    def _run_block(self, layer: Any, hidden: Tensor, context: Context) -> Tensor:
        block, index, frames = layer.block, layer.resnet, context.frames
        if (
            torch.is_grad_enabled()
            and getattr(block, "gradient_checkpointing", False)
            and hasattr(block, "motion_modules")
        ):
            hidden = block._gradient_checkpointing_func(block.resnets[index], hidden, context.embedding)
        else:
            hidden = block.resnets[index](hidden, context.embedding)
        if hasattr(block, "temp_convs"):
            hidden = block.temp_convs[index](hidden, num_frames=frames)
        if hasattr(block, "attentions"):
            # The 3D model gives its masks to the middle alone.
            masked = {"attention_mask": context.bias} if hasattr(block, "motion_modules") else {}
            hidden = block.attentions[index](
                hidden,
                encoder_hidden_states=context.tokens,
                cross_attention_kwargs=context.attention,
                return_dict=False,
                **masked,
            )[0]
        if hasattr(block, "temp_attentions"):
            hidden = block.temp_attentions[index](
                hidden, num_frames=frames, cross_attention_kwargs=context.attention, return_dict=False
            )[0]
        if hasattr(block, "motion_modules"):
            hidden = block.motion_modules[index](hidden, num_frames=frames)
        return hidden
