"""`report.html`: one static file that shows a run, with its pictures inside and nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from pagoda.files import write_text_atomic
from pagoda.stages.config import RunConfig, to_yaml
from pagoda.stages.run_folder import RunFolder
from pagoda.version import __version__

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
img{max-width:100%;image-rendering:pixelated;border:1px solid #ccc}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f4f4f4;padding:1rem;overflow:auto;font-size:13px}
@media(prefers-color-scheme:dark){body{background:#151515;color:#e8e8e8}pre{background:#222}td,th{border-color:#444}}
"""


def write_report(run: RunFolder, config: RunConfig, stages: list[str]) -> Path:
    """Write the report of a run as far as it has come; returns its path.

    Args:
        stages: Names of all stages of the run, in order.
    """
    rows = []
    for stage in stages:
        facts = run.record(stage)
        results = facts.get("results", {}) if facts else {}
        state = "not started" if facts is None else "done" if facts["done"] else "under way"
        minutes = f"{results['seconds'] / 60:.1f}" if "seconds" in results else ""
        found = ", ".join(f"{name} {value:.3g}" for name, value in results.items() if _worth_telling(name, value))
        rows.append(f"<tr><td>{stage}</td><td>{state}</td><td class=n>{minutes}</td><td>{html.escape(found)}</td></tr>")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>pagoda: {html.escape(run.path.name)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(run.path.name)}</h1>",
        f"<p>{html.escape(Path(config.data).name)}: {config.base} px diffusion model, one-step generator of {config.size} px.</p>",
        "<table><tr><th>stage<th>state<th>minutes<th>found</tr>",
        *rows,
        "</table>",
    ]
    for path in sorted((run.path / "samples").glob("final-*.png")):
        parts += [f"<h2>One-step samples, {path.stem.removeprefix('final-')} px</h2>", _picture(path)]
    octaves = run.path / "samples" / "octaves.png"
    if octaves.is_file():
        parts += ["<h2>The same seeds at every size</h2>", _picture(octaves)]
    for stage in stages:
        grids = sorted(run.samples(stage).glob("ema-*.png"))
        if grids:
            parts += [f"<h2>{stage}: first and last grid of the averaged weights</h2>", _picture(grids[0])]
            parts += [_picture(grids[-1])] if len(grids) > 1 else []
    command = f"pagoda grow {run.path}"
    parts += [
        f"<h2>Continue</h2><pre>{html.escape(command)}</pre>",
        f"<h2>Configuration</h2><pre>{html.escape(to_yaml(config))}</pre><p>pagoda {__version__}</p></html>",
    ]
    target = run.path / "report.html"
    write_text_atomic(target, "\n".join(parts))
    return target


def _worth_telling(name: str, value: object) -> bool:
    return name != "seconds" and isinstance(value, int | float)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(path.stem)}' src='data:image/png;base64,{data}'>"
