"""diffusers models as the `Network` callable that denoisers need: (x, t, condition) -> output, all shaped (B, C, H, W).

| model | label | tokens | pooled |
|---|---|---|---|
| `UNet2DModel` | embedding table, last row = null | - | - |
| `UNet2DConditionModel` | embedding table, last row = null | `encoder_hidden_states`, `encoder_attention_mask` | projected, for labels |
| `DiTTransformer2DModel` | embedding table of every block, last row = null | - | - |
| `SD3Transformer2DModel` | - | `encoder_hidden_states` | `pooled_projections` |

Labels 0 .. num_classes - 1 are classes; `NULL_LABEL` (-1), or no label at all, is the null row. For a U-Net that is our convention and not
diffusers': of a teacher from elsewhere, `teachers` finds out whether it holds before anything is called. A concatenated image
follows `x` on the channel axis. A slot that the model has no input for is refused, never ignored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from pagoda.diffusion.conditions import NULL_LABEL, UNCONDITIONAL, Condition
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks.null_condition import NullCondition

SUPPORTED_MODELS: tuple[Any, ...] = (
    UNet2DModel,
    UNet2DConditionModel,
    DiTTransformer2DModel,
    SD3Transformer2DModel,
)
"""The diffusers classes that can be called, tapped and grown."""


@dataclass(frozen=True)
class ModelInputs:
    """What a diffusers model receives: a condition in its own terms."""

    labels: Tensor | None
    """(B,) rows of the embedding table, or None for a model without one; pooled embeddings (B, P) where it projects those."""
    tokens: Tensor | None
    """(B, T, D)."""
    tokens_mask: Tensor | None
    """(B, T) bool, True = keep."""
    pooled: Tensor | None = None
    """(B, P)."""


class DiffusersNetwork(nn.Module):
    """A diffusers model as a `Network`.

    Conditions are dropped in one place, `Condition.drop`. diffusers' DiT drops labels inside its embedding tables while
    training, so that probability is set to 0 here, in `model` itself.

    Args:
        model: One of `SUPPORTED_MODELS`; kept, not copied.
        null: Fills the slots that a condition lacks; None: a text-conditional model must be given its tokens.

    Raises:
        ConfigError: another class, or a way of embedding labels other than a table.
    """

    def __init__(self, model: nn.Module, null: NullCondition | None = None) -> None:
        super().__init__()
        check_supported(model)
        disable_label_dropout(model)
        self.model = model
        self.null = null
        self._num_classes = count_classes(model)

    @property
    def in_channels(self) -> int:
        """Channels of the model's input: the image and whatever is concatenated to it."""
        return int(config_of(self.model).in_channels)

    @property
    def num_classes(self) -> int:
        """Number of classes, the null row not counted; 0 = not conditioned on labels."""
        return self._num_classes

    @property
    def sample_size(self) -> int | None:
        """Side of the images that the model was made for, in pixels; None where its config does not say."""
        return square_size(self.model)

    def fill(self, condition: Condition, batch: int) -> Condition:
        """The condition with what the null condition has for slots that it lacks; itself where there is none."""
        return condition if self.null is None else self.null.fill(condition, batch)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Run the model.

        Args:
            x: (B, C, H, W), scaled as the model was trained.
            t: Time or noise input (B,), float.
            condition: One row per sample, or nothing.

        Returns:
            (B, C, H, W). A model that also predicts a variance (2C channels) gives its first C channels.

        Raises:
            ConfigError: a label out of range, or a slot that this model lacks or misses.
            ShapeError: channels or sizes that the model cannot take.
        """
        condition = self.fill(condition, len(x))
        inputs = resolve_condition(self.model, condition, len(x), x.device)
        sample = concatenate_image(self.model, x, condition)
        arguments: dict[str, Any] = {"class_labels": inputs.labels}
        if isinstance(self.model, UNet2DConditionModel):
            arguments |= {"encoder_hidden_states": inputs.tokens, "encoder_attention_mask": inputs.tokens_mask}
        elif isinstance(self.model, SD3Transformer2DModel):
            arguments = {"timestep": t, "encoder_hidden_states": inputs.tokens, "pooled_projections": inputs.pooled}
            return keep_mean(self.model(sample, **arguments, return_dict=False)[0], x.shape[1])
        output = self.model(sample, t, **arguments, return_dict=False)[0]
        return keep_mean(output, x.shape[1])


def config_of(model: nn.Module) -> Any:
    """The configuration of a diffusers model: a dict whose entries can also be read as attributes."""
    return model.config


def check_supported(model: nn.Module) -> None:
    """Refuse what is not one of the supported diffusers classes.

    Raises:
        ConfigError: naming the class seen and the classes that are supported.
    """
    if not isinstance(model, SUPPORTED_MODELS):
        names = ", ".join(f"`{kind.__name__}`" for kind in SUPPORTED_MODELS)
        raise ConfigError(f"`{type(model).__name__}` is not supported; accepted are {names} of diffusers.")


def disable_label_dropout(model: Any) -> None:
    """Stop a DiT from dropping labels by itself while it trains; `Condition.drop` is the one place for that."""
    if isinstance(model, DiTTransformer2DModel):
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0


def disable_dropout(module: nn.Module) -> None:
    """Stop the layers of a module from dropping activations, also while it trains.

    Dropout keeps a diffusion model from learning its images by heart. A network that starts from its weights and has a target for every
    input, or is compared with it, would only be told noise by it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


