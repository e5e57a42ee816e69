"""Several views of each image: the image itself, and copies that are a little moved and enlarged or reduced.

Where images are few a generator learns the neighbourhood of their latents alone. A view is one more image with a latent of its own: every
stage, from the diffusion model on, sees it as one. Mirror images are no part of this (`mirror`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from pagoda.data.protocol import BadImageError, ImageSource
from pagoda.data.wrapped import WrappedSource
from pagoda.files import hash_json

_VERSION = 1
"""Of how views are drawn: part of the fingerprint."""


class ViewedSource(WrappedSource):
    """Another source's images, and further views of them: row v N + i is view v of image i of N, and view 0 the image itself.

    A view shows the image moved by up to `view_shift` of its side, and by up to a factor 1 + `view_zoom` larger or smaller; what comes in
    from outside repeats the pixels of the edge. How it is moved depends on i and v alone. Its size, label and caption are the image's.

    Args:
        source: The images.
        options: How many views there are, and how far they go.
    """

    def __len__(self) -> int:
        return self.options.views * len(self.source)

    def _place(self, index: int) -> tuple[int, int]:
        """View and image of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of the {len(self)} views, 0 to {len(self) - 1}.")
        return divmod(index, len(self.source))

    def image(self, index: int) -> Image.Image:
        """The view, of its image's size and mode."""
        view, original = self._place(index)
        try:
            image = self.source.image(original)
        except BadImageError as error:
            raise BadImageError(self.sample_id(index), error.reason) from error
        if view == 0:
            return image
        draw = np.random.default_rng([original, view])
        reach, most = self.options.view_shift, math.log1p(self.options.view_zoom)
        moved = draw.uniform(-reach, reach, 2)
        return shifted_and_zoomed(image, (float(moved[0]), float(moved[1])), math.exp(draw.uniform(-most, most)))

    def label(self, index: int) -> int | None:
        """The image's."""
        return self.source.label(self._place(index)[1])

    def caption(self, index: int) -> str | None:
        """The image's."""
        return self.source.caption(self._place(index)[1])

    def sample_id(self, index: int) -> str:
        """The image's name; of further views with `#1`, `#2`, ... behind it."""
        view, original = self._place(index)
        name = self.source.sample_id(original)
        return f"{name}#{view}" if view else name

    def metadata(self, index: int) -> dict[str, Any]:
        """The image's, and `view`."""
        view, original = self._place(index)
        return {**self.source.metadata(original), "view": view}

    @property
    def fingerprint(self) -> str:
        """Hash of the images' own and of how views are drawn."""
        options = self.options
        return hash_json(
            ["views", _VERSION, self.source.fingerprint, options.views, options.view_shift, options.view_zoom]
        )


def without_views(source: ImageSource) -> ImageSource:
    """The images alone."""
    return source.source if isinstance(source, ViewedSource) else source


def shifted_and_zoomed(image: Image.Image, shift: tuple[float, float], zoom: float) -> Image.Image:
    """An image moved to the right and down, then enlarged about its centre, at its own size; the edge is repeated outwards.

    Args:
        image: Mode L or RGB.
        shift: Fractions of width and height.
        zoom: Above 1 enlarges.
    """
    width, height = image.size
    left, top = (
        side * (0.5 - move - 0.5 / zoom) for side, move in zip((width, height), shift, strict=True)
    )  # of the window that the new image shows
    right, bottom = left + width / zoom, top + height / zoom
    margin = math.ceil(max(0.0, -left, -top, right - width, bottom - height))
    pixels = np.asarray(image)
    around = [(margin, margin), (margin, margin), *[(0, 0)] * (pixels.ndim - 2)]
    padded = Image.fromarray(np.pad(pixels, around, mode="edge"))
    box = (left + margin, top + margin, right + margin, bottom + margin)
    return padded.resize(image.size, Image.Resampling.BICUBIC, box=box)
