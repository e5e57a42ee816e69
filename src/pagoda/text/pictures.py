"""Pictures with their captions written under them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pagoda.errors import ShapeError
from pagoda.images import to_pil

FONT_SIZE = 11
"""Height of the letters in pixels."""
LINES = 3
"""Lines of a caption at most; what does not fit ends in an ellipsis."""
_LINE_HEIGHT, _MARGIN, _NARROWEST = 13, 4, 96


def draw_captions(images: Tensor, captions: Sequence[str], *, columns: int | None = None) -> Image.Image:
    """A grid of images (B, C, S, S) in [-1, 1], enlarged to at least 96 px, each with its caption under it, on white.

    Args:
        columns: Images a row; about as many as rows when None.

    Raises:
        ShapeError: not one caption an image, or no image.
    """
    if len(images) != len(captions) or not captions:
        raise ShapeError(f"{len(images)} images have {len(captions)} captions; give one for each, and at least one.")
    scale = math.ceil(_NARROWEST / images.shape[-1])
    tiles = [image.convert("RGB").resize((image.width * scale, image.height * scale), 0) for image in to_pil(images)]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    width, height = tiles[0].width + 2 * _MARGIN, tiles[0].height + 2 * _MARGIN + LINES * _LINE_HEIGHT
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = index % columns * width + _MARGIN, index // columns * height + _MARGIN
        sheet.paste(tile, (left, top))
        for number, line in enumerate(wrap(caption, font, tile.width)):
            pen.text((left, top + tile.height + 2 + number * _LINE_HEIGHT), line, fill="black", font=font)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A text in at most `LINES` lines of `width` pixels; words that are too long are cut, and so is the last line."""
    lines: list[str] = []
    rest = text.split()
    while rest and len(lines) < LINES:
        line = rest.pop(0)
        while rest and font.getlength(f"{line} {rest[0]}") <= width:
            line = f"{line} {rest.pop(0)}"
        last = len(lines) == LINES - 1 and bool(rest)
        if last or font.getlength(line) > width:
            while line and font.getlength(f"{line}…") > width:
                line = line[:-1]
            line += "…"
        lines.append(line)
    return lines
