"""Settings of texts: which encoder reads the captions, and the small one that is trained on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pagoda.errors import ConfigError
from pagoda.text.tokenizer import SMALLEST_VOCABULARY
from pagoda.training import LoopConfig, OptimizerConfig

TWO_TOWER = "two-tower"
"""Name of the encoder that a run trains on its own captions."""
TEACHERS = "teacher"
"""Name of the encoder that a teacher from elsewhere was trained with, in the pipeline's folder that it lies in."""


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """The small encoder of images and captions, trained by InfoNCE.

    Raises:
        ConfigError: a field out of range, or heads that do not divide the width.
    """

    vision: Literal["vit", "convnext"] = "vit"
    """Image tower: a small vision transformer (a CLIP of transformers), or a small ConvNeXt beside a BERT."""
    image_size: int = 32
    """Side that images are resized to, in pixels."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    width: int = 128
    """Width of both towers (a ConvNeXt ends at this width)."""
    depth: int = 3
    """Blocks of each tower."""
    heads: int = 4
    """Attention heads."""
    dim: int = 128
    """Length of the vectors in the common space."""
    vocab_size: int = 2000
    """Tokens of the tokeniser at most."""
    max_tokens: int = 32
    """Longer captions are cut here."""
    dropout: float = 0.1
    """Of attention in a CLIP; of all layers in a BERT."""
    augment: tuple[str, ...] = ("translation", "cutout")
    """What is done to images while training; "colour" would take colour words their meaning."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1500, batch_size=128, log_every=20, preview_every=0)
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup_steps=100)
    ema: float = 0.99
    """Decay of the average of the weights, per step."""

    def __post_init__(self) -> None:
        if self.vision not in ("vit", "convnext"):
            raise ConfigError(f"two_tower.vision must be vit or convnext, got {self.vision!r}.")
        for name in ("image_size", "patch_size", "width", "depth", "heads", "dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"two_tower.{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ConfigError(f"two_tower.heads={self.heads} does not divide the width {self.width}.")
        if self.image_size % self.patch_size:
            raise ConfigError(f"two_tower.patch_size={self.patch_size} does not divide image_size={self.image_size}.")
        if self.vision == "convnext" and (self.image_size // self.patch_size < 2 or self.width % 2):
            raise ConfigError("a convnext needs at least 2 x 2 patches and an even width.")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(f"two_tower.vocab_size must be at least {SMALLEST_VOCABULARY}, got {self.vocab_size}.")
        if self.max_tokens < 3:
            raise ConfigError(f"two_tower.max_tokens must be at least 3, got {self.max_tokens}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"two_tower.dropout must lie in [0, 1), got {self.dropout}.")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How captions are read, in a run with `condition: text`."""

    encoder: str = TWO_TOWER
    """A folder in the Hugging Face layout, a hub name, `two-tower`: trained on the run's own captions first, or `teacher`: that of the
    pipeline that the teacher is brought from."""
    max_tokens: int = 64
    """Captions are cut here, or at the encoder's own limit where that is lower."""
    allow_download: bool = False
    """Fetch an encoder that is not in the hub's cache."""
    two_tower: TwoTowerConfig = TwoTowerConfig()

    def __post_init__(self) -> None:
        if not self.encoder:
            raise ConfigError("text.encoder is empty; give a folder, a hub name, two-tower, or teacher.")
        if self.encoder == TEACHERS and (self.max_tokens != TextConfig.max_tokens or self.allow_download):
            raise ConfigError(
                "text.encoder=teacher reads texts of the length that the teacher was trained with, from its own folder; leave "
                "text.max_tokens and text.allow_download out."
            )
        if self.encoder != TWO_TOWER and self.two_tower != TwoTowerConfig():
            raise ConfigError(
                f"settings of text.two_tower are not used with text.encoder={self.encoder}; leave them out."
            )
        if self.max_tokens < 2:
            raise ConfigError(f"text.max_tokens must be at least 2, got {self.max_tokens}.")
