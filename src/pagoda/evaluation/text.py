"""How well images fit their texts, from the embeddings of both in one space, such as CLIP's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import ShapeError


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos(image, text), 0) of each pair, (N,) float64 in [0, 100]; the CLIP score is the mean.

    Args:
        images, texts: Embeddings (N, d), row by row of one pair.

    Raises:
        ShapeError: different shapes.

    Source: Hessel et al. 2021, arXiv:2104.08718, eq. 1 (there with 2.5 in place of 100).
    """
    _check(images, texts)
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=1).clamp(min=0)


def directional_similarity(
    images_before: Tensor, images_after: Tensor, texts_before: Tensor, texts_after: Tensor
) -> Tensor:
    """Cosine between the change of an image and the change of its text, (N,) float64 in [-1, 1]: for edits.

    Args:
        images_before, images_after, texts_before, texts_after: Embeddings (N, d) of unit length.

    Raises:
        ShapeError: different shapes.

    Source: Gal et al. 2021, arXiv:2108.00946, eq. 3.
    """
    for other in (images_after, texts_before, texts_after):
        _check(images_before, other)
    return F.cosine_similarity(
        images_after.double() - images_before.double(), texts_after.double() - texts_before.double(), dim=1
    )


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise ShapeError(
            f"embeddings must be (N, d) and as many texts as images, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
