"""What was measured of an image: linear maps y = A x with their adjoint and pseudo-inverse.

Every operator acts on images (B, C, H, W), each sample and channel alike. The damped pseudo-inverse

    A^+_d y = argmin_x |A x - y|^2 + d |x|^2

is the Moore-Penrose pseudo-inverse at d = 0. A damping above 0 keeps noise of the measurement (the rounding to bytes, at the
least) from being enlarged where A lets little through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pagoda.data import Downsampler
from pagoda.errors import ConfigError, ShapeError

_CUT = 1e-10
"""Singular values below this share of the largest count as 0."""
_DENSE_RAYS = 6000
"""Sums of `Projections` up to which their system is solved directly; its matrix then takes 290 MB."""
_TINY = 1e-12
"""Damping of a step that is repeated until it makes no difference; about the rounding of the system's own entries."""


class LinearOperator(ABC):
    """y = A x.

    Attributes:
        shape_in: (H, W) of the images.
        shape_out: (h, w) of what is measured.
    """

    shape_in: tuple[int, int]
    shape_out: tuple[int, int]

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...

    def __call__(self, x: Tensor) -> Tensor:
        """A x: (B, C, H, W) -> (B, C, h, w). Differentiable.

        Raises:
            ShapeError: x is not (B, C, *shape_in).
        """
        _check(x, self.shape_in, "images")
        return self._apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: (B, C, h, w) -> (B, C, H, W).

        Raises:
            ShapeError: y is not (B, C, *shape_out).
        """
        _check(y, self.shape_out, "measurements")
        return self._adjoint(y)

    def of_rows(self, rows: Tensor) -> LinearOperator:
        """The operator of some samples (indices) of a batch; itself, where it is the same for all."""
        return self

    def pseudo_inverse(self, y: Tensor, *, damping: float = 0.0) -> Tensor:
        """A^+_d y: (B, C, h, w) -> (B, C, H, W), see the module; calculated in float64.

        Raises:
            ShapeError: y is not (B, C, *shape_out).
            ConfigError: a negative damping, or an operator so nearly singular that the solver does not converge.
        """
        _check(y, self.shape_out, "measurements")
        if damping < 0:
            raise ConfigError(f"damping must be >= 0, got {damping}.")
        return self._pseudo_inverse(y.double(), damping).to(y.dtype)

    def _pseudo_inverse(self, y: Tensor, damping: float) -> Tensor:
        return least_squares(self._apply, self._adjoint, y, damping)


class MaskOperator(LinearOperator):
    """Pixels that are known: A x = m x.

    Args:
        mask: (H, W), or one a sample (B, 1, H, W); 1 or True = known.

    Raises:
        ShapeError: another shape.
        ConfigError: values other than 0 and 1.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
            raise ShapeError(f"a mask is (H, W) or (B, 1, H, W), got {tuple(mask.shape)}.")
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ConfigError("a mask holds 0 (unknown) and 1 (known) only; choose a threshold first.")
        self.mask = mask.bool()
        self.shape_in = self.shape_out = (mask.shape[-2], mask.shape[-1])

    def _apply(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply(y)

    def of_rows(self, rows: Tensor) -> MaskOperator:
        """The masks of some samples."""
        return self if self.mask.ndim == 2 or len(self.mask) == 1 else MaskOperator(self.mask[rows])

    def _pseudo_inverse(self, y: Tensor, damping: float) -> Tensor:
        return self._apply(y) / (1 + damping)


class SeparableOperator(LinearOperator):
    """Rows and columns by a matrix each: A x = R x C^T. Enlarging, reducing and blurring along the axes are of this kind.

    Args:
        rows: R, (h, H).
        columns: C, (w, W); R when None.

    Raises:
        ShapeError: not matrices.
    """

    def __init__(self, rows: Tensor, columns: Tensor | None = None) -> None:
        columns = rows if columns is None else columns
        if rows.ndim != 2 or columns.ndim != 2:
            raise ShapeError(f"two matrices are needed, got shapes {tuple(rows.shape)} and {tuple(columns.shape)}.")
        self.rows, self.columns = rows.double(), columns.double()
        self.shape_in = (rows.shape[1], columns.shape[1])
        self.shape_out = (rows.shape[0], columns.shape[0])

    def _apply(self, x: Tensor) -> Tensor:
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.rows.to(y).T @ y @ self.columns.to(y)

    @cached_property
    def _factors(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        rows, columns = (torch.linalg.svd(m, full_matrices=False) for m in (self.rows, self.columns))
        return tuple(rows), tuple(columns)

    def _pseudo_inverse(self, y: Tensor, damping: float) -> Tensor:
        (u_r, s_r, v_r), (u_c, s_c, v_c) = self._factors
        s = s_r[:, None] * s_c[None, :]  # singular values of the Kronecker product
        inverse = torch.where(s > _CUT * s.max(), s / (s.square() + damping).clamp_min(1e-300), 0.0)
        return (v_r.T.to(y) @ (inverse.to(y) * (u_r.T.to(y) @ y @ u_c.to(y)))) @ v_c.to(y)


class Projections(LinearOperator):
    """Sums along parallel rays at several angles, as a scanner sees a slice: (B, C, s, s) -> (B, C, num_angles, num_rays).

    Each pixel falls on two neighbouring rays, in the shares of linear interpolation. Sums are divided by the number of rays, so that
    those of an image in [-1, 1] lie in about [-1, 1] too.

    Args:
        size: s, side of the images in pixels.
        num_angles: Directions, spread evenly over half a turn.

    Raises:
        ConfigError: no size or no angle.

    Source: Radon 1917; the discretisation is pixel-driven projection.
    """

    def __init__(self, size: int, num_angles: int) -> None:
        if size < 1 or num_angles < 1:
            raise ConfigError(f"projections need a size and a number of angles of 1 or more, got {size}, {num_angles}.")
        num_rays = math.ceil(size * math.sqrt(2)) + 1
        self.shape_in, self.shape_out = (size, size), (num_angles, num_rays)
        centre = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        angles = torch.arange(num_angles, dtype=torch.float64) * math.pi / num_angles
        place = (
            centre[None, None, :] * angles.cos()[:, None, None] + centre[None, :, None] * angles.sin()[:, None, None]
        )
        place = place.reshape(num_angles, -1) + (num_rays - 1) / 2
        below = place.floor().long().clamp(0, num_rays - 2)
        share = place - below
        first = torch.arange(num_angles)[:, None] * num_rays
        pixels = torch.arange(size * size).expand(num_angles, -1)
        indices = torch.stack(
            [torch.cat([first + below, first + below + 1]).flatten(), torch.cat([pixels, pixels]).flatten()]
        )
        values = torch.cat([1 - share, share]).flatten() / num_rays
        shape = (num_angles * num_rays, size * size)
        self._matrix = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()
        self._transposed = self._matrix.T.coalesce()
        self._factors: dict[float, Tensor] = {}

    def _apply(self, x: Tensor) -> Tensor:
        return self._multiply(self._matrix, x, self.shape_out)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(self._transposed, y, self.shape_in)

    def _pseudo_inverse(self, y: Tensor, damping: float) -> Tensor:
        if self._matrix.shape[0] > _DENSE_RAYS:
            return super()._pseudo_inverse(y, damping)
        # Nearly singular: conjugate gradients take thousands of steps. A^T (A A^T + d)^-1 y is solved directly; without damping, a tiny
        # one is taken and what it leaves of y is solved for again (iterated Tikhonov), until nothing is left.
        tiny = damping or _TINY
        if tiny not in self._factors:
            gram = torch.sparse.mm(self._matrix, self._transposed.to_dense())
            self._factors[tiny] = torch.linalg.cholesky(gram + tiny * torch.eye(len(gram), dtype=gram.dtype))
        factor = self._factors[tiny].to(y.device)
        x = torch.zeros(*y.shape[:2], *self.shape_in, dtype=y.dtype, device=y.device)
        for _ in range(1 if damping else 30):
            left = (y - self._apply(x)).reshape(y.shape[0] * y.shape[1], -1).T
            x = x + self._adjoint(torch.cholesky_solve(left.contiguous(), factor).T.reshape(y.shape))
        return x

    @staticmethod
    def _multiply(matrix: Tensor, x: Tensor, shape: tuple[int, int]) -> Tensor:
        flat = x.reshape(x.shape[0] * x.shape[1], -1).T
        return torch.sparse.mm(matrix.to(x), flat).T.reshape(*x.shape[:2], *shape)


def downsampling(size: int, small: int, downsampler: Downsampler | None = None) -> SeparableOperator:
    """What a downsampler does to square images of `size` pixels, before it rounds to bytes.

    Args:
        size: Side of the images, in pixels.
        small: Side of the reduced images.
        downsampler: Whose kernel; that of the default when None.

    Raises:
        ShapeError: `small` is not in 1..size.
    """
    matrix = (downsampler or Downsampler()).matrix(size, small)
    return SeparableOperator(torch.from_numpy(matrix))


def box_blur(size: int, width: int) -> SeparableOperator:
    """The mean over `width` x `width` pixels; beyond its edge an image is mirrored.

    Args:
        size: Side of the images, in pixels.
        width: Odd, at most `size`.

    Raises:
        ConfigError: an even width, or one that is not in 1..size.
    """
    if width % 2 == 0 or not 1 <= width <= size:
        raise ConfigError(f"a box blur needs an odd width from 1 to the image's {size} px, got {width}.")
    pixels = torch.arange(size)[:, None] + torch.arange(-(width // 2), width // 2 + 1)[None, :]
    pixels = torch.where(pixels < 0, -1 - pixels, pixels)
    pixels = torch.where(pixels >= size, 2 * size - 1 - pixels, pixels)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, pixels, torch.full(pixels.shape, 1 / width, dtype=torch.float64))
    return SeparableOperator(matrix)


def least_squares(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    y: Tensor,
    damping: float = 0.0,
    *,
    tolerance: float = 1e-7,
    max_steps: int = 2000,
) -> Tensor:
    """The x of least norm that minimises |A x - y|^2 + damping |x|^2, for each sample by itself.

    Args:
        apply: A; samples must not mix.
        adjoint: A^T.
        y: (B, ...), float64.
        damping: See the module.
        tolerance: A sample is solved when |A x - y| is below this share of |y|, or the gradient below 1e-4 of this share of |A^T y|.
        max_steps: Steps after which the solution is given up.

    Raises:
        ConfigError: the solution was given up.

    Source: Hestenes and Stiefel 1952, Methods of conjugate gradients for solving linear systems, section 10.
    """
    gradient = adjoint(y)
    x, residual, direction = torch.zeros_like(gradient), y, gradient
    error = dot(gradient, gradient)
    enough, solved = 1e-8 * tolerance**2 * error, tolerance**2 * dot(y, y)
    for _ in range(max_steps):
        going = (error > enough) & (
            dot(residual, residual) > solved
        )  # a solved sample stays as it is, whatever its batch
        if not bool(going.any()):
            return x
        image = apply(direction)
        curvature = dot(image, image) + damping * dot(direction, direction)
        step = torch.where(going, error / curvature.where(going, torch.ones_like(error)), 0.0)
        x, residual = x + step * direction, residual - step * image
        gradient = adjoint(residual) - damping * x
        after = dot(gradient, gradient)
        ratio = after / error.where(going, torch.ones_like(error))
        direction = torch.where(going, gradient + ratio * direction, direction)
        error = torch.where(going, after, error)
    raise ConfigError(
        f"what was measured is not matched to {tolerance:g} after {max_steps} steps: the operator is nearly singular. "
        f"Give a damping above {damping:g}."
    )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, 1, 1, 1)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _check(values: Tensor, shape: tuple[int, int], what: str) -> None:
    if values.ndim != 4 or tuple(values.shape[-2:]) != shape:
        raise ShapeError(f"{what} must be (B, C, {shape[0]}, {shape[1]}), got {tuple(values.shape)}.")
