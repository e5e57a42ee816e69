"""How well images fit their texts, from the embeddings of both in one space, such as CLIP's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pagoda.errors import DataError, ShapeError


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


def retrieval_accuracy(images: Tensor, texts: Tensor, rows: Tensor, *, among: int = 32, seed: int = 0) -> float:
    """How often an image finds its own text among `among` texts, in [0, 1]; chance is 1 / among.

    The others are drawn for each image, without its own and without repetition. A tie counts as not found, so that
    embeddings that are all alike score 0.

    Args:
        images: Embeddings (N, d) of unit length.
        texts: Embeddings (M, d) of unit length, of different texts.
        rows: (N,) int64 in [0, M): the text of each image.
        among: How many texts each image chooses from.
        seed: Of the draw of the others.

    Raises:
        ShapeError: vectors of different lengths, or not one row an image.
        DataError: fewer than `among` texts.

    Source: the task of R-precision, Xu et al. 2018, AttnGAN, arXiv:1711.10485, section 4.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or rows.shape != images.shape[:1]:
        raise ShapeError(
            f"retrieval needs images (N, d), texts (M, d) and rows (N,), got {tuple(images.shape)}, {tuple(texts.shape)} "
            f"and {tuple(rows.shape)}."
        )
    if not 2 <= among <= len(texts):
        raise DataError(
            f"retrieval among {among} texts needs 2 or more, and as many different ones; there are {len(texts)}."
        )
    generator = torch.Generator().manual_seed(seed)
    # Numbers 0 .. M - 2 of the others, of which those from the own one on move up by one.
    others = torch.stack([torch.randperm(len(texts) - 1, generator=generator)[: among - 1] for _ in range(len(rows))])
    others = others + (others >= rows[:, None]).long()  # (N, among - 1)
    scores = images.double() @ texts.double().T  # (N, M)
    own = scores.gather(1, rows[:, None])
    return float((scores.gather(1, others) < own).all(1).double().mean())
