"""Ways from one latent to another: towards fresh noise by a strength, to another image along the sphere; conditions likewise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagoda.diffusion import Condition, spherical_mixture
from pagoda.errors import ConfigError, ShapeError
from pagoda.networks import OneStepGenerator
from pagoda.networks.calling import resolve_labels
from pagoda.steering.settings import check_strength

_PARALLEL = 1e-6
"""Sine of an angle below which two latents count as opposite."""


def mix_latents(z: Tensor, noise: Tensor, strength: float) -> Tensor:
    """A latent moved towards fresh noise: sqrt(1 - s^2) z + s noise, of unit variance where both are.

    Args:
        z: Unit-scale latents (B, C, b, b).
        noise: Unit Gaussian, like `z`.
        strength: s in [0, 1]; 0 gives `z` and 1 gives `noise`, bit for bit.

    Raises:
        ConfigError: a strength outside [0, 1].
        ShapeError: `noise` has another shape.
    """
    check_strength(strength)
    if z.shape != noise.shape:
        raise ShapeError(f"latents of shape {tuple(z.shape)} cannot be mixed with noise of shape {tuple(noise.shape)}.")
    return (1 - strength**2) ** 0.5 * z + strength * noise


def interpolate_latents(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation, each sample along the great circle through its two flattened latents.

    A straight line between two independent latents is shorter in the middle (its norm falls to 0.71), where the generator has
    seen no noise. Latents that are parallel are joined by the straight line, which then is the circle.

    Args:
        first: Unit-scale latents (B, C, b, b).
        second: Like `first`.
        share: Way travelled, in [0, 1]; 0 gives `first` and 1 gives `second`, bit for bit.

    Raises:
        ConfigError: a share outside [0, 1], or two opposite latents, between which no way is the shortest.
        ShapeError: the shapes differ.

    Source: Shoemake 1985, Animating rotation with quaternion curves.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of an interpolation must lie in [0, 1], got {share}.")
    if first.shape != second.shape:
        raise ShapeError(f"latents of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be interpolated.")
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).clamp(-1, 1)
    if bool(((1 - cosine**2).sqrt() < _PARALLEL).logical_and(cosine < 0).any()):
        raise ConfigError(
            "two latents are opposite to each other: no way between them is the shortest. Move one a little."
        )
    return spherical_mixture(first, second, share)


@contextmanager
def mixed_condition(
    generator: OneStepGenerator, first: Condition, second: Condition, share: float
) -> Iterator[Condition]:
    """A condition part of the way between two, for calls of a generator within the context.

    Tokens, pooled text, images and guidance weights are mixed linearly, after what a generator of a pipeline's texts reads where nothing
    was said (`NullCondition`) has taken its place: so the way ends where the ends are. Of texts whose masks differ, tokens are repeated
    until both have as many: attention over repeated tokens gives what it gives over each of them once, so that no end jumps.
    Labels are numbers of rows, so their embeddings are mixed: within the context the generator's tables of labels give
    (1 - share) e(first) + share e(second).

    Args:
        generator: Whose calls are meant; as it was after the context.
        first: One row a sample.
        second: The same slots; as many tokens, or masks of those that are there on both sides.
        share: In [0, 1]; at 0 and 1 the generator is called with `first` or `second` themselves, bit for bit.

    Raises:
        ConfigError: a share outside [0, 1], or labels that the generator does not know.
        ShapeError: the conditions set other slots or have another number of rows.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of an interpolation must lie in [0, 1], got {share}.")
    if share in (0, 1):
        yield second if share else first
        return
    one, other = (told.slots() for told in _stretched(*_filled(generator, first, second)))
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        shapes = [{name: tuple(value.shape) for name, value in slots.items()} for slots in (one, other)]
        raise ShapeError(
            f"conditions to be mixed must have the same slots and shapes, got {shapes[0]} and {shapes[1]}."
        )
    mixed = {}
    for name, value in one.items():
        if name in ("label", "tokens_mask"):  # of labels the tables are mixed; masks are the same by now
            mixed[name] = value
        else:
            mixed[name] = (1 - share) * value + share * other[name]
    tables = _mixed_tables(generator, other["label"], share) if "label" in one else nullcontext()
    with tables:
        yield Condition(**mixed)


def _filled(generator: OneStepGenerator, first: Condition, second: Condition) -> tuple[Condition, Condition]:
    """The two as the generator itself fills them in each call, with masks for both or for none."""
    batch = first.batch_size or second.batch_size
    if generator.null is None or batch is None:
        return first, second
    told = [generator.null.fill(condition, batch) for condition in (first, second)]
    if any(condition.tokens_mask is not None for condition in told):
        told = [
            replace(c, tokens_mask=torch.ones_like(c.tokens[..., 0], dtype=torch.bool))
            if c.tokens is not None and c.tokens_mask is None
            else c
            for c in told
        ]
    return told[0], told[1]


def _stretched(first: Condition, second: Condition) -> tuple[Condition, Condition]:
    """The two with the same masks: where they differ, the tokens of each row are repeated up to a common multiple of both numbers."""
    one, other = first.tokens_mask, second.tokens_mask
    if first.tokens is None or second.tokens is None or one is None or other is None or len(one) != len(other):
        return first, second
    if one.shape == other.shape and torch.equal(one, other):
        return first, second
    rows = [_repeated(*pair) for pair in zip(first.tokens, one, second.tokens, other, strict=True)]
    longest = max(len(tokens) for tokens, _ in rows)
    kept = torch.stack([torch.arange(longest, device=one.device) < len(tokens) for tokens, _ in rows])
    stretched = [
        torch.stack([F.pad(row[which], (0, 0, 0, longest - len(row[which]))) for row in rows]) for which in (0, 1)
    ]
    return replace(first, tokens=stretched[0], tokens_mask=kept), replace(second, tokens=stretched[1], tokens_mask=kept)


def _repeated(first: Tensor, first_kept: Tensor, second: Tensor, second_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (T, D) of two texts, those that their masks (T,) keep, each as often as makes both texts as long.

    A text that was dropped keeps none; under such a mask attention reads all of its tokens, which are alike, so all are taken.
    """
    texts = [
        tokens[kept] if bool(kept.any()) else tokens for tokens, kept in ((first, first_kept), (second, second_kept))
    ]
    common = math.lcm(*(len(text) for text in texts))
    one, other = (text.repeat_interleave(common // len(text), dim=0) for text in texts)
    return one, other


@contextmanager
def _mixed_tables(generator: OneStepGenerator, labels: Tensor, share: float) -> Iterator[None]:
    """Every table of labels mixes what it gives with the rows of other labels (B,)."""
    rows = resolve_labels(labels, generator.num_classes, len(labels), labels.device)

    def mix(table: nn.Module, arguments: tuple[Tensor, ...], found: Tensor) -> Tensor:
        assert isinstance(table, nn.Embedding)
        return (1 - share) * found + share * F.embedding(rows.to(found.device), table.weight)

    tables = [
        module
        for module in generator.base.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == generator.num_classes + 1
    ]
    handles = [table.register_forward_hook(mix) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
