"""Images from what was measured of them: back-projection, alternation of encoder and generator, search for the latent.

The generator says what images look like, the measurement y = A x says which of them it was. Nothing is trained.

Source: the tasks are those of Kim et al. 2024, PaGoDA, arXiv:2405.14822; the procedures are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import ConfigError
from pagoda.steering.mixing import mix_latents
from pagoda.steering.operators import LinearOperator
from pagoda.steering.settings import check_rounds
from pagoda.training import seeded_generator


@dataclass(frozen=True)
class Guess:
    """What images are believed to be, where nothing was measured: B x = g, by its weight.

    Attributes:
        values: g, (B, C, h, w).
        operator: B.
        weight: w, beside the measurement's 1.
    """

    values: Tensor
    operator: LinearOperator
    weight: float = 1.0

    def of_rows(self, rows: Tensor) -> Guess:
        """The guess about some samples."""
        return Guess(self.values[rows], self.operator.of_rows(rows), self.weight)

    def error(self, images: Tensor) -> Tensor:
        """Mean square error of images (B, C, H, W), (B,). Differentiable."""
        return (self.operator(images) - self.values.to(images)).square().flatten(1).mean(1)


def back_project(images: Tensor, measured: Tensor, operator: LinearOperator, *, damping: float = 0.0) -> Tensor:
    """The nearest images that agree with a measurement: x + A^+ (y - A x).

    Args:
        images: x, (B, C, H, W).
        measured: y, (B, C, h, w).
        operator: A.
        damping: 0 agrees exactly, where y is in the range of A; more trusts y less, see `operators`.

    Returns:
        (B, C, H, W) in the type of `images`; not clamped.

    Raises:
        ShapeError: shapes that the operator does not take.
    """
    x = images.double()
    return (x + operator.pseudo_inverse(measured.double() - operator(x), damping=damping)).to(images.dtype)


def alternate(
    start: Tensor,
    measured: Tensor,
    operator: LinearOperator,
    encode: Callable[[Tensor], Tensor],
    generate: Callable[[Tensor], Tensor],
    *,
    rounds: int,
    strength: float = 0.0,
    seeds: Sequence[int] = (),
    damping: float = 0.0,
) -> Tensor:
    """Encoder, noise, generator, back-projection, in turn: x <- P(G(sqrt(1 - eta^2) E(x) + eta noise)).

    With a `MaskOperator` this is inpainting: P puts the known pixels back.

    Args:
        start: x at the start, (B, C, H, W).
        measured: y, (B, C, h, w).
        operator: A.
        encode: E, images (B, C, H, W) -> unit-scale latents.
        generate: G, latents -> images (B, C, H, W).
        rounds: How often.
        strength: eta of the first round, in [0, 1]; it falls in equal steps to 0 in the last.
        seeds: One a sample; needed where the strength is above 0.
        damping: Of the back-projections.

    Returns:
        What the generator made in the last round, (B, C, H, W), before its back-projection.

    Raises:
        ConfigError: no round, a strength outside [0, 1] or in a single round, or not one seed a sample.
    """
    check_rounds(rounds, strength)
    if strength and len(seeds) != len(start):
        raise ConfigError(f"a strength of {strength} needs a seed for each of {len(start)} images, got {len(seeds)}.")
    x = made = start
    for index in range(rounds):
        if index:
            x = back_project(made, measured, operator, damping=damping).clamp(-1, 1)
        z = encode(x)
        eta = strength * (1 - index / (rounds - 1)) if rounds > 1 else 0.0
        if strength:
            shape = tuple(z.shape[1:])
            noise = torch.stack([torch.randn(shape, generator=seeded_generator("edit", seed, index)) for seed in seeds])
            z = mix_latents(z, noise.to(z), eta)
        made = generate(z)
    return made


def optimise_latents(
    start: Tensor,
    measured: Tensor,
    operator: LinearOperator,
    generate: Callable[[Tensor], Tensor],
    *,
    steps: int = 100,
    rate: float = 0.05,
    sphere: float = 0.1,
    guess: Guess | None = None,
) -> Tensor:
    """Latents whose images agree with a measurement, by Adam on |y - A G(z)|^2 / d_y + sphere (|z|^2 / d_z - 1)^2.

    The second term keeps latents at the radius where the generator has seen noise; a guess adds w |g - B G(z)|^2 / d_g, and holds what
    the measurement leaves free. Each sample has a loss of its own, so that others in the batch do not matter.

    Args:
        start: Unit-scale latents (B, C, b, b) to start from; left as they are.
        measured: y, (B, C, h, w).
        operator: A.
        generate: G, differentiable.
        steps: Of Adam; the best latent of each sample on the way is returned.
        rate: Its learning rate at the start; it falls to 0 along a half cosine.
        sphere: Weight of the second term.
        guess: What images are believed to be beyond the measurement; None adds nothing.

    Returns:
        Latents (B, C, b, b).

    Raises:
        ConfigError: no step, or a rate or weight out of range.
    """
    if steps < 1 or rate <= 0 or sphere < 0:
        raise ConfigError(f"steps must be >= 1, rate > 0 and sphere >= 0, got {steps}, {rate}, {sphere}.")
    best, lowest = start.clone(), torch.full((len(start),), float("inf"), device=start.device)
    with torch.enable_grad():
        z = start.detach().clone().requires_grad_(True)
        adam = torch.optim.Adam([z], lr=rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            made = generate(z)
            loss = (operator(made) - measured).square().flatten(1).mean(1)
            loss = loss + sphere * (z.square().flatten(1).mean(1) - 1).square()
            if guess is not None:
                loss = loss + guess.weight * guess.error(made)
            (z.grad,) = torch.autograd.grad(loss.sum(), [z])  # none for the weights, which stay as they are
            better = loss.detach() < lowest
            best[better], lowest = z.detach()[better], torch.where(better, loss.detach(), lowest)
            adam.step()
            falling.step()
    return best
