"""Charts: what they draw is what they were given, inside of their frame, as well-formed XML; colours that everybody tells apart."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from pagoda.evaluation import charts, page
from pagoda.evaluation.charts import Line, histogram, legend, line_chart, short, strip

RAMP = [(float(x), 0.5 + x * x) for x in range(12)]


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def path(svg: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'<path class="{kind} s0" d="M([^"]+)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split() for pair in found.group(1).split("L"))]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_inside_the_frame_in_their_order(log: bool) -> None:
    svg = line_chart([Line("a", RAMP)], label="a", x_label="step", log=log)
    parse(svg)
    points = path(svg, "line")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert len(points) == 12
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)  # up is more
    assert min(xs) >= 0
    assert max(xs) <= charts.WIDTH
    assert min(ys) >= 0
    assert max(ys) <= charts.HEIGHT


def test_equal_steps_of_an_exponential_are_equal_on_a_logarithmic_axis() -> None:
    svg = line_chart([Line("a", [(x, 10.0**x) for x in range(5)])], label="a", x_label="x", log=True)
    ys = [y for _, y in path(svg, "line")]
    assert [a - b for a, b in itertools.pairwise(ys)] == pytest.approx([ys[0] - ys[1]] * 4, abs=0.2)


def test_values_that_are_not_finite_or_not_positive_are_left_out() -> None:
    bad = [(0.0, math.nan), (1.0, math.inf), (2.0, 0.0), (3.0, 1.0), (4.0, 2.0)]
    assert len(path(line_chart([Line("a", bad)], label="a", x_label="x", log=True), "line")) == 2
    assert "Nothing was logged" in line_chart([Line("a", bad[:3])], label="a", x_label="x", log=True)


def test_one_value_is_a_dot_and_constant_values_are_a_line() -> None:
    assert 'class="dot s0"' in line_chart([Line("a", [(1.0, 3.0)])], label="a", x_label="x")
    ys = [y for _, y in path(line_chart([Line("a", [(0, 3.0), (1, 3.0)])], label="a", x_label="x"), "line")]
    assert ys[0] == ys[1]


def test_names_are_escaped() -> None:
    svg = line_chart([Line("<b>&", RAMP)], label='"<', x_label="<x>")
    parse(svg)
    parse(f"<div>{legend([Line('<b>&', RAMP)])}</div>")


def test_thinning_keeps_means_and_smoothing_keeps_straight_lines() -> None:
    many = [(float(x), 2.0 * x + 1) for x in range(40 * charts.MAX_POINTS)]
    thin = charts._thin(many)
    assert len(thin) == charts.MAX_POINTS
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in many) / len(many), rel=1e-3)
    assert charts._running_mean(thin) == [(x, pytest.approx(y)) for x, y in thin]  # nothing is delayed


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-5, 3e-5), (990, 1010), (0, 2000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = charts._ticks(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_numbers_are_short() -> None:
    told = [short(v) for v in (0, 3, 0.123456, 12.345, 1234, 56789, 2.5e6, 0.00012, -4.5)]
    assert told == ["0", "3", "0.123", "12.3", "1234", "56.8k", "2.5M", "1.2e-04", "-4.5"]


def test_a_strip_shows_value_interval_and_floor_in_proportion() -> None:
    root = parse(strip(5.0, 2.5, 4.0, 6.0, top=10.0))
    dot = next(e for e in root if e.tag == "circle")
    mark = next(e for e in root if e.get("class") == "mark")
    assert float(str(dot.get("cx"))) == pytest.approx(80)
    assert str(mark.get("d")).startswith("M43.0 ")
    assert "real against real" in str(root.get("aria-label"))
    parse(strip(5.0, None, None, None, top=10.0))


def test_a_histogram_has_bars_of_the_given_heights() -> None:
    root = parse(histogram([1.0, 2.0], [0.0, 1.0, 2.0], [(0.0, 1.0), (2.0, 1.0)], label="h"))
    heights = [float(str(e.get("height"))) for e in root if e.tag == "rect"]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


def linear(colour: str) -> Tensor:
    channels = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


def lab(rgb: Tensor) -> Tensor:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = torch.tensor(to_xyz, dtype=torch.float64) @ rgb.clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089]).double()
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("sight", list(SIGHT))
def test_the_first_three_colours_tell_apart_for_every_kind_of_sight(mode: str, sight: str) -> None:
    matrix = torch.tensor(SIGHT[sight], dtype=torch.float64)
    seen = [lab(matrix @ linear(colour)) for colour in page._PALETTE[mode][:3]]
    assert all(float((a - b).norm()) > 20 for a, b in itertools.combinations(seen, 2))


def test_lines_differ_in_dash_too() -> None:
    assert len(set(page._DASHES)) == len(page._DASHES) == len(page._PALETTE["light"])


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "quiet", "accent"])
@pytest.mark.parametrize("paper", ["paper", "card"])
def test_text_has_the_contrast_that_wcag_asks_for(mode: str, ink: str, paper: str) -> None:
    low, high = sorted(luminance(page._INK[mode][name]) for name in (ink, paper))
    assert (high + 0.05) / (low + 0.05) >= 4.5
