"""Subspace clustering: the reference solver, and how subspaces and assignments are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.errors import DataError, ShapeError


@dataclass(frozen=True, eq=False)
class Clustering:
    """A union of K subspaces fitted to data.

    Attributes:
        bases: K matrices (n, d), orthonormal columns.
        assignment: (N,) int64, the subspace of each sample.
        captured: Share of the data's energy that lies in the assigned subspaces, in [0, 1].
    """

    bases: list[Tensor]
    assignment: Tensor
    captured: float


def k_subspaces(
    data: Tensor, num_subspaces: int, rank: int, generator: torch.Generator, *, restarts: int = 20, steps: int = 100
) -> Clustering:
    """Maximise sum_i max_k |U_k^T x_i|^2 over orthonormal U_k: alternate assignment and the top `rank` directions of each cluster.

    Args:
        data: (N, ...), flattened to (N, n).
        restarts: Random starts; the best is returned.

    Raises:
        DataError: fewer samples than subspaces, or a rank above n.

    Source: Bradley and Mangasarian 2000; Wang et al. 2024, arXiv:2409.02426, to which training of the low-rank denoiser is equivalent.
    """
    x = data.flatten(1)
    size = x.shape[1]
    if len(x) < num_subspaces or not 1 <= rank <= size:
        raise DataError(
            f"{num_subspaces} subspaces of {rank} dimensions do not fit {len(x)} samples of {size} dimensions."
        )
    total = float(x.square().sum())
    best: Clustering | None = None
    for _ in range(restarts):
        gaussian = torch.randn(num_subspaces, size, rank, generator=generator, dtype=x.dtype)
        bases = list(torch.linalg.qr(gaussian).Q)
        assignment = assign(x, bases)
        for _ in range(steps):
            bases = [_top(x[assignment == k], rank, bases[k]) for k in range(num_subspaces)]
            moved = assign(x, bases)
            if torch.equal(moved, assignment):
                break
            assignment = moved
        captured = float(_energies(x, bases).amax(1).sum()) / total
        if best is None or captured > best.captured:
            best = Clustering(bases, assignment, captured)
    assert best is not None
    return best


def assign(data: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """The subspace that holds most of each sample's energy, (N,) int64."""
    return _energies(data.flatten(1), bases).argmax(1)


def clustering_accuracy(assignment: Tensor, labels: Tensor) -> float:
    """Share of samples that are right under the best matching of clusters to classes, in [0, 1].

    Raises:
        ShapeError: another number of labels.
    """
    if assignment.shape != labels.shape:
        raise ShapeError(f"{tuple(assignment.shape)} assignments for {tuple(labels.shape)} labels.")
    count = int(max(int(assignment.max()), int(labels.max()))) + 1
    table = torch.zeros(count, count, dtype=torch.float64)
    table.index_put_((assignment, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    return sum(float(table[i, j]) for i, j in enumerate(match(-table))) / len(labels)


def subspace_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Largest |U U^T - V V^T|_F over matched subspaces, under the matching with the smallest sum of squares.

    Raises:
        ShapeError: another number of subspaces.
    """
    if len(found) != len(true):
        raise ShapeError(f"{len(found)} subspaces cannot be matched to {len(true)}.")
    cost = torch.tensor([[projector_distance(u, v) ** 2 for v in true] for u in found], dtype=torch.float64)
    return max(float(cost[i, j]) for i, j in enumerate(match(cost))) ** 0.5


def projector_distance(u: Tensor, v: Tensor) -> float:
    """|U U^T - V V^T|_F of two orthonormal bases.

    Summed from what each basis has outside of the other: the textbook's d_u + d_v - 2 |U^T V|_F^2 cancels, and tells equal subspaces
    apart by the root of the rounding error.
    """
    outside = (u - v @ (v.T @ u)).square().sum() + (v - u @ (u.T @ v)).square().sum()
    return float(outside) ** 0.5


def match(cost: Tensor) -> list[int]:
    """The column of each row in an assignment of least total cost, for a square table: shortest augmenting paths (Kuhn 1955)."""
    size = len(cost)
    rows, columns = [0.0] * (size + 1), [0.0] * (size + 1)
    owner = [0] * (size + 1)  # row (from 1) of each column; column 0 holds the row that is being placed
    table = cost.tolist()
    for row in range(1, size + 1):
        owner[0], at = row, 0
        slack, before, visited = [float("inf")] * (size + 1), [0] * (size + 1), [False] * (size + 1)
        while owner[at] != 0:
            visited[at] = True
            current, step, following = owner[at], float("inf"), 0
            for column in range(1, size + 1):
                if visited[column]:
                    continue
                reduced = table[current - 1][column - 1] - rows[current] - columns[column]
                if reduced < slack[column]:
                    slack[column], before[column] = reduced, at
                if slack[column] < step:
                    step, following = slack[column], column
            for column in range(size + 1):
                if visited[column]:
                    rows[owner[column]] += step
                    columns[column] -= step
                else:
                    slack[column] -= step
            at = following
        while at != 0:
            owner[at] = owner[before[at]]
            at = before[at]
    found = [0] * size
    for column in range(1, size + 1):
        found[owner[column] - 1] = column - 1
    return found


def _energies(x: Tensor, bases: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x @ basis.to(x)).square().sum(1) for basis in bases], 1)  # (N, K)


def _top(members: Tensor, rank: int, before: Tensor) -> Tensor:
    """Top `rank` right singular vectors; what too few members leave open is filled from the basis of before."""
    if len(members) == 0:
        return before
    directions = torch.linalg.svd(members, full_matrices=False).Vh[:rank].T  # (n, at most N)
    if directions.shape[1] == rank:
        return directions
    return torch.linalg.qr(torch.cat([directions, before], 1)).Q[:, :rank]
