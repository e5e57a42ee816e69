"""A small encoder of images and captions, trained on the user's own: everything about texts then works offline.

The towers are transformers' own models with small configurations, so that whatever reads a CLIP folder reads this one too.

    L = (CE(s I T^t, y) + CE(s T I^t, y)) / 2,    y_ij = 1 / n where captions i and j are equal, n = how often it is in the batch

Source: Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3; the learnt scale s is kept in [1, 100] as there. That equal
captions count as right answers for each other is ours: small sets repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagoda.errors import import_extra
from pagoda.evaluation.transformers import CLIP_MEAN, CLIP_STD
from pagoda.files import write_text_atomic
from pagoda.networks import DiffAugment
from pagoda.text.config import TwoTowerConfig
from pagoda.text.image_text import prepare_pixels
from pagoda.text.loading import without_progress_bars
from pagoda.text.tokenizer import train_tokenizer
from pagoda.training import Losses, Objective, Runtime, StepRandom, Trainable

LARGEST_SCALE = 100.0
"""Bound of the learnt scale of the similarities."""


def build_two_tower(config: TwoTowerConfig, tokenizer: Any) -> nn.Module:
    """The two towers with fresh weights from torch's global generator: a `CLIPModel` or a `VisionTextDualEncoderModel`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = import_extra("transformers", "encoders")
    numbers = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    width = {
        "hidden_size": config.width,
        "intermediate_size": 2 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": config.max_tokens, **width, **numbers}
    image = {"image_size": config.image_size, "patch_size": config.patch_size, "num_channels": 3}
    if config.vision == "vit":
        towers = transformers.CLIPConfig(
            text_config={**text, "attention_dropout": config.dropout},
            vision_config={**image, **width, "attention_dropout": config.dropout},
            projection_dim=config.dim,
            logit_scale_init_value=math.log(1 / 0.07),
        )
        return cast(nn.Module, transformers.CLIPModel(towers))
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    dual = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ConvNextConfig(
            **image,
            num_stages=2,
            hidden_size=config.width,  # what the pair of towers asks for; a ConvNeXt has a list of its own
            hidden_sizes=[config.width // 2, config.width],
            depths=[max(1, config.depth // 2), max(1, config.depth - config.depth // 2)],
        ),
        transformers.BertConfig(**text, **dropout),
        projection_dim=config.dim,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    return cast(nn.Module, transformers.VisionTextDualEncoderModel(dual))


@dataclass(frozen=True)
class CaptionedBatch:
    """Images, augmented, with the tokens of their captions and which caption each has."""

    images: Tensor
    tokens: Tensor
    mask: Tensor
    captions: Tensor


class ContrastiveObjective(Objective[CaptionedBatch]):
    """InfoNCE between images and captions.

    Several processes compare with each other's rows: the gradients are those of one process with the whole batch.

    Args:
        model: The two towers.
        tokenizer: Of the captions.
        texts: The different captions.
        rows: (N,) int64: which of them belongs to each image.
        load: `load(indices, flips) -> images (B, C, H, W) in [-1, 1]`.
        config: Of the encoder.
        mirror: Mirror half of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: list[str],
        rows: Tensor,
        load: Callable[[Tensor, Tensor], Tensor],
        *,
        config: TwoTowerConfig,
        mirror: bool,
    ) -> None:
        self.model: Any = model
        self.config = config
        self.mirror = mirror
        self.load = load
        self.rows = rows
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=config.max_tokens, return_tensors="pt")
        self.tokens, self.mask = tokens["input_ids"], tokens["attention_mask"]
        self.augment = DiffAugment(config.augment)
        self._mean, self._std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def trainables(self) -> Mapping[str, Trainable]:
        return {"encoder": Trainable(self.model, self.config.optimizer, self.config.ema)}

    def batch(self, indices: Tensor, random: StepRandom) -> CaptionedBatch:
        flips = random.uniform("flip") < (0.5 if self.mirror else 0.0)
        images = self.load(indices, flips)
        draw = self.augment.draw(random.batch_size, random.generator("augment"))
        images = self.augment.apply(images, {name: value[random.rows] for name, value in draw.items()})
        captions = self.rows[indices]
        return CaptionedBatch(images, self.tokens[captions], self.mask[captions], captions)

    def losses(self, name: str, batch: CaptionedBatch, random: StepRandom, runtime: Runtime) -> Losses:
        device, model = runtime.device, self.model
        pixels = prepare_pixels(batch.images.to(device), self.config.image_size, self._mean, self._std)
        images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        said = model.text_model(input_ids=batch.tokens.to(device), attention_mask=batch.mask.to(device))
        texts = model.text_projection(said.pooler_output)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        own, count = len(images), runtime.world_size
        captions = runtime.gather(batch.captions.to(device))
        if count > 1:
            rows = slice(runtime.rank * own, (runtime.rank + 1) * own)
            images, texts = (_with_own(runtime.gather(part), part, rows) for part in (images, texts))
        # Each process computes the loss of the whole batch, and the loop averages gradients over processes: those of
        # its own rows are its alone and count `count` times, that of the scale is on every process and counts once.
        scale = model.logit_scale / count + (1 - 1 / count) * model.logit_scale.detach()
        logits = scale.clamp(0, math.log(LARGEST_SCALE)).exp() * images @ texts.T
        loss = contrastive_loss(logits, captions)
        right = captions[logits.detach().argmax(1)] == captions
        total = loss * count - (count - 1) * loss.detach()
        return Losses(
            total, {"contrastive": loss, "accuracy": right.float(), "scale": model.logit_scale.detach().exp()}
        )


def contrastive_loss(logits: Tensor, captions: Tensor) -> Tensor:
    """InfoNCE both ways, a scalar; equal captions are right answers for each other.

    Args:
        logits: (N, N), images down, captions across.
        captions: (N,), equal where the captions are.
    """
    target = (captions[:, None] == captions[None]).to(logits)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _with_own(gathered: Tensor, own: Tensor, rows: slice) -> Tensor:
    """The rows of all processes; those of this one carry gradients."""
    return torch.cat([gathered[: rows.start], own, gathered[rows.stop :]])


def new_two_tower(config: TwoTowerConfig, texts: list[str]) -> tuple[nn.Module, Any]:
    """A tokeniser of these captions and fresh towers for it."""
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size, max_tokens=config.max_tokens)
    return build_two_tower(config, tokenizer), tokenizer


def save_two_tower(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write the towers, the tokeniser and how images are prepared, in the Hugging Face layout."""
    with without_progress_bars():
        cast(Any, model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = cast(Any, model).vision_model.config.image_size
    write_text_atomic(
        folder / "preprocessor_config.json",
        f'{{"image_mean": {list(CLIP_MEAN)}, "image_std": {list(CLIP_STD)}, "size": {size}}}\n',
    )
