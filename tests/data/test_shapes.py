"""The drawn set: a pure function of (seed, index)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pagoda.data import ShapesSource
from pagoda.data.shapes import COLOURS, draw_shape
from pagoda.errors import ConfigError


def pixels(source: ShapesSource, index: int) -> np.ndarray:
    return np.asarray(source.image(index))


def test_an_image_depends_on_seed_and_index_only() -> None:
    few, many = ShapesSource(count=20, seed=3), ShapesSource(count=500, seed=3)
    for index in (19, 0, 7):  # another order than above
        assert (pixels(few, index) == pixels(many, index)).all()
        assert few.factors(index) == many.factors(index)
    assert any((pixels(few, i) != pixels(ShapesSource(seed=4), i)).any() for i in range(3))


def test_another_size_shows_the_same_scene() -> None:
    small, large = ShapesSource(size=32), ShapesSource(size=128)
    for index in range(20):
        reduced = pixels(large, index).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert abs(reduced - pixels(small, index)).mean() < 1.5
        assert small.caption(index) == large.caption(index)


def test_labels_are_balanced_and_name_the_shape() -> None:
    source = ShapesSource(count=200)
    counts = Counter(source.label(i) for i in range(200))
    assert counts == dict.fromkeys(range(10), 20)
    names = source.class_names
    assert names is not None
    for i in range(200):
        assert source.factors(i).shape == names[source.label(i)]
        assert source.factors(i).shape in source.caption(i)


def test_factors_cover_their_ranges_and_shapes_stay_inside() -> None:
    factors = [ShapesSource(count=600).factors(i) for i in range(600)]
    assert {f.colour for f in factors} == set(COLOURS)
    assert len({f.place for f in factors}) == 9
    assert all(0.33 <= f.scale <= 0.43 and abs(f.rotation) <= 20 for f in factors)
    assert all(f.scale <= f.x <= 1 - f.scale and f.scale <= f.y <= 1 - f.scale for f in factors)
    assert max(f.rotation for f in factors) > 18 > -18 > min(f.rotation for f in factors)


def test_the_drawn_shape_has_its_colour_place_and_scale() -> None:
    source = ShapesSource(count=10, size=64)
    circle = source.factors(0)
    picture = draw_shape(circle, 64).astype(float) / 255
    inside = np.abs(picture - np.minimum(circle.rgb, 1)).max(-1) < 0.01
    y, x = (np.argwhere(inside).mean(0) + 0.5) / 64
    assert abs(x - circle.x) < 0.01
    assert abs(y - circle.y) < 0.01
    assert abs(inside.mean() - np.pi * (0.9 * circle.scale) ** 2) < 0.03  # edge pixels are mixed


def test_classes_are_told_apart_at_eight_pixels_by_their_outline() -> None:
    # Nearest class mean of the outline, drawn straight at the centre: every class must be nearest to itself by a margin.
    source = ShapesSource(count=10)
    straight = [
        draw_shape(
            type(f)(
                **{**vars(f), "rgb": (1, 1, 1), "background_rgb": (0, 0, 0), "gradient": (0, 0)}
                | {"x": 0.5, "y": 0.5, "scale": 0.38, "rotation": 0.0}
            ),
            8,
        )[:, :, 0]
        / 255
        for f in map(source.factors, range(10))
    ]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(straight) for b in straight[:i]]
    assert min(gaps) > 0.04


def test_arguments_and_indices_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
        ShapesSource(count=0)
    with pytest.raises(ConfigError, match="seed"):
        ShapesSource(seed=-1)
    with pytest.raises(IndexError, match="10"):
        ShapesSource(count=10).image(10)
