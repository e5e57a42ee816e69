"""Pictures with captions: everything in its place, and nothing outside of its cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageFont

from pagoda.errors import ShapeError
from pagoda.text import draw_captions
from pagoda.text.pictures import FONT_SIZE, LINES, wrap


def test_every_image_is_there_with_ink_under_it_and_only_there() -> None:
    colours = torch.tensor([-1.0, 0.0, 0.5])
    images = colours[:, None, None, None].expand(3, 1, 32, 32)
    sheet = np.asarray(draw_captions(images, ["first", "", "a third one"], columns=2).convert("L"))
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    for index, colour in enumerate(colours):
        cell = sheet[index // 2 * height :, index % 2 * width :][:height, :width]
        assert (cell[4:100, 4:100] == round((float(colour) + 1) * 127.5)).all()
        assert (cell[102:] < 128).any() == (index != 1)  # letters, where there is a caption
    assert (sheet[height:, width:] == 255).all()


def test_long_captions_are_wrapped_and_end_in_an_ellipsis_inside_of_the_width() -> None:
    font = ImageFont.load_default(FONT_SIZE)
    for text in ("word " * 40, "x" * 300, "a supercalifragilisticexpialidocious word " * 5):
        lines = wrap(text, font, 96)
        assert len(lines) <= LINES
        assert lines[-1].endswith("…")
        assert all(font.getlength(line) <= 96 for line in lines)
    assert wrap("two words", font, 96) == ["two words"]
    assert wrap("", font, 96) == []


def test_there_is_one_caption_an_image() -> None:
    with pytest.raises(ShapeError, match="2 images have 1 captions"):
        draw_captions(torch.zeros(2, 3, 8, 8), ["one"])
