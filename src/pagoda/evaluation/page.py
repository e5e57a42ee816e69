"""The page that a report is: one static file with its style sheet and pictures inside, nothing fetched, no script.

Light and dark follow the reader's system, print is always light, and a narrow screen gets one column. The colours are Okabe and Ito's,
which readers with any kind of colour blindness tell apart, darkened for text on white.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

_PALETTE = {
    "light": ("#0067a5", "#c24a00", "#00795a", "#9b4a86", "#7a6200", "#5aa7d6"),
    "dark": ("#62b8ea", "#f08a3c", "#35c295", "#dd8fc4", "#e8cf4a", "#3d7ba3"),
}
_INK = {
    "light": {
        "paper": "#faf8f4",
        "card": "#ffffff",
        "ink": "#1f1d1a",
        "quiet": "#625c52",
        "rule": "#e2dcd1",
        "accent": "#a3341f",
    },
    "dark": {
        "paper": "#131315",
        "card": "#1c1c1f",
        "ink": "#ece8e1",
        "quiet": "#a8a197",
        "rule": "#35343a",
        "accent": "#f0876c",
    },
}

_RULES = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem;display:flex;gap:1.25rem;align-items:center}
header svg{width:3.6rem;height:3.6rem;flex:none}
h1,h2,h3{font-family:ui-serif,Georgia,"Iowan Old Style",serif;font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.7rem,5vw,2.6rem);margin:0;overflow-wrap:anywhere}
h2{font-size:1.5rem;margin:3.2rem 0 .3rem;padding-top:.4rem;border-top:3px double var(--rule)}
h3{font-size:1.05rem;margin:0 0 .4rem}
header p{margin:.25rem 0 0;color:var(--quiet)}
h2+p{margin-top:0;color:var(--quiet);max-width:46rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;margin:1.3rem 0 0;font-size:.92rem}
nav a{text-decoration:none;border-bottom:1px solid transparent}nav a:hover{border-color:currentColor}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.8rem;margin:1.6rem 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:.6rem}
.tile{padding:.75rem .95rem}
.tile b{display:block;font:600 1.45rem/1.25 ui-serif,Georgia,serif;font-variant-numeric:tabular-nums}
.tile span{color:var(--quiet);font-size:.86rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem;margin:1rem 0}
.roomy{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
.card{padding:.95rem 1.05rem;min-width:0}
.card>p:last-child,.card>figure:last-child{margin-bottom:0}
figure{margin:1rem 0}
figure img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:.35rem;background:#fff;border:1px solid var(--rule)}
figcaption{color:var(--quiet);font-size:.88rem;margin-top:.35rem}
.hero{max-width:54rem;margin-inline:auto}
.row{display:grid;grid-template-columns:4.2rem 1fr;align-items:center;gap:.6rem;margin:.35rem 0}
.row span{font-variant-numeric:tabular-nums;color:var(--quiet);font-size:.9rem;text-align:right}
.row img{width:100%;display:block;image-rendering:pixelated;border-radius:.2rem}
.film{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.9rem}
.film figure{margin:0}.film img+img{margin-top:.35rem}
section>h3{margin:1.5rem 0 .5rem}
.half{max-width:36rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.42rem .7rem .42rem 0;border-bottom:1px solid var(--rule);vertical-align:middle}
th{font-weight:600;font-size:.86rem;color:var(--quiet)}
td.n,th.n{text-align:right;white-space:nowrap}
tr:last-child td{border-bottom:0}
.state{white-space:nowrap}
.state::before{content:"";display:inline-block;width:.62rem;height:.62rem;border-radius:50%;margin-right:.45rem;
 border:2px solid var(--quiet)}
.state.done::before{background:var(--s2);border-color:var(--s2)}
.state.under::before{background:linear-gradient(90deg,var(--s1) 50%,transparent 50%);border-color:var(--s1)}
pre{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.8rem 1rem;overflow:auto;
 font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;
 white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.7rem 0}summary{cursor:pointer;color:var(--quiet)}
.quiet{color:var(--quiet)}.note{color:var(--quiet);font-size:.88rem;margin:.2rem 0}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.84rem;color:var(--quiet);margin-bottom:.2rem}
.legend svg{width:1.7rem;height:.65rem;margin-right:.4rem;vertical-align:middle}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
td:first-child{white-space:nowrap}td svg.chart{width:13rem}
svg text{font:14px system-ui,sans-serif;fill:var(--quiet);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.line,.faint,.level,.span{fill:none;stroke-linejoin:round;stroke-linecap:round}
.line{stroke-width:2.4}.faint{stroke-width:1.2;opacity:.33;stroke-dasharray:none!important}.level{stroke-width:1.6}
.span{stroke-width:3;opacity:.55;stroke-dasharray:none!important}
.mark{stroke:var(--ink);stroke-width:2}
.hit{fill:transparent}.hit:hover{fill:var(--ink);opacity:.25}
.bar{stroke:none!important;opacity:.75}
footer{color:var(--quiet);font-size:.88rem;padding-block:2.5rem}
@media(max-width:34rem){header{padding-top:1.4rem}main,header,footer{padding-inline:.9rem}.row{grid-template-columns:2.9rem 1fr}
 th,td{padding-right:.45rem}table{font-size:.9rem}td svg.chart{width:6rem}.wide{display:none}svg text{font-size:16px}}
@media print{body{font-size:10.5pt;background:#fff}nav,.hit{display:none}h2{break-after:avoid;margin-top:1.6rem}
 figure,.card,.tile,tr,.row{break-inside:avoid}.card,.tile,pre{border-color:#ccc}main,header,footer{max-width:none;padding:0}
 a{color:inherit;text-decoration:none}details::details-content{content-visibility:visible;height:auto}summary{list-style:none}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
_DASHES = ("none", "8 4", "2.5 4", "11 4 2.5 4", "5 3", "1 3")


def style_sheet() -> str:
    """The style sheet of every page."""

    def variables(mode: str) -> str:
        colours = {**_INK[mode], **{f"s{i}": colour for i, colour in enumerate(_PALETTE[mode])}}
        return ";".join(f"--{name}:{colour}" for name, colour in colours.items())

    series = "".join(
        f".s{i}{{stroke:var(--s{i});stroke-dasharray:{dash}}}.dot.s{i},.bar.s{i}{{fill:var(--s{i});stroke-dasharray:none}}"
        for i, dash in enumerate(_DASHES)
    )
    light, dark = variables("light"), variables("dark")
    modes = f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return modes + _RULES.replace("\n", "") + series


def render_page(title: str, head: str, sections: Sequence[tuple[str, str, str, str]], foot: str) -> str:
    """A whole page.

    Args:
        title: Of the window.
        head: HTML inside of `<header>`.
        sections: (anchor, title, a sentence or nothing, HTML) of each; those without HTML are left out.
        foot: HTML inside of `<footer>`.
    """
    kept = [section for section in sections if section[3]]
    links = "".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name, _, _ in kept if name)
    body = []
    for anchor, name, words, content in kept:
        words = f"<p>{html.escape(words)}</p>" if words else ""
        heading = f"<h2>{html.escape(name)}</h2>{words}" if name else ""
        body.append(f'<section id="{anchor}">{heading}{content}</section>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style_sheet()}</style></head>\n"
        f"<body><header>{head}</header>\n<main><nav>{links}</nav>\n"
        + "\n".join(body)
        + f"</main>\n<footer>{foot}</footer></body></html>\n"
    )


def picture(image: Image.Image, caption: str, *, alt: str | None = None, kind: str = "") -> str:
    """A figure with the picture inside of the page; `caption` is text."""
    return (
        f'<figure class="{kind}"><img alt="{html.escape(alt or caption)}" src="{data_uri(image)}" '
        f'width="{image.width}" height="{image.height}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def film(shots: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> str:
    """Moments side by side: (caption, pictures below each other with what they show) of each."""
    parts = []
    for caption, images in shots:
        shown = "".join(
            f'<img alt="{html.escape(alt)}" src="{data_uri(image)}" width="{image.width}" height="{image.height}">'
            for alt, image in images
        )
        parts.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="film">{"".join(parts)}</div>'


def data_uri(image: Image.Image) -> str:
    """A picture as the text of an address: WebP without loss, which every browser of today reads."""
    buffer = io.BytesIO()
    # Method 2 packs grids as tightly as Pillow's own choice, 4, and takes a third of its time.
    image.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=80, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Key figures: (figure, what it is)."""
    cells = [
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>' for value, what in facts
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def card(title: str, content: str) -> str:
    """A framed part of the page."""
    return f'<div class="card"><h3>{html.escape(title)}</h3>{content}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML. A head that begins with `>` is a column of numbers, one with `~` is dropped on narrow screens."""

    def kind(head: str) -> str:
        classes = [c for mark, c in ((">", "n"), ("~", "wide")) if mark in head[:2]]
        return f' class="{" ".join(classes)}"' if classes else ""

    first = "".join(f"<th{kind(head)}>{html.escape(head.lstrip('>~'))}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td{kind(h)}>{c}</td>" for h, c in zip(heads, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'
