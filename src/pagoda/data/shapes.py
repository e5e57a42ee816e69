"""An endless, tiny data set that needs no download: coloured shapes, drawn from their factors.

Each image is a scene in continuous coordinates (a signed distance function in the unit square), so it exists at every
size, and image `i` depends on (seed, i) alone. Ten classes were chosen to be told apart at 8 pixels; rotation stays
within 20 degrees so that none turns into another.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from pagoda.data.protocol import SourceConfig
from pagoda.errors import ConfigError
from pagoda.files import hash_json

_DRAWING_VERSION = 2  # Raise it when a change here moves a single pixel.

COLOURS: dict[str, tuple[float, float]] = {  # name: (hue in degrees, value)
    "red": (0, 0.86),
    "orange": (28, 0.95),
    "yellow": (52, 0.92),
    "green": (125, 0.65),
    "cyan": (182, 0.78),
    "blue": (224, 0.88),
    "purple": (276, 0.72),
    "pink": (325, 0.95),
}
"""Colours of the shapes, evenly likely."""

_Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.9


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.78, 0.78)


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Exact signed distance to a closed polygon; the sign by the even-odd rule."""
    nearest = np.full(x.shape, np.inf, dtype=x.dtype)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, dx, dy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (dx - ex * along) ** 2 + (dy - ey * along) ** 2)
        if ay != by:  # a level edge is never crossed by a level ray
            inside ^= ((ay > y) != (by > y)) & (dx < ex * dy / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y, [(0.0, -1.0), (0.98, 0.75), (-0.98, 0.75)])


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radii = [1.08, 0.42] * 5
    angles = [math.pi * k / 5 for k in range(10)]
    return _polygon(x, y, [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)])


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.74) - 0.22


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = 0.58  # half side of a square on its corner; a circle of that radius sits on each upper edge
    y = y - 0.09
    lobe = side / math.sqrt(2)
    square = (np.abs(x) + np.abs(y)) / math.sqrt(2) - side
    lobes = np.sqrt((np.abs(x) - lobe) ** 2 + (y + lobe) ** 2) - side
    return np.minimum(square, lobes)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    bite = np.sqrt((x - 0.45) ** 2 + (y + 0.1) ** 2) - 0.76
    return np.maximum(np.sqrt(x * x + y * y) - 0.96, -bite)


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 1.0, 0.3)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(y) - 0.88, (np.abs(x) - 0.9 * np.abs(y) - 0.05) / math.hypot(1, 0.9))


_SHAPES: dict[str, _Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
    "bar": _bar,
    "hourglass": _hourglass,
}


