"""What a process of our own settles before it works: how threads wait, and what becomes of memory that was freed.

Both are settings of a whole process, so that commands, recipes and benchmarks make them and `import pagoda` does not. They change
no number. Imports nothing that is heavy, since `spin_shortly` has to act before PyTorch does.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""
KEPT_BLOCK = 256 * 2**20
"""Bytes up to which a block comes from memory that is kept; larger ones go back to the system as ever."""


def prepare_process() -> None:
    """Make both settings; call it before PyTorch is imported."""
    spin_shortly()
    keep_memory()


def spin_shortly() -> None:
    """Let idle OpenMP threads spin for a moment and then sleep, unless the environment says how they wait.

    Call it before PyTorch is imported.

    At each of the many small operations of a small network, threads that sleep at once (`OMP_WAIT_POLICY=PASSIVE`) take
    longer to wake than the operation takes; threads that spin as long as they like take the cores from other processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next tensors, unless the environment says what its allocator does.

    By default freed tensors of a megabyte and more are given back to the system, and each of their pages is cleared and mapped anew
    at the next call: thousands of page faults for each run of a network on a CPU. Kept, they cost nothing, and the process is as large
    as it once was.

    Returns:
        Whether the setting was made: only with glibc, and not where `MALLOC_...`, `GLIBC_TUNABLES` or another allocator in `LD_PRELOAD`
        already decides.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    told = told or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get("LD_PRELOAD", "")
    if told or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    largest = 2**31 - 1  # the argument is a C int
    return bool(library.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK)) and bool(library.mallopt(_M_TRIM_THRESHOLD, largest))


def release_memory() -> bool:
    """Give memory that was freed back to the system, also what `keep_memory` keeps: between stages, which need other sizes of tensors.

    Without it the process of a whole run holds what every stage left in pieces that the next cannot use.

    Returns:
        Whether there was a way to: only with glibc.
    """
    gc.collect()
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
