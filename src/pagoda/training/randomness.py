"""Random draws that belong to samples: a pure function of (seed, step, name, row in the global batch).

Every process draws for the whole batch and keeps its own rows, so the noise of a sample does not depend on how many processes
or micro-batches share the work, and a resumed run needs no generator state. Draws are made on the CPU, so devices agree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def noise_of_seeds(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Unit Gaussian noise (len(seeds), *shape): row i depends on seeds[i] alone, not on the batch it is drawn in."""
    return torch.stack([torch.randn(shape, generator=seeded_generator("sample", seed)) for seed in seeds])


@dataclass(frozen=True)
class StepRandom:
    """The random draws of one training step.

    Args:
        seed: Seed of the run.
        step: Index of the step.
        batch_size: Samples in the global batch.
        rows: Which rows of the global batch are wanted here.
        stream: Name that separates one user's draws from another's.
    """

    seed: int
    step: int
    batch_size: int
    rows: slice
    stream: str = ""

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for `name` at this step; the same on every process."""
        return seeded_generator(self.seed, self.stream, self.step, name)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Unit Gaussian (rows, *shape)."""
        return torch.randn(self.batch_size, *shape, generator=self.generator(name))[self.rows]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return torch.rand(self.batch_size, *shape, generator=self.generator(name))[self.rows]

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), (rows, *shape) int64."""
        return torch.randint(high, (self.batch_size, *shape), generator=self.generator(name))[self.rows]

    def fork(self, stream: str) -> StepRandom:
        """The same step with draws independent of this stream's."""
        return replace(self, stream=f"{self.stream}.{stream}")
