"""Charts as inline SVG: a few hundred numbers as lines, dots or bars, in colours and dashes that a style sheet gives.

Shapes carry the classes `s0` to `s5`; the page's style sheet colours them for light, dark and paper. Lines differ in dash as well as in
colour, so that nobody needs the colour to tell them apart. Points answer to the pointer with their value.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 40
MAX_POINTS = 240
"""Points that a line is thinned to."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: In the legend.
        points: (x, y), x rising; what is not finite is left out.
        style: Which of the six styles.
        flat: A level that others are compared with: thin, without smoothing.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    flat: bool = False


def line_chart(lines: Sequence[Line], *, label: str, x_label: str, log: bool = False) -> str:
    """Lines over a common axis. A line of many points is drawn faint, with its running mean in full strength above it.

    Args:
        label: What a screen reader says.
        x_label: Below the axis.
        log: Logarithmic y axis; values of 0 or below are left out.
    """
    kept = [(line, _finite(line.points, positive=log)) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return '<p class="quiet">Nothing was logged yet.</p>'
    xs = [x for _, points in kept for x, _ in points]
    ys = [_scale(y, log) for _, points in kept for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    pad = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - pad, y_high + pad

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (_scale(y, log) - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high, 4):
        _, y = at(x_low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in _ticks(x_low, x_high, 4):
        x, _ = at(value, kept[0][1][0][1])
        if x_low <= value <= x_high:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{short(value)}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    for line, points in kept:
        thin = _thin(points)
        smooth = _running_mean(thin) if len(thin) > 24 and not line.flat else None
        path = _path([at(x, y) for x, y in thin])
        if len(thin) == 1:
            x, y = at(*thin[0])
            parts.append(f'<circle class="dot s{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        elif smooth is None:
            kind = "level" if line.flat else "line"
            parts.append(f'<path class="{kind} s{line.style}" d="{path}"/>')
        else:
            parts.append(f'<path class="faint s{line.style}" d="{path}"/>')
            parts.append(f'<path class="line s{line.style}" d="{_path([at(x, y) for x, y in smooth])}"/>')
        for x, y in thin[:: max(1, len(thin) // 40)]:
            px, py = at(x, y)
            told = html.escape(f"{line.name}: {short(y)} at {short(x)}")
            parts.append(f'<circle class="hit" cx="{px:.1f}" cy="{py:.1f}" r="7"><title>{told}</title></circle>')
    return _svg(parts, WIDTH, HEIGHT, label)


def legend(lines: Sequence[Line]) -> str:
    """Names beside a piece of each line, as HTML."""
    items = [
        f'<span><svg viewBox="0 0 26 10" aria-hidden="true"><path class="{"level" if line.flat else "line"} s{line.style}" '
        f'd="M1 5H25"/></svg>{html.escape(line.name)}</span>'
        for line in lines
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def strip(value: float, floor: float | None, low: float | None, high: float | None, *, top: float) -> str:
    """A score on a scale from 0 to `top`: a dot with its interval, and a tick at the floor."""
    low, high = (value if low is None else low), (value if high is None else high)
    width = 160

    def at(v: float) -> float:
        return 6 + (width - 12) * min(max(v / top, 0.0), 1.0) if top > 0 else 6.0

    parts = [f'<line class="grid" x1="6" x2="{width - 6}" y1="11" y2="11"/>']
    if floor is not None:
        parts.append(
            f'<path class="mark" d="M{at(floor):.1f} 3V19"><title>real against real {short(floor)}</title></path>'
        )
    parts.append(f'<path class="span s0" d="M{at(low):.1f} 11H{at(high):.1f}"/>')
    parts.append(f'<circle class="dot s0" cx="{at(value):.1f}" cy="11" r="4.5"><title>{short(value)}</title></circle>')
    return _svg(parts, width, 22, f"{short(value)}, real against real {'unknown' if floor is None else short(floor)}")


def histogram(
    counts: Sequence[float], edges: Sequence[float], curve: Sequence[tuple[float, float]], *, label: str
) -> str:
    """Bars (densities) with a curve above them.

    Args:
        counts: Density of each bar.
        edges: One more than `counts`.
        curve: (x, density) of what is expected.
    """
    top = max([*counts, *(y for _, y in curve)]) * 1.08 or 1.0
    low, high = edges[0], edges[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / (high - low)
        return _LEFT / 2 + across * (WIDTH - _LEFT), HEIGHT - _BOTTOM - y / top * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        (x, y), (x_2, base) = at(left, count), at(right, 0)
        parts.append(
            f'<rect class="bar s5" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(x_2 - x - 1, 0.5):.1f}" height="{base - y:.1f}"/>'
        )
    parts.append(f'<path class="line s1" d="{_path([at(x, y) for x, y in curve])}"/>')
    for value in _ticks(low, high, 6):
        x, base = at(value, 0)
        parts.append(f'<text x="{x:.1f}" y="{base + 18:.1f}" text-anchor="middle">{short(value)}</text>')
    return _svg(parts, WIDTH, HEIGHT, label)


def short(value: float) -> str:
    """A number for people: about three digits, thousands as k, millions as M."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "?")
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def _svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def _scale(y: float, log: bool) -> float:
    return math.log10(y) if log else y


def _finite(points: Sequence[tuple[float, float]], *, positive: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not positive)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means over stretches of equal length."""
    if len(points) <= MAX_POINTS:
        return points
    size = len(points) / MAX_POINTS
    groups = [points[round(i * size) : round((i + 1) * size)] for i in range(MAX_POINTS)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups if g]


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a window of about a tenth of the line; the window is cut at the ends, so that nothing is delayed."""
    reach = max(1, len(points) // 20)
    smooth = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = points[i - near : i + near + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within a range."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if k == 0 else float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within a range of exponents; powers alone when that is enough."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [v for v in every if low <= math.log10(v) <= high]
    return [v for v in inside if math.log10(v) == round(math.log10(v))] if len(inside) > 6 else inside
