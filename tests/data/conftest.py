"""Small folders of images to read and to break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_picture(seed: int, size: int = 12, channels: int = 3) -> Image.Image:
    """Random pixels; PNG keeps them exactly."""
    shape = (size, size) if channels == 1 else (size, size, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A maker of images of random pixels: `picture(seed, size=12, channels=3)`."""
    return make_picture


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Two class folders, `cats` with 3 and `dogs` with 2 images of 12x12."""
    folder = tmp_path / "animals"
    for seed, name in enumerate(["cats/a.png", "cats/b.png", "cats/c.png", "dogs/a.png", "dogs/b.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(seed).save(folder / name)
    return folder