def count_classes(model: Any) -> int:
    """Number of classes of a supported model, the null row not counted; 0 = not conditioned on labels.

    Raises:
        ConfigError: labels are embedded by something else than a table.
    """
    if isinstance(model, DiTTransformer2DModel):
        return int(model.config.num_embeds_ada_norm)
    embedding: nn.Module | None = getattr(model, "class_embedding", None)
    if embedding is None or pooled_width(model):
        return 0
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"class_embed_type={config_of(model).class_embed_type!r} is not supported; use class_embed_type=None with "
            "num_class_embeds = number of classes + 1 (the last row stands for no class)."
        )
    return embedding.num_embeddings - 1


def takes_tokens(model: nn.Module) -> bool:
    """Whether a supported model is conditioned on tokens: a joint transformer, or a U-Net with cross-attention."""
    if isinstance(model, SD3Transformer2DModel):
        return True
    if not isinstance(model, UNet2DConditionModel):
        return False
    config = config_of(model)
    return any(
        "CrossAttn" in str(kind) for kind in (*config.down_block_types, *config.up_block_types, config.mid_block_type)
    )


def token_width(model: nn.Module) -> int | None:
    """Width of the tokens that a model takes; 0 for a model that takes none, None where blocks take different ones."""
    if not takes_tokens(model):
        return 0
    config = config_of(model)
    if isinstance(model, SD3Transformer2DModel):
        return int(config.joint_attention_dim)
    width = config.encoder_hid_dim or config.cross_attention_dim
    return width if isinstance(width, int) else None


def pooled_width(model: Any) -> int:
    """Width of the pooled embedding that a model projects and adds to its time embedding; 0 for a model without."""
    config = config_of(model)
    if isinstance(model, SD3Transformer2DModel):
        return int(config.pooled_projection_dim)
    if getattr(config, "class_embed_type", None) != "projection":
        return 0
    return int(config.projection_class_embeddings_input_dim)


def null_of_zeros(model: nn.Module) -> NullCondition | None:
    """Zeros for the slots that a text-conditional model must be given; None for a model that is not.

    Raises:
        ConfigError: its blocks take tokens of different widths.
    """
    width = token_width(model)
    if width is None:
        raise ConfigError("the blocks of this network take tokens of different widths; give a file.")
    if not width:
        return None
    rows = {"tokens": torch.zeros(1, width)}
    if pooled_width(model):
        rows["pooled"] = torch.zeros(pooled_width(model))
    return NullCondition.of(rows)


def square_size(model: nn.Module) -> int | None:
    """`sample_size` of a model's config as one number.

    Raises:
        ShapeError: the model was made for images that are not square.
    """
    size = config_of(model).sample_size
    if size is None or isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ShapeError(f"sample_size={tuple(size)}: only square images are supported.")
    return int(size[0])


