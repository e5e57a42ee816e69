"""An invisible mark that a key finds again: spread spectrum in the cosine transform of the brightness, read blind.

A key gives a sign s_k to every coefficient of the transform. Marking moves coefficients y_k of the band between 0.3 and 0.7 of
the highest frequency towards s_k y_k >= m: those that are there already stay, those beyond -2 m would cost too much and stay
too, and m is what spends exactly the error that is allowed. Reading counts signs:

    t = sum_k s_k sign(y_k) / sqrt(K)

Over random keys, every sign of an unmarked image agrees by chance, whatever the image shows: t is a binomial number of mean 0 and
variance 1, nearly Gaussian, and P(t >= x) <= exp(-x^2 / 2) exactly (Hoeffding 1963, theorem 2). Signs, rather than a correlation,
because the few large coefficients of edges would drown it. A coefficient is named by its waves per image, so that an image which
was made smaller or larger keeps its mark where the size is brought back.

Sources: Cox et al. 1997 (spread spectrum for watermarks); Malvar and Florencio 2003 (an embedder that knows the image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pagoda.errors import ConfigError, ShapeError
from pagoda.images import to_pil
from pagoda.training import seeded_generator

MARK_PSNR = 38.0
"""Of a marked image against the unmarked one, in dB, before rounding to bytes."""
MARK_BAND = (0.3, 0.7)
"""Radius of the marked frequencies, of 1 = the highest in each direction: JPEG spares what lies below, resizing removes what lies above."""
FALSE_POSITIVES = 1e-5
"""Chance that an unmarked image is taken for a marked one, at most."""
_REACH = 2.0
_FEWEST = 64
_LARGEST = 512
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class MarkReading:
    """What a key reads from an image.

    Attributes:
        statistic: t, the largest over all placements that were tried; N(0, 1) for one placement in an unmarked image.
        placements: How many were tried: 1, or where a cropped image may have lain.
    """

    statistic: float
    placements: int = 1

    @property
    def probability(self) -> float:
        """Chance that an unmarked image reads at least this, by the normal distribution, at most 1."""
        return min(1.0, self.placements * 0.5 * math.erfc(self.statistic / math.sqrt(2)))

    def found(self, false_positives: float = FALSE_POSITIVES) -> bool:
        """Whether the mark is there, for a chance of error."""
        return self.probability <= false_positives

    def __str__(self) -> str:
        tried = f" over {self.placements} placements" if self.placements > 1 else ""
        answer = "found" if self.found() else "not found"
        return f"{answer}: statistic {self.statistic:.1f}{tried}, by chance with probability {self.probability:.1g}"


def mark_images(images: Tensor, key: str, *, psnr: float = MARK_PSNR) -> Tensor:
    """Images with the mark of a key, of the same type and on the same device.

    Args:
        images: (B, C, H, W) in [-1, 1], one or three channels.
        key: Any text; whoever has it can find the mark, and remove it.
        psnr: How much may change, in dB: smaller is stronger. At least that is kept.

    Raises:
        ConfigError: an empty key, or a psnr outside of 20 to 60 dB.
        ShapeError: other channels, or an image with fewer than 64 coefficients in the band (about 16 x 16 pixels).
    """
    if not 20 <= psnr <= 60:
        raise ConfigError(f"the PSNR of a mark must lie in 20 to 60 dB, got {psnr}.")
    signs, band = _signs(key, *images.shape[-2:])
    allowed = images[0, 0].numel() * 4 * 10 ** (-psnr / 10)  # squared error of one image, peak to peak 2
    marked = []
    for image in images.double().cpu():
        spectrum = _transform(_brightness(image))
        values = (signs * spectrum)[band]
        low, high = 0.0, 2.0 * math.sqrt(allowed)  # at `high` one coefficient alone would spend it
        while _spent(values, high) < allowed:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _spent(values, middle) < allowed else (low, middle)
        shift = torch.zeros_like(spectrum)
        shift[band] = torch.where(_moved(values, low), low - values, 0.0)
        marked.append(image + _inverse(signs * shift))
    return torch.stack(marked).clamp(-1, 1).to(images)


def mark_picture(picture: Image.Image, key: str, *, psnr: float = MARK_PSNR) -> Image.Image:
    """A grey or RGB picture with the mark of a key; see `mark_images`."""
    return to_pil(mark_images(_read(picture)[None], key, psnr=psnr))[0]


def read_mark(picture: Image.Image, key: str, *, cropped_from: tuple[int, int] | None = None) -> MarkReading:
    """Look for the mark of a key. Neither the unmarked image nor its metadata is needed.

    Args:
        picture: Any picture, of the size that it was marked at. One that was resized is to be brought back to it first.
        key: As it was marked with.
        cropped_from: Width and height of the picture before it was cropped: every place where it may have lain is tried.

    Raises:
        ConfigError: an empty key.
        ShapeError: a picture that is too small, or larger than what it was cropped from.
    """
    brightness = _brightness(_read(picture.convert("RGB")))
    height, width = brightness.shape
    whole_width, whole_height = cropped_from or (width, height)
    if whole_width < width or whole_height < height:
        raise ShapeError(
            f"the picture has {width} x {height} pixels, more than the {whole_width} x {whole_height} it is said to come from."
        )
    signs, band = _signs(key, whole_height, whole_width)
    readings = []
    for top in range(whole_height - height + 1):
        for left in range(whole_width - width + 1):
            margins = (left, whole_width - width - left, top, whole_height - height - top)
            # What was cut off is taken to go on as the edge does: a step there would reach into all frequencies.
            whole = F.pad(brightness[None, None], margins, mode="replicate")[0, 0]
            agreement = (signs * _transform(whole).sign())[band]
            readings.append(float(agreement.sum()) / math.sqrt(max(1, int(agreement.count_nonzero()))))
    return MarkReading(statistic=max(readings), placements=len(readings))


def _moved(values: Tensor, margin: float) -> Tensor:
    return (values < margin) & (values > -_REACH * margin)


def _spent(values: Tensor, margin: float) -> float:
    return float(torch.where(_moved(values, margin), margin - values, 0.0).square().sum())


@lru_cache(maxsize=4)
def _signs(key: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Signs of all coefficients (H, W), and which of them carry the mark."""
    if not key:
        raise ConfigError("the key of a watermark is empty; give any text that others do not guess.")
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot((rows / height)[:, None], (columns / width)[None])
    band = (radius > MARK_BAND[0]) & (radius < MARK_BAND[1])
    band[_LARGEST:], band[:, _LARGEST:] = False, False
    count = int(band.sum())
    if count < _FEWEST:
        raise ShapeError(
            f"a watermark needs {_FEWEST} coefficients, an image of {width} x {height} pixels has {count}; about 16 x 16 pixels are needed."
        )
    drawn = torch.randint(2, (_LARGEST, _LARGEST), generator=seeded_generator("watermark", key))
    signs = torch.ones(height, width, dtype=torch.float64)
    signs[:_LARGEST, :_LARGEST] = 2.0 * drawn[:height, :width] - 1
    return signs, band


def _brightness(image: Tensor) -> Tensor:
    """(C, H, W) -> (H, W). A change of all channels by d changes it by d."""
    if image.shape[0] not in (1, 3):
        raise ShapeError(f"a watermark goes into grey or RGB images, got {image.shape[0]} channels.")
    weights = torch.tensor(_LUMA if image.shape[0] == 3 else (1.0,), dtype=torch.float64)
    return torch.einsum("chw,c->hw", image, weights)


def _read(picture: Image.Image) -> Tensor:
    """(C, H, W) in [-1, 1], float64."""
    array = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"), dtype=np.float64)
    values = torch.from_numpy(array.copy()) / 127.5 - 1
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


@lru_cache(maxsize=8)
def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix (size, size): row u is the wave of u half periods."""
    wave, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = (math.pi * wave * (place + 0.5) / size).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _transform(values: Tensor) -> Tensor:
    return _cosines(values.shape[0]) @ values @ _cosines(values.shape[1]).T


def _inverse(spectrum: Tensor) -> Tensor:
    return _cosines(spectrum.shape[0]).T @ spectrum @ _cosines(spectrum.shape[1])
