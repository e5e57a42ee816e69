"""How PyTorch's threads wait for each other. Imports nothing, since it has to act before PyTorch does."""

from __future__ import annotations

import os


def spin_shortly() -> None:
    """Let idle OpenMP threads spin for a moment and then sleep, unless the environment says how they wait.

    Call it before PyTorch is imported.

    At each of the many small operations of a small network, threads that sleep at once (`OMP_WAIT_POLICY=PASSIVE`) take
    longer to wake than the operation takes; threads that spin as long as they like take the cores from other processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
