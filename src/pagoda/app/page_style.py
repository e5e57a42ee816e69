"""How the page looks: the report's style sheet inside of the app's own frame, and the picture that shows before any script runs."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from PIL import Image

from pagoda.app.painting import SCRIPT
from pagoda.evaluation.page import data_uri, style_sheet

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
"""Fonts of the reader's own system; none is fetched."""

_OWN = """
gradio-app>.gradio-container{width:100%!important;max-width:76rem!important;margin-inline:auto!important}
.pagoda td,.pagoda th,.pagoda tr,.prose td,.prose th,.prose tr{border-color:var(--rule)!important}
.pagoda td,.pagoda th{border-inline:0!important;border-top:0!important}
.prose table{display:block;overflow-x:auto}
.gallery-pick .grid-wrap{height:auto!important;max-height:none!important;min-height:0!important;padding-top:2rem!important}
footer{display:none!important}
.pagoda{color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.pagoda .shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--shot,7.5rem)),1fr));gap:.7rem}
.pagoda .shots figure{margin:0}
.pagoda .shots figcaption{text-align:center;font-size:.82rem;overflow-wrap:anywhere}
.pagoda .octaves{display:flex;gap:.5rem;align-items:end}.pagoda .octaves>span{flex:1;min-width:0}
.pagoda .octaves small{display:block;text-align:center;color:var(--quiet)}
.pagoda .octaves img{width:100%}
.pagoda .one{max-width:26rem;margin:0 auto}
.pagoda .told{color:var(--quiet);min-height:1.6rem;margin:0}
.pagoda .told.bad{color:var(--accent);font-weight:600}
.pagoda progress{width:100%;accent-color:var(--accent);height:.7rem}
.pagoda .bar-row{display:grid;grid-template-columns:minmax(5rem,12rem) 1fr 4rem;gap:.6rem;align-items:center;margin:.15rem 0}
.pagoda .bar-row i{display:block;height:.75rem;border-radius:.2rem;background:var(--s0)}
.pagoda .bar-row span{overflow-wrap:anywhere;font-size:.9rem}
.pagoda .warning{border-left:4px solid var(--accent);padding:.3rem .8rem;margin:.5rem 0}
.pagoda-title{display:flex;gap:.8rem;align-items:baseline;flex-wrap:wrap}
.pagoda-title h1{font-size:1.6rem;white-space:nowrap;overflow-wrap:normal}
.gallery-pick .grid-container{grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr))!important}
#first-picture{max-width:76rem;margin:0 auto;padding:1.2rem 1rem;background:var(--paper);box-sizing:border-box;width:100%}
body:has(.pagoda-ready) #first-picture{display:none}
body{background:var(--paper)}
:focus-visible{outline:3px solid var(--accent)!important;outline-offset:2px}
.gallery-pick img{image-rendering:pixelated}
.pagoda .easel{position:relative;max-width:34rem;margin:0 auto;touch-action:none}
.pagoda .easel img{display:block;width:100%;height:auto;image-rendering:pixelated}
.pagoda .easel canvas{position:absolute;inset:0;width:100%;height:100%;opacity:.65;cursor:crosshair;touch-action:none}
.pagoda button.unpaint{font:inherit;color:var(--accent);background:none;border:1px solid currentColor;border-radius:.35rem;
 padding:.15rem .7rem;cursor:pointer}
@media(max-width:34rem){.pagoda-title>:first-child{display:none}.gradio-container{padding-inline:.5rem!important}.pagoda{font-size:15px}}
@media(prefers-reduced-motion:reduce){*{transition:none!important;animation:none!important;scroll-behavior:auto!important}}
"""


def app_style() -> str:
    """The style sheet of the app: the report's variables, its rules inside of `.pagoda` only, and the app's own."""
    sheet = style_sheet()
    variables, _, rules = sheet.partition("*{box-sizing:border-box}")
    # Elements of the page as a whole are Gradio's here.
    rules = re.sub(r"(?:html|body|main|header|footer|main,header,footer)\{[^}]*\}", "", rules)
    return f"{variables}.pagoda{{*{{box-sizing:border-box}}{rules}}}{_OWN}"


def first_picture(title: str, image: Image.Image | None) -> str:
    """What is there at once, before Gradio's scripts have built the page; hidden when they have."""
    shown = ""
    if image is not None:
        shown = (
            f'<figure><img alt="first images of {html.escape(title)}" src="{data_uri(image)}" '
            f'width="{image.width}" height="{image.height}"></figure>'
        )
    return (
        f'<div id="first-picture" class="pagoda"><h1>{html.escape(title)}</h1>{shown}'
        '<p class="told">The controls are being loaded.</p></div>'
    )


def rewrite_page(page: str, *, style: str, first: str) -> str:
    """Gradio's page with our style, the painter's script and the first picture in it, and without the addresses of others in its head."""
    page = re.sub(r'<meta\s+(?:property="og:|name="twitter:|itemprop=)[^>]*>', "", page)
    page = page.replace("</head>", f"<style>{style}</style><script>{SCRIPT}</script></head>", 1)
    return re.sub(r"(<body[^>]*>)", lambda match: match.group(1) + first, page, count=1)


def told(text: str, *, bad: bool = False) -> str:
    """A line that says how things stand; screen readers read it out when it changes."""
    return f'<div class="pagoda"><p class="told{" bad" if bad else ""}" role="status" aria-live="polite">{html.escape(text)}</p></div>'


def progress_line(text: str, done: int, total: int) -> str:
    """`told` with a bar."""
    return (
        f'<div class="pagoda"><p class="told" role="status" aria-live="polite">{html.escape(text)}</p>'
        f'<progress value="{done}" max="{max(1, total)}">{done} of {total}</progress></div>'
    )


def shots(items: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], *, width: str = "7.5rem") -> str:
    """Pictures in a grid: (caption, [(what it is, picture)]) of each; several pictures of one stand side by side.

    Args:
        items: What to show; captions are text.
        width: Of one item at least, as CSS has it.
    """
    figures = []
    for caption, pictures in items:
        if len(pictures) == 1:
            inner = _image(f"{caption}, {pictures[0][0]}", pictures[0][1])
        else:
            inner = '<span class="octaves">' + "".join(
                f"<span>{_image(f'{caption}, {what}', image)}<small>{html.escape(what)}</small></span>"
                for what, image in pictures
            )
            inner += "</span>"
        figures.append(f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="pagoda"><div class="shots" style="--shot:{width}">{"".join(figures)}</div></div>'


def one(caption: str, image: Image.Image) -> str:
    """A single large picture."""
    return (
        f'<div class="pagoda"><figure class="one">{_image(caption, image)}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure></div>"
    )


def _image(what: str, image: Image.Image) -> str:
    return f'<img alt="{html.escape(what)}" src="{data_uri(image)}" width="{image.width}" height="{image.height}">'


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Counts by name as bars."""
    top = max((count for _, count in rows), default=1) or 1
    lines = [
        f'<div class="bar-row"><span>{html.escape(name)}</span><i style="width:{100 * count / top:.1f}%"></i><b>{count:,}</b></div>'
        for name, count in rows
    ]
    return "".join(lines)
