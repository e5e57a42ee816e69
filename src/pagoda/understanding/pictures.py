"""Pictures of what was read: the heat map of a search, curves of rank, images moved along directions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.errors import import_extra
from pagoda.files import atomic_path
from pagoda.images import METADATA_KEY
from pagoda.understanding.search import SearchResult
from pagoda.version import __version__


def draw_heat_map(result: SearchResult, path: Path | str, *, title: str = "") -> None:
    """Accuracy over part (rows) and noise level (columns) as a PNG; the best place has a frame.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = _pyplot()
    rows, columns = result.accuracy.shape
    figure, axes = plt.subplots(figsize=(1.6 + 0.75 * columns, 1.2 + 0.42 * rows), layout="constrained")
    shown = axes.imshow(100 * result.accuracy.numpy(), cmap="viridis", aspect="auto")
    axes.set_xticks(range(columns), [f"{sigma:.3g}" for sigma in result.sigmas])
    axes.set_yticks(range(rows), result.taps)
    axes.set_xlabel("noise level sigma")
    middle = 100 * float(result.accuracy.min() + result.accuracy.max()) / 2
    for i in range(rows):
        for j in range(columns):
            value = 100 * float(result.accuracy[i, j])
            colour = "white" if value < middle else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    tap, sigma = result.best
    corner = (result.sigmas.index(sigma) - 0.5, result.taps.index(tap) - 0.5)
    axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set_title(title or f"accuracy of a {result.head} head, % of {result.held_out} held-out images", fontsize=10)
    figure.colorbar(shown)
    _save(figure, path)


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path | str,
    *,
    x: str,
    y: str,
    log_x: bool = False,
    title: str = "",
    mark: float | None = None,
) -> None:
    """Lines by name as a PNG; a dotted line at x = `mark`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for name, (xs, ys) in curves.items():
        axes.plot(xs, ys, marker="o", markersize=3, label=name)
    if log_x:
        axes.set_xscale("log")
    if mark is not None:
        axes.axvline(mark, linestyle=":", color="grey")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    _save(figure, path)


def _pyplot() -> Any:
    """matplotlib's plotting interface, drawing to files only."""
    import_extra("matplotlib", "pictures").use("Agg")
    return import_extra("matplotlib.pyplot", "pictures")


def _save(figure: Any, path: Path | str) -> None:
    with atomic_path(path) as part:
        facts = json.dumps({"version": __version__, "kind": "chart"})
        figure.savefig(part, format="png", dpi=110, metadata={METADATA_KEY: facts})
    _pyplot().close(figure)