@dataclass(frozen=True, kw_only=True)
class ShapeFactors:
    """All that one image is made of. Lengths are fractions of the image's side, y grows downwards."""

    shape: str
    colour: str
    """Name of the colour; `rgb` is the exact one."""
    rgb: tuple[float, float, float]
    """Colour of the shape, each in [0, 1]."""
    background_rgb: tuple[float, float, float]
    """Colour of the background at the centre, each in [0, 1]."""
    gradient: tuple[float, float]
    """Brightness that the background gains from left to right and from top to bottom, in [-0.06, 0.06]."""
    x: float
    y: float
    """Centre of the shape."""
    scale: float
    """Radius of the shape, in [0.33, 0.43]."""
    rotation: float
    """Degrees, clockwise, in [-20, 20]."""

    @property
    def place(self) -> str:
        """Where the centre lies, in words: "in the centre", "at the top left", ..."""
        vertical = "top" if self.y < 0.45 else "bottom" if self.y > 0.55 else ""
        horizontal = "left" if self.x < 0.45 else "right" if self.x > 0.55 else ""
        words = " ".join(word for word in (vertical, horizontal) if word)
        return f"at the {words}" if words else "in the centre"

    @property
    def caption(self) -> str:
        """One sentence, such as "a red circle at the top left"."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} {self.place}"


class ShapesSource:
    """`count` drawn images at `size` pixels; label `i % 10`, caption from the factors, RGB.

    Image `i` depends on `seed` and `i` only, neither on `count` nor on what was drawn before, and at another `size` it
    is the same scene.

    Args:
        count: Number of images, at least 1.
        size: Side in pixels, at least 4.
        seed: A whole number from 0; another seed is another set.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, count: int = 6000, size: int = 32, seed: int = 0) -> None:
        for name, value, least in (("count", count, 1), ("size", size, 4), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"shapes: {name} must be at least {least}, got {value}.")
        self.count, self.size, self.seed = count, size, seed
        self.options = SourceConfig()
        self.class_names: list[str] | None = list(_SHAPES)

    def __len__(self) -> int:
        return self.count

    def factors(self, index: int) -> ShapeFactors:
        """What image `index` is made of.

        Raises:
            IndexError: `index` is not in [0, len).
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is outside of the {self.count} images, 0 to {self.count - 1}.")
        draw = np.random.default_rng([self.seed, index])
        colour = list(COLOURS)[int(draw.integers(len(COLOURS)))]
        hue, value = COLOURS[colour]
        hue, saturation = (hue + draw.uniform(-7, 7)) % 360, draw.uniform(0.78, 1.0)
        level = draw.uniform(0.84, 0.95)
        tint = draw.uniform(-0.025, 0.025, 3)
        gradient = draw.uniform(-0.06, 0.06, 2)
        scale = float(draw.uniform(0.33, 0.43))
        room = 0.47 - scale  # keeps the shape inside, its corners just at the border when rotated
        x, y = 0.5 + draw.uniform(-room, room, 2)
        return ShapeFactors(
            shape=list(_SHAPES)[index % len(_SHAPES)],
            colour=colour,
            rgb=colorsys.hsv_to_rgb(hue / 360, saturation, value * draw.uniform(0.92, 1.05)),
            background_rgb=(float(level + tint[0]), float(level + tint[1]), float(level + tint[2])),
            gradient=(float(gradient[0]), float(gradient[1])),
            x=float(x),
            y=float(y),
            scale=scale,
            rotation=float(draw.uniform(-20, 20)),
        )

    def image(self, index: int) -> Image.Image:
        """The drawn image, RGB, `size` pixels a side."""
        return Image.fromarray(draw_shape(self.factors(index), self.size))

    def label(self, index: int) -> int:
        """`index % 10`."""
        return index % len(_SHAPES)

    def caption(self, index: int) -> str:
        """The sentence of the factors."""
        return self.factors(index).caption

    def sample_id(self, index: int) -> str:
        """Such as `shapes-0-000123`: seed and index."""
        return f"shapes-{self.seed}-{index:06d}"

    def metadata(self, index: int) -> dict[str, Any]:
        """The factors by name."""
        return asdict(self.factors(index))

    @property
    def num_classes(self) -> int:
        """10."""
        return len(_SHAPES)

    @property
    def channels(self) -> int:
        """3."""
        return 3

    @property
    def fingerprint(self) -> str:
        """Hash of the arguments and of the drawing's version."""
        return hash_json(["shapes", _DRAWING_VERSION, self.count, self.size, self.seed])


def draw_shape(factors: ShapeFactors, size: int) -> np.ndarray:
    """The scene of `factors` at `size` pixels a side: uint8 (size, size, 3).

    A pixel's share of the shape is its signed distance to the edge, measured at its centre in pixels and clipped to one
    pixel; this is the area that it covers for every straight, axis-aligned edge, and near it for others.
    """
    u, v = _pixel_centres(size)
    turn = math.radians(factors.rotation)
    cos, sin = math.cos(turn) / factors.scale, math.sin(turn) / factors.scale
    du, dv = u - factors.x, v - factors.y
    distance = _SHAPES[factors.shape](cos * du + sin * dv, cos * dv - sin * du)
    coverage = np.clip(0.5 - distance * (factors.scale * size), 0, 1)[:, :, None]
    slope = factors.gradient[0] * (u - 0.5) + factors.gradient[1] * (v - 0.5)
    background = np.asarray(factors.background_rgb) + slope[:, :, None]
    picture = background + coverage * (np.minimum(factors.rgb, 1.0) - background)
    return np.floor(np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel's centre in the unit square, both (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return x, y