def resolve_labels(label: Tensor | None, num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Labels with `NULL_LABEL` -> rows of a table of `num_classes` + 1 rows; no label = the null row for everyone.

    Args:
        label: (B,) in -1 .. num_classes - 1, or None.

    Raises:
        ConfigError: a label is out of range, or a class is given where there are none.
    """
    if label is None:
        return torch.full((batch,), num_classes, dtype=torch.int64, device=device)
    if label.shape != (batch,):
        raise ShapeError(f"labels must have shape ({batch},), one per image, got {tuple(label.shape)}.")
    if label.is_floating_point():
        raise ConfigError(f"labels must be integers, got {label.dtype}.")
    wrong = (label < NULL_LABEL) | (label >= num_classes)
    if (
        torch.compiler.is_compiling()
    ):  # a graph cannot look at values: it asks for a row that the table lacks, and fails there
        label = torch.where(wrong, num_classes + 1, label)
    elif bool(wrong.any()):
        value = int(label[wrong][0])
        if num_classes == 0:
            raise ConfigError(f"label {value} was given to a network without classes; leave the label out.")
        raise ConfigError(
            f"label {value} is out of range: the network knows {num_classes} classes, 0 to {num_classes - 1}, "
            f"and {NULL_LABEL} for none."
        )
    label = label.to(device=device, dtype=torch.int64)
    return torch.where(label == NULL_LABEL, num_classes, label)


def resolve_condition(model: nn.Module, condition: Condition, batch: int, device: torch.device) -> ModelInputs:
    """Translate a condition for a supported model; the concatenated image is left to `concatenate_image`.

    Raises:
        ConfigError: a label out of range, a slot that the model has no input for, or tokens missing.
        ShapeError: the condition has another batch size, or tokens of another width.
    """
    if condition.batch_size not in (None, batch):
        raise ShapeError(f"the condition has {condition.batch_size} rows for {batch} images.")
    accepted, pools = {"label", "image"}, pooled_width(model)
    if takes_tokens(model):
        accepted |= {"tokens"} if isinstance(model, SD3Transformer2DModel) else {"tokens", "tokens_mask"}
    if pools:
        accepted.add("pooled")
    projected = pools > 0 and not isinstance(model, SD3Transformer2DModel)  # in place of the labels
    if projected and (condition.pooled is None or condition.label is not None):
        raise ConfigError(
            f"`{type(model).__name__}` is conditioned on pooled embeddings (B, {pools}) and not on labels; it was given "
            f"{', '.join(condition.slots()) or 'nothing'}. For none, give zeros (`Condition.null`)."
        )
    for slot in condition.slots():
        if slot not in accepted:
            raise ConfigError(f"`{type(model).__name__}` has no input for the condition `{slot}`; leave it out.")
    for slot in sorted(accepted & {"tokens", "pooled"}, reverse=True):
        if getattr(condition, slot) is None:
            shape = {"tokens": "(B, T, D)", "pooled": "(B, P)"}[slot]
            raise ConfigError(
                f"`{type(model).__name__}` needs `{slot}` {shape}; for none, give zeros (`Condition.null`)."
            )
    if condition.tokens is not None:
        width = token_width(model)
        if width is not None and condition.tokens.shape[-1] != width:
            raise ShapeError(f"tokens are {condition.tokens.shape[-1]} wide, the model expects {width}.")
    if condition.pooled is not None and condition.pooled.shape[-1] != pools:
        raise ShapeError(f"the pooled embedding is {condition.pooled.shape[-1]} wide, the model expects {pools}.")
    if projected:
        return ModelInputs(labels=condition.pooled, tokens=condition.tokens, tokens_mask=condition.tokens_mask)
    num_classes = count_classes(model)
    labels: Tensor | None = resolve_labels(condition.label, num_classes, batch, device)
    if num_classes == 0 and not isinstance(model, DiTTransformer2DModel):
        labels = None  # these models have no table at all; a DiT without classes keeps one row
    return ModelInputs(
        labels=labels, tokens=condition.tokens, tokens_mask=condition.tokens_mask, pooled=condition.pooled
    )


def concatenate_image(model: nn.Module, x: Tensor, condition: Condition) -> Tensor:
    """`x` followed by the condition's image on the channel axis, checked against what the model takes.

    Raises:
        ShapeError: the channels do not add up, the sides differ, or the model's stride does not divide the size.
    """
    if x.ndim != 4:
        raise ShapeError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}.")
    expected = int(config_of(model).in_channels)
    extra = 0 if condition.image is None else condition.image.shape[1]
    if x.shape[1] + extra != expected:
        raise ShapeError(
            f"the model takes {expected} channels, got {x.shape[1]} of x and {extra} of `condition.image`."
        )
    # UNet2DConditionModel rounds odd sides up and cuts them back; the others fail deep inside.
    stride = 1 if isinstance(model, UNet2DConditionModel) else total_stride(model)
    if x.shape[-2] % stride or x.shape[-1] % stride:
        raise ShapeError(f"images of {x.shape[-2]} x {x.shape[-1]} px: each side must be a multiple of {stride}.")
    if isinstance(model, DiTTransformer2DModel) and x.shape[-2] != x.shape[-1]:
        raise ShapeError(f"`DiTTransformer2DModel` takes square images, got {x.shape[-2]} x {x.shape[-1]} px.")
    if condition.image is None:
        return x
    if condition.image.shape[-2:] != x.shape[-2:]:
        raise ShapeError(f"`condition.image` has sides {tuple(condition.image.shape[-2:])}, x {tuple(x.shape[-2:])}.")
    return torch.cat([x, condition.image], dim=1)


def total_stride(model: Any) -> int:
    """Factor by which the deepest features of a supported model are smaller than its input."""
    if isinstance(model, DiTTransformer2DModel | SD3Transformer2DModel):
        return int(model.config.patch_size)
    return int(2 ** sum(len(block.downsamplers or []) for block in model.down_blocks))


def largest_side(model: nn.Module) -> int | None:
    """Side in pixels of the largest images that a supported model takes; None where any multiple of its stride will do."""
    if isinstance(model, SD3Transformer2DModel):
        return int(config_of(model).pos_embed_max_size) * total_stride(model)
    return None


def keep_mean(output: Tensor, channels: int) -> Tensor:
    """The first `channels` of a model's output, whose other half, if any, is a predicted variance.

    Raises:
        ShapeError: the output has neither `channels` nor twice as many.
    """
    if output.shape[1] == channels:
        return output
    if output.shape[1] == 2 * channels:
        return output[:, :channels]
    raise ShapeError(
        f"the model gives {output.shape[1]} channels for images of {channels}; accepted: as many or twice."
    )


def model_hash(module: nn.Module) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of a module's state dict, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
