"""Settings of the tiny encoders."""

from __future__ import annotations

from typing import Any

from pagoda.text import TwoTowerConfig
from pagoda.training import LoopConfig

WORDS = ["a red heart", "a blue star", "a small dog", "two small dogs", "a green tree in the rain"]
TINY_TOWERS: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "dim": 24,
    "vocab_size": 400,
    "loop": LoopConfig(steps=4, batch_size=16, checkpoint_every=2, log_every=2, preview_every=0),
}


def tiny_towers(**changes: Any) -> TwoTowerConfig:
    """Two towers that train in a second."""
    return TwoTowerConfig(**{**TINY_TOWERS, **changes})
